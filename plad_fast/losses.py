"""Preference losses: pure functions from sequence log-likelihoods to one number per group.

A group is the K responses to one prompt, best first: the teacher's answer, then the student's.
B groups. `logps` holds s(y) = sum_t log p(y_t | x, y_<t) in nats, divided by |y| ** alpha when
length normalisation is on; `reference_logps` holds the same under a reference model, s_ref(y).

A new loss is one function under `@register_loss`. Its first argument is `logps` (B, K); it may
ask for `scores`, `counts` or `reference_logps`, (B, K) each, by naming them; its other keyword
arguments are its options. It returns one loss per group, (B,), and must treat groups
independently: the one-pass loss calls it on some groups at a time.

References: PLaD, Zhang et al. 2024, arXiv 2406.02886. SLiC, Zhao et al. 2022, arXiv 2210.00045.
DPO, Rafailov et al. 2023, arXiv 2305.18290. RSO, Liu et al. 2023, arXiv 2309.06657. IPO, Azar et
al. 2023, arXiv 2310.12036. SimPO, Meng et al. 2024, arXiv 2405.14734.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plad_fast.errors import UsageError

_TENSOR_ARGUMENTS = ("scores", "counts", "reference_logps")
# Arguments of the ops: an option of this name would never reach the loss.
_RESERVED = {
    *("hidden", "weight", "bias", "targets", "cu_seqlens", "loss", "group_size", "sft_weight"),
    *("softcap", "logit_scale", "temperature", "length_normalization", "ignore_index"),
    *("num_groups", "num_tokens", "impl", "scratch_bytes"),
}


@dataclass(frozen=True)
class LossSpec:
    """A loss function with what its signature says of it."""

    name: str
    fn: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Option names with their default values; `inspect.Parameter.empty` means required."""
    takes: tuple[str, ...] = ()
    """Which of `scores`, `counts` and `reference_logps` the function has a parameter for."""
    needs_scores: bool = False
    """`scores` has no default."""
    needs_reference: bool = False
    """`reference_logps` has no default."""
    mean_over: str = "groups"
    """`groups`, or `tokens` of the groups' first sequences: what the sum is divided by."""
    length_normalized: bool = True
    """False: the function always gets plain sums, whatever the caller's length normalisation."""


_REGISTRY: dict[str, LossSpec] = {}


