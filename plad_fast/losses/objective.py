"""A loss bound to its options: from the sums of sequences to the number that is minimised.

B groups of K responses to one prompt, best first; S = B * K sequences.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plad_fast.checks import check_group_size, check_length_normalization, check_weight
from plad_fast.errors import UsageError
from plad_fast.losses.registry import LossSpec, get_loss, read_loss_args
from plad_fast.losses.terms import per_length

_probed: weakref.WeakKeyDictionary[Any, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()
"""By function: the options, group sizes and devices that it was probed with."""


@dataclass(frozen=True)
class Objective:
    """A loss bound to its options: sequence sums in, the number to minimise out.

    value = sum of group losses / num_groups + sft_weight * sum of NLL(y+) / num_tokens

    For a loss whose mean is over tokens the first denominator is `num_tokens` too. The second
    term is SLiC's regulariser (section 2.3).
    """

    spec: LossSpec
    group_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    sft_weight: float = 0.0
    length_normalization: float = 0.0

    @classmethod
    def bind(
        cls,
        loss: str | Callable[..., Tensor],
        *,
        group_size: int,
        sft_weight: float | None = None,
        length_normalization: float | None = None,
        has_scores: bool,
        has_reference: bool = False,
        device: torch.device | str = "cpu",
        options: Mapping[str, Any],
    ) -> Objective:
        """Check names, options and, unless a graph is being traced, shapes: by calls on two groups
        of random numbers, once for a function with its options.

        Args:
            sft_weight, length_normalization: None for the loss's own, see `LossSpec`.

        Raises:
            UsageError: unknown loss or option, missing scores or reference, negative weights, or
                a function that does not return one number per group, each group on its own.
        """
        spec = get_loss(loss)
        spec.check_options(options)
        if spec.needs_scores and not has_scores:
            raise UsageError(
                f"loss {spec.name!r} needs scores: one number per sequence, higher is better"
            )
        if spec.needs_reference_for(options) and not has_reference:
            raise UsageError(
                f"loss {spec.name!r} needs reference_logps: the log-probability of each sequence "
                "under the reference model (plad_fast.training.reference_logps computes them)"
            )
        check_group_size(group_size)
        sft_weight, length_normalization = spec.terms(sft_weight, length_normalization)
        check_weight("sft_weight", sft_weight)
        check_length_normalization(length_normalization)
        objective = cls(spec, group_size, options, sft_weight, length_normalization)
        if not torch.compiler.is_compiling():
            objective._probe_once(torch.device(device))
        return objective

    @property
    def needs_reference(self) -> bool:
        return self.spec.needs_reference_for(self.options)

    @property
    def beta(self) -> float | Tensor:
        """What a log-ratio to the reference is multiplied by: 1 for a loss without a beta."""
        beta = self.options.get("beta", self.spec.options.get("beta"))
        return 1.0 if beta is None else beta

    @property
    def always_active(self) -> bool:
        """See `LossSpec`; and the likelihood of responses that are all the best of their groups."""
        return self.spec.always_active or (self.spec.is_likelihood and self.group_size == 1)

    def _probe_once(self, device: torch.device) -> None:
        """On a GPU a probe waits for the device, which a step should not."""
        function: Any = self.spec.fn
        bound: tuple[Any, ...] = ()
        if type(function) is functools.partial:
            function, bound = function.func, (function.args, function.keywords)
        options = _frozen((bound, self.options))
        if not isinstance(function, types.FunctionType) or options is None:
            self._probe(device)
            return
        known = _probed.setdefault(function, set())
        case = device, self.group_size, self.length_normalization, options
        if case not in known:
            self._probe(device)
            known.add(case)

    def _probe(self, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        # Where the generator is: torch's default device may be another.
        drawn: dict[str, Any] = {"size": (2, self.group_size), "generator": draw, "device": "cpu"}
        sums = -5 * torch.rand(**drawn).to(device)
        scores = torch.rand(**drawn).to(device)
        counts = torch.randint(1, 9, **drawn).to(device)
        reference = -5 * torch.rand(**drawn).to(device)
        tensors = sums, counts, scores, reference
        try:
            both = self.group_losses(*tensors)
            parts = [self.group_losses(*(tensor[[i]] for tensor in tensors)) for i in (0, 1)]
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"loss {self.spec.name!r} failed on two groups of {self.group_size} random "
                f"log-probabilities: {error}"
            ) from error
        if not torch.allclose(both, torch.cat(parts), atol=1e-4, equal_nan=True):
            raise UsageError(
                f"loss {self.spec.name!r} gives a group another value when it is alone; a loss "
                "must treat groups independently, since chunks of them are evaluated apart"
            )

    def group_losses(
        self,
        sums: Tensor,  # (B, K), plain sums of token log-probabilities
        counts: Tensor,  # (B, K)
        scores: Tensor | None = None,  # (B, K)
        reference_logps: Tensor | None = None,  # (B, K), plain sums
        lengths: Tensor | None = None,  # (B, K)
    ) -> Tensor:  # (B,)
        """The loss of every group, without the regulariser.

        lengths: counts, and 1 in place of 0; None if the caller has not made them.
        """
        alpha = self.length_normalization if self.spec.length_normalized else 0.0
        if alpha and lengths is None:
            lengths = counts.clamp(min=1)
        if reference_logps is not None:
            reference_logps = per_length(reference_logps, lengths, alpha)
        given: dict[str, Any] = {
            **{"counts": counts, "scores": scores, "reference_logps": reference_logps},
            "length_normalization": self.length_normalization,
        }
        logps = per_length(sums, lengths, alpha)
        if logps is sums:  # which is not the function's to work in
            logps = sums.clone()
        losses = self.spec.fn(logps, **{k: given[k] for k in self.spec.takes}, **self.options)
        expected = logps.shape[:1]
        is_tensor = isinstance(losses, Tensor)
        if not is_tensor or losses.shape != expected or not losses.is_floating_point():
            got = f"{tuple(losses.shape)} of {losses.dtype}" if is_tensor else type(losses).__name__
            raise UsageError(
                f"loss {self.spec.name!r} must return one number per group: for {len(logps)} "
                f"groups the shape {tuple(expected)}, got {got}"
            )
        return losses

    def denominators(
        self,
        counts: Tensor,  # (B, K)
        num_groups: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
    ) -> tuple[float | Tensor, float | Tensor]:
        """What the group losses and the regulariser are divided by; 1 in place of 0.

        The numbers given have passed `plad_fast.ops.validation.check_denominators`.
        """
        groups = _denominator(len(counts) if num_groups is None else num_groups)
        if not (self.sft_weight or self.spec.is_likelihood):
            return groups, 1  # which nothing is divided by
        tokens = _denominator(counts[:, 0].sum() if num_tokens is None else num_tokens)
        return (tokens if self.spec.is_likelihood else groups), tokens

    def value(
        self,
        group_losses: Tensor,  # (B,)
        sums: Tensor,  # (B, K)
        denominators: tuple[float | Tensor, float | Tensor],
    ) -> Tensor:  # ()
        """The number to minimise."""
        loss = group_losses.sum() / denominators[0]
        if self.sft_weight:
            loss = loss - self.sft_weight * sums[:, 0].sum() / denominators[1]
        return loss.to(sums.dtype)


def check_settings(
    loss: str, settings: Mapping[str, Any], flag: Callable[[str], str] = str
) -> None:
    """Refuse settings of a loss that are wrong whatever the data: names, values, idle terms.

    Args:
        settings: any of `beta`, `loss_args`, `sft_weight`, `length_normalization` and
            `rank_end_token`, or None.
        flag: a setting's name as the user writes it.
    """
    spec, beta = get_loss(loss), settings.get("beta")
    if beta is not None and "beta" not in spec.options:
        raise UsageError(f"{flag('loss')} {loss} has no beta; leave {flag('beta')} out")
    for name in ("sft_weight", "length_normalization", "rank_end_token"):
        if spec.is_likelihood and settings.get(name):
            raise UsageError(
                f"{flag(name)} has no part in {flag('loss')} {loss}, which is the likelihood "
                "itself; leave it out"
            )
    options = read_loss_args(loss, settings.get("loss_args"), beta=beta) or {}
    if beta is not None:
        options["beta"] = beta
    Objective.bind(loss, group_size=2, has_scores=True, has_reference=True, options=options)


def refuse_outside_gradients(losses: Tensor, leaf: Tensor) -> None:
    """Raise a UsageError if the losses depend on another tensor than `leaf` that wants a gradient.

    A loss whose gradients are made chunk by chunk during the forward cannot give it one.
    """
    pending, seen = [losses.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf:
            raise UsageError(
                "the loss function uses a tensor that requires a gradient; the one-pass loss "
                "differentiates by the log-probabilities only: use preference_loss on "
                "linear_sequence_logprobs, or detach that tensor"
            )
        pending += [parent for parent, _ in node.next_functions]


def _frozen(value: Any) -> str | None:
    """A text that is the same for equal options; None if one may change without it."""
    if value is None or isinstance(value, int | float | str):
        return repr(value)
    if isinstance(value, Tensor) and not value.ndim:  # whose value a GPU would have to be asked for
        return f"{value.dtype} {value.device}"
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: repr(item[0]))
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    else:
        return None
    frozen = [(repr(key), _frozen(item)) for key, item in items]
    return None if any(text is None for _, text in frozen) else repr((type(value), frozen))


def _denominator(count: float | Tensor) -> float | Tensor:
    if not isinstance(count, Tensor):
        return count or 1
    # A wide float: an integer tensor would turn the weight it divides into float32.
    wide = torch.float32 if count.device.type == "mps" else torch.float64
    return torch.where(count > 0, count, 1).to(wide)
