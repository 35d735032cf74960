"""The losses that have a name: what registers them, and what their signatures say of them.

B groups of K responses each.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from plad_fast.checks import check_length_normalization, check_weight, shown
from plad_fast.errors import UsageError

_FROM_THE_CALL = ("scores", "counts", "reference_logps", "length_normalization")
_CLOSE = 0.8  # to be taken for a name: of all letters, those that agree
# Other arguments of the ops: an option of this name would never reach the loss.
_RESERVED = {
    *("hidden", "weight", "bias", "targets", "cu_seqlens", "loss", "group_size", "sft_weight"),
    *("softcap", "logit_scale", "temperature", "ignore_index"),
    *("num_groups", "num_tokens", "impl", "scratch_bytes", "group", "sums"),
}


@dataclass(frozen=True)
class LossSpec:
    """A loss function with what its signature says of it."""

    name: str
    fn: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Option names with their default values; `inspect.Parameter.empty` means required."""
    takes: tuple[str, ...] = ()
    """Which of `scores`, `counts`, `reference_logps` and `length_normalization` the function has a
    parameter for."""
    needs_scores: bool = False
    """`scores` has no default."""
    needs_reference: bool = False
    """`reference_logps` has no default."""
    reference_if: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a loss that can go without `reference_logps` needs them with these options."""
    mean_over: str = "groups"
    """`groups`, or `tokens` of the groups' first sequences: what the sum is divided by."""
    length_normalized: bool = True
    """False: the function always gets plain sums, whatever the caller's length normalisation."""
    sft_weight: float = 0.0
    """What its paper adds of the best responses' likelihood, where the caller says nothing."""
    length_normalization: float = 0.0
    """alpha of its paper, where the caller says nothing. 1 also where the function takes means by
    itself: metrics count what it ranks by."""
    always_active: bool = False
    """No response's gradient is exactly 0, but by underflow: nothing can be left out, and a GPU
    need not be waited for to learn what."""

    def terms(
        self, sft_weight: float | None, length_normalization: float | None
    ) -> tuple[float, float]:
        """(sft_weight, length_normalization) as given, the loss's own where there is None."""
        return (
            self.sft_weight if sft_weight is None else sft_weight,
            self.length_normalization if length_normalization is None else length_normalization,
        )

    @property
    def is_likelihood(self) -> bool:
        """The loss is the likelihood of the best responses: `sft_weight` would double it."""
        return self.mean_over == "tokens"

    def check_options(self, options: Mapping[str, Any], *, beside: Sequence[str] = ()) -> None:
        """Names, and finite numbers or names as the defaults are; ranges are the loss's business.

        A number may also be a tensor ().

        Args:
            beside: what else may stand with the options, and has been taken out of them.

        Raises:
            UsageError: names the option and the loss.
        """
        for name in options:
            if name not in self.options:
                known = ", ".join([*beside, *self.options]) or "none"
                raise UsageError(f"loss {self.name!r} has no option {name!r}; it has: {known}")
        for name, default in self.options.items():
            if name in options:
                if not torch.compiler.is_compiling():
                    _check_kind(f"{name} of loss {self.name!r}", default, options[name])
            elif default is inspect.Parameter.empty:
                raise UsageError(f"loss {self.name!r} needs the option {name}")

    def needs_reference_for(self, options: Mapping[str, Any]) -> bool:
        """`needs_reference`, or what these options ask for."""
        if self.reference_if is None:
            return self.needs_reference
        return self.needs_reference or self.reference_if(options)


_REGISTRY: dict[str, LossSpec] = {}