def register_loss(
    name: str, *, mean_over: str = "groups", length_normalized: bool = True
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a loss function known under `name`; see the module's docstring for its form."""
    assert mean_over in ("groups", "tokens")

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _REGISTRY:
            raise ValueError(f"a loss named {name!r} is registered already")
        _REGISTRY[name] = _spec_of(name, fn, mean_over, length_normalized)
        return fn

    return register


def available() -> list[str]:
    """Names that `get_loss` knows, sorted."""
    return sorted(_REGISTRY)


def get_loss(loss: str | Callable[..., Tensor]) -> LossSpec:
    """The registered loss of that name, or a description of the caller's own function.

    Raises:
        UsageError: unknown name; the message lists the known ones.
    """
    if callable(loss):
        return _spec_of(getattr(loss, "__name__", "custom"), loss, "groups", True)
    if loss not in _REGISTRY:
        raise UsageError(f"unknown loss {loss!r}; known losses: {', '.join(available())}")
    return _REGISTRY[loss]


def read_loss_args(
    loss: str, given: Mapping[str, Any] | str | None, *, beta: float | None = None
) -> dict[str, Any] | None:
    """Options of a loss from a mapping or from JSON text; None stays None.

    Args:
        loss: registered name.
        given: names and values; the values are checked when the loss is bound to them.
        beta: set apart from these.

    Raises:
        UsageError: not a mapping, an option that the loss lacks, or beta set twice.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise UsageError(
                f'loss_args must be a JSON object such as {{"gamma": 0.5}}, got {given!r}'
            ) from None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UsageError(f"loss_args must map names of options to values, got {given!r}")
    if "beta" in given and beta is not None:
        raise UsageError("beta is set both by itself and in loss_args; set it once")
    options = get_loss(loss).options
    for name in given:
        if name not in options:
            known = ", ".join(options) or "none"
            raise UsageError(f"loss {loss!r} has no option {name!r}; it has: {known}")
    return dict(given)


def _spec_of(
    name: str, fn: Callable[..., Tensor], mean_over: str, length_normalized: bool
) -> LossSpec:
    try:
        parameters = list(inspect.signature(fn).parameters.values())[1:]
    except ValueError:
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
        options={key: value for key, value in named.items() if key not in _TENSOR_ARGUMENTS},
        takes=tuple(key for key in named if key in _TENSOR_ARGUMENTS),
        needs_scores=named.get("scores") is inspect.Parameter.empty,
        needs_reference=named.get("reference_logps") is inspect.Parameter.empty,
        mean_over=mean_over,
        length_normalized=length_normalized,
    )


@register_loss("plad_ranking")
def plad_ranking(
    logps: Tensor,  # (B, K)
    *,
    beta: float = 1.0,
) -> Tensor:  # (B,)
    """Ranking calibration: max(0, beta - s(y+) + s(y-)).

    PLaD's ranking loss, of the form of SLiC's rank loss. With more than one rejected response it
    is the mean over them. At the hinge itself the gradient is 0.
    """
    _check_beta(beta)
    _check_group_size(logps, at_least=2)
    chosen, rejected = logps[:, :1], logps[:, 1:]
    return torch.relu(beta - chosen + rejected).mean(dim=1)


@register_loss("plad_margin")
def plad_margin(
    logps: Tensor,  # (B, K)
    *,
    scores: Tensor,  # (B, K)
    beta: float = 1.0,
) -> Tensor:  # (B,)
    """Margin calibration: max(0, beta (q(y+) - q(y-)) - s(y+) + s(y-)).

    PLaD's margin loss, of the form of SLiC's margin loss; q is a score of the text (a reward
    model, ROUGE to a reference, a judge). The mean over the rejected responses if they are many.
    """
    _check_beta(beta)
    _check_group_size(logps, at_least=2)
    gaps = beta * (scores[:, :1] - scores[:, 1:])
    return torch.relu(gaps - logps[:, :1] + logps[:, 1:]).mean(dim=1)


@register_loss("plad_listwise")
def plad_listwise(
    logps: Tensor,  # (B, K)
    *,
    beta: float = 1.0,
) -> Tensor:  # (B,)
    """Listwise ranking: sum over i < j of max(0, beta (j - i) - s(y_i) + s(y_j)).

    SLiC's list rank loss over K candidates that lie in order, best first.
    """
    _check_beta(beta)
    _check_group_size(logps, at_least=2)
    better, worse = torch.triu_indices(
        logps.shape[1], logps.shape[1], offset=1, device=logps.device
    )
    margins = beta * (worse - better).to(logps.dtype)
    return torch.relu(margins - logps[:, better] + logps[:, worse]).sum(dim=1)


@register_loss("dpo")
def dpo(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:  # (B,)
    """DPO: -log sigmoid(beta d), d = (s - s_ref)(y+) - (s - s_ref)(y-).

    Rafailov et al., equation 7. `label_smoothing` is the share of preferences taken to be the
    wrong way round, in [0, 0.5): each pair then counts that much for the other order too (Mitchell
    2023, "A note on DPO with noisy preferences", cDPO). With more than one rejected response it is
    the mean over the pairs that the first response forms with each of the others.
    """
    _check_strength(beta)
    gaps = beta * _reference_gaps(logps, reference_logps)
    return _smoothed(gaps, label_smoothing).mean(dim=1)


@register_loss("dpo_hinge")
def dpo_hinge(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
) -> Tensor:  # (B,)
    """Hinge on DPO's margin: max(0, 1 - beta d), d as in `dpo`.

    RSO, Liu et al., section 2: SLiC's loss on normalised likelihoods. With more than one rejected
    response it is the mean over the pairs that the first response forms with each of the others.
    At the hinge itself the gradient is 0.
    """
    _check_strength(beta)
    return torch.relu(1 - beta * _reference_gaps(logps, reference_logps)).mean(dim=1)


@register_loss("ipo", length_normalized=False)
def ipo(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    counts: Tensor,  # (B, K)
    beta: float = 0.1,
) -> Tensor:  # (B,)
    """IPO: (d - 1 / (2 beta)) ** 2, d as in `dpo` but with means over tokens in place of sums.

    Azar et al., equation 17, where beta is called tau. The paper does not speak of means; TRL
    normalises so, whose authors had it confirmed by the paper's. They are taken here whatever
    the caller's length normalisation. With more than one rejected response it is the mean over
    the pairs that the first response forms with each of the others.
    """
    _check_strength(beta)
    lengths = counts.clamp(min=1)
    gaps = _reference_gaps(logps / lengths, reference_logps / lengths)
    return ((gaps - 1 / (2 * beta)) ** 2).mean(dim=1)


@register_loss("simpo", length_normalized=False)
def simpo(
    logps: Tensor,  # (B, K)
    *,
    counts: Tensor,  # (B, K)
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:  # (B,)
    """SimPO: -log sigmoid(beta (s(y+) / |y+| - s(y-) / |y-|) - gamma).

    Meng et al., equation 6; no reference model. `label_smoothing` as in `dpo`. The means are taken
    whatever the caller's length normalisation. With more than one rejected response it is the mean
    over the pairs that the first response forms with each of the others.
    """
    if not beta > 0:
        raise UsageError(f"beta scales the difference of log-likelihood, above 0, got {beta}")
    if not gamma >= 0:
        raise UsageError(f"gamma is a margin of log-odds and must be at least 0, got {gamma}")
    _check_group_size(logps, at_least=2)
    means = logps / counts.clamp(min=1)
    odds = beta * (means[:, :1] - means[:, 1:]) - gamma
    return _smoothed(odds, label_smoothing).mean(dim=1)


@register_loss("sft", mean_over="tokens", length_normalized=False)
def sft(
    logps: Tensor,  # (B, K)
) -> Tensor:  # (B,)
    """Negative log-likelihood of each group's first response: sequence-level distillation.

    Kim and Rush 2016, arXiv 1606.07947, equation 5. The mean is over tokens, as everywhere.
    """
    return -logps[:, 0]


def _reference_gaps(
    logps: Tensor,  # (B, K)
    reference_logps: Tensor,  # (B, K)
) -> Tensor:  # (B, K - 1)
    """How much more the first response gained on the reference than each of the others."""
    _check_group_size(logps, at_least=2)
    ratios = logps - reference_logps
    return ratios[:, :1] - ratios[:, 1:]


def _smoothed(odds: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid of each, a share of it taken the other way round; of the shape of `odds`."""
    if not 0 <= label_smoothing < 0.5:
        raise UsageError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    # -log sigmoid(x) = softplus(-x)
    return (1 - label_smoothing) * F.softplus(-odds) + label_smoothing * F.softplus(odds)


def _check_strength(beta: float) -> None:
    if not beta > 0:
        raise UsageError(f"beta is how firmly the reference holds and must be positive, got {beta}")


def _check_beta(beta: float) -> None:
    if not beta >= 0:
        raise UsageError(f"beta is a margin of log-likelihood and must be at least 0, got {beta}")


def _check_group_size(logps: Tensor, at_least: int) -> None:
    if logps.ndim != 2 or logps.shape[1] < at_least:
        raise UsageError(
            f"this loss compares responses: it needs groups of {at_least} or more sequences, "
            f"got log-probabilities of shape {tuple(logps.shape)}"
        )
