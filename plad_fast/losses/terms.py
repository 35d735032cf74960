"""Terms that losses share, checks of their options, and sums over ragged sequences.

B groups of K responses each, best first. N tokens of S sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from plad_fast.errors import UsageError

MAX_EXPONENT = 80.0
"""Where what grows exponentially ends: e ** 80 is still a float32."""
MAX_SQUARED_EXPONENT = 40.0
"""And so is the square of e ** 40."""
NEAREST_TO_ONE = 2.0**-23
"""float32's epsilon, for every dtype: they agree on a response that is certain or empty."""

_SMALLEST_ALPHA = 1e-20
"""Below this the power is the logarithm to the last bit, and could be 0 in float32."""

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""Their names are TRL's, of `f_divergence_type`."""


def margins(
    rewards: Tensor,  # (B, K)
) -> Tensor:  # (B, K - 1)
    """How much more the chosen response is worth than each of the rejected ones."""
    chosen, rejected = chosen_and_rejected(rewards)
    return chosen - rejected


def chosen_and_rejected(
    values: Tensor,  # (B, K)
) -> tuple[Tensor, Tensor]:  # (B, 1), (B, K - 1)
    """The best response and the rest. Two slices in their place would be differentiated into two
    tensors of zeros and a sum."""
    check_group_size(values, at_least=2)
    chosen, rejected = values.split((1, values.shape[1] - 1), dim=1)
    return chosen, rejected


def divergence_rewards(
    ratios: Tensor,  # (B, K), log (p / p_ref)
    f_divergence: str,
    f_alpha: float,
    max_exponent: float = MAX_EXPONENT,
) -> Tensor:  # (B, K)
    """f'(p / p_ref) of the divergence by which the policy is held to the reference.

    f-DPO, Wang et al. 2023, arXiv 2309.16240, less constants, which cancel in a difference: f'(u)
    is log u for reverse_kl (DPO itself), 1 - 1 / u for forward_kl, log (2 u / (1 + u)) for
    js_divergence and (u ** (f_alpha - 1) - 1) / (f_alpha - 1) for alpha_divergence, where f_alpha
    is TRL's: 1 less the paper's. Exponents end at `max_exponent`, and there the gradient.
    """
    if not -math.inf < f_alpha < math.inf:
        raise UsageError(f"f_alpha is an order and must be a finite number, got {f_alpha}")
    if f_divergence == "reverse_kl":
        return ratios
    if f_divergence == "forward_kl":
        return -torch.expm1((-ratios).clamp(max=max_exponent))
    if f_divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratios)
    if f_divergence == "alpha_divergence":
        power = f_alpha - 1
        if abs(power) < 1e-6:
            return ratios
        return torch.expm1((power * ratios).clamp(max=max_exponent)) / power
    raise UsageError(f"unknown f_divergence {f_divergence!r}; known: {', '.join(F_DIVERGENCES)}")


def power_rewards(
    logps: Tensor,  # (B, K)
    alpha: float,
    max_exponent: float = MAX_EXPONENT,
) -> Tensor:  # (B, K)
    """(1 - p ** -alpha) / alpha, and log p for alpha = 0.

    AlphaPO, Gupta et al. 2025, arXiv 2501.03884, which takes it of means over tokens. Of sums it
    soon is too large for any number: exponents end at `max_exponent`, and there the gradient.
    """
    if not -math.inf < alpha < math.inf:  # torch.compile does not know math.isfinite
        raise UsageError(f"alpha shapes the reward and must be a finite number, got {alpha}")
    if abs(alpha) < _SMALLEST_ALPHA:
        return logps
    return -torch.expm1((-alpha * logps).clamp(max=max_exponent)) / alpha


def means(
    sums: Tensor,  # (B, K)
    counts: Tensor,  # (B, K)
) -> Tensor:  # (B, K)
    """Means over tokens; an empty sequence stays 0."""
    return sums / counts.clamp(min=1)


def mean_over_rejected(
    values: Tensor,  # (B, K - 1), of all responses but the first
) -> Tensor:  # (B,)
    """Of a pair's only one it is the value itself, for which a GPU need not be called."""
    return values.squeeze(1) if values.shape[1] == 1 else values.mean(dim=1)


def logistic_loss(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid of each, a share of it taken the other way round; of the shape of `logits`."""
    check_share(label_smoothing)
    right = -(1 - label_smoothing) * F.logsigmoid(logits)
    return right - label_smoothing * F.logsigmoid(-logits) if label_smoothing else right


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{name} must be positive and finite, got {value}")


def check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UsageError(f"{name} must be a finite number of at least 0, got {value}")


def check_share(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise UsageError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")


def check_group_size(logps: Tensor, at_least: int) -> None:
    if logps.ndim != 2 or logps.shape[1] < at_least:
        raise UsageError(
            f"this loss compares responses: it needs groups of {at_least} or more sequences, "
            f"got log-probabilities of shape {tuple(logps.shape)}"
        )


def segment_sums(
    values: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """values[cu_seqlens[i] : cu_seqlens[i + 1]].sum() for every i; 0 for an empty sequence.

    The addition runs in float64: there are N terms only, and the result does not depend on how a
    sequence was cut into chunks.
    """
    if len(cu_seqlens) == 1:
        return values[:0]
    wide = values if values.device.type == "mps" else values.double()  # MPS has no float64
    return torch.segment_reduce(wide, "sum", offsets=cu_seqlens, initial=0).to(values.dtype)


def segment_counts(
    keep: Tensor,  # (N,) bool
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,) int64
    """How many of keep[cu_seqlens[i] : cu_seqlens[i + 1]] are set, for every i."""
    before = torch.nn.functional.pad(keep.long().cumsum(0), (1, 0))[cu_seqlens]
    return before.diff()


def length_normalized(
    sums: Tensor,  # (S,)
    counts: Tensor,  # (S,)
    alpha: float,
) -> Tensor:  # (S,)
    """sums / counts ** alpha; an empty sequence stays 0."""
    return per_length(sums, counts.clamp(min=1) if alpha else None, alpha)


def per_length(
    sums: Tensor,  # (S,) or (B, K)
    lengths: Tensor | None,  # of the same shape, 1 or more; may be None if alpha is 0
    alpha: float,
) -> Tensor:  # of the same shape
    """sums / lengths ** alpha."""
    if alpha == 0:
        return sums
    assert lengths is not None
    return sums / (lengths if alpha == 1 else lengths.to(sums.dtype) ** alpha)