def register_loss(
    name: str,
    *,
    mean_over: str = "groups",
    length_normalized: bool = True,
    reference_if: Callable[[Mapping[str, Any]], bool] | None = None,
    sft_weight: float = 0.0,
    length_normalization: float = 0.0,
    always_active: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a loss function known under `name`; see the module's docstring for its form, and
    `LossSpec` for the arguments."""
    assert mean_over in ("groups", "tokens")
    check_weight("sft_weight", sft_weight)
    check_length_normalization(length_normalization)

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _REGISTRY:
            raise ValueError(f"a loss named {name!r} is registered already")
        _REGISTRY[name] = _spec_of(
            name,
            fn,
            mean_over=mean_over,
            length_normalized=length_normalized,
            reference_if=reference_if,
            sft_weight=sft_weight,
            length_normalization=length_normalization,
            always_active=always_active,
        )
        return fn

    return register


def available() -> list[str]:
    """Names that `get_loss` knows, sorted."""
    return sorted(_REGISTRY)


def get_loss(loss: str | Callable[..., Tensor]) -> LossSpec:
    """The registered loss of that name or function, or a description of the caller's own function.

    Raises:
        UsageError: unknown name, with the one that may be meant or a list of all; neither a name
            nor a function.
    """
    if callable(loss):
        for spec in _REGISTRY.values():
            if spec.fn is loss:
                return spec
        return _spec_of(getattr(loss, "__name__", "custom"), loss)
    if not isinstance(loss, str):
        raise UsageError(
            f"loss must be the name of a loss or a function, got {loss!r}; known losses: "
            f"{', '.join(available())}"
        )
    if loss not in _REGISTRY:
        raise UsageError(f"unknown loss {loss!r}; {_hint(loss)}")
    return _REGISTRY[loss]


def _hint(unknown: str) -> str:
    """At the loss that is meant, by TRL's name or a mistyped one."""
    from plad_fast.losses.trl_options import DPO_LOSSES, REFUSED_DPO_LOSSES

    if unknown in DPO_LOSSES:
        return f"TRL's {unknown} is {DPO_LOSSES[unknown]} here"
    if unknown in REFUSED_DPO_LOSSES:
        return f"TRL's {unknown} does not work here: {REFUSED_DPO_LOSSES[unknown]}"
    close = difflib.get_close_matches(unknown, available(), 1, cutoff=_CLOSE)
    return f"did you mean {close[0]}?" if close else f"known losses: {', '.join(available())}"


def read_loss_args(
    loss: str, given: Mapping[str, Any] | str | None, *, beta: float | None = None
) -> dict[str, Any] | None:
    """Options of a loss from a mapping or from JSON text; None stays None.

    Args:
        loss: registered name.
        given: names and values; the values are checked when the loss is bound to them.
        beta: set apart from these.

    Raises:
        UsageError: not a mapping, or beta set twice.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise UsageError(
                f'loss_args must be a JSON object such as {{"gamma": 0.5}}, got {shown(given)}'
            ) from None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UsageError(f"loss_args must map names of options to values, got {shown(given)}")
    if "beta" in given and beta is not None:
        raise UsageError("beta is set both by itself and in loss_args; set it once")
    get_loss(loss).check_options({"beta": beta, **given} if beta is not None else given)
    return dict(given)


def _check_kind(what: str, default: Any, value: Any) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"{what} must be True or False, got {shown(value)}")
    elif isinstance(default, str):
        if not isinstance(value, str):
            raise UsageError(f"{what} is a name, got {shown(value)}")
    elif isinstance(default, (int, float)):
        if isinstance(value, Tensor):
            if value.ndim or value.is_complex():
                raise UsageError(
                    f"{what} must be one real number, got a tensor of {value.dtype} of shape "
                    f"{tuple(value.shape)}"
                )
            value = value.item() if value.device.type == "cpu" else 0.0  # a GPU is not waited for
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise UsageError(f"{what} must be a number, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{what} must be a finite number, got {value}")


def _spec_of(name: str, fn: Callable[..., Tensor], **declared: Any) -> LossSpec:
    try:
        parameters = list(inspect.signature(fn).parameters.values())[1:]
    except (TypeError, ValueError):
        raise UsageError(f"loss {name!r} shows no signature; wrap it in a function") from None
    named = {
        p.name: p.default for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    if clash := sorted(_RESERVED & named.keys()):
        raise UsageError(
            f"loss {name!r} has a parameter named {clash[0]!r}, which is an argument of the op; "
            "give it another name"
        )
    return LossSpec(
        name=name,
        fn=fn,
        options={key: value for key, value in named.items() if key not in _FROM_THE_CALL},
        takes=tuple(key for key in named if key in _FROM_THE_CALL),
        needs_scores=named.get("scores") is inspect.Parameter.empty,
        needs_reference=named.get("reference_logps") is inspect.Parameter.empty,
        **declared,
    )
