"""Losses of the difference between two responses' log-ratios to a reference.

A log-ratio is log (p / p_ref) = s - s_ref, and d that of y+ less that of y-. An `f_divergence`
other than "reverse_kl" holds the policy to the reference by another divergence than DPO's: in place
of a log-ratio stands f'(p / p_ref), see `plad_fast.losses.terms.divergence_rewards`. `f_alpha` is
the order of "alpha_divergence".

With more than one rejected response each is the mean over the pairs that the first response forms
with each of the others.

DPO, Rafailov et al. 2023, arXiv 2305.18290. RSO, Liu et al. 2023, arXiv 2309.06657. IPO, Azar et
al. 2023, arXiv 2310.12036. Robust DPO, Chowdhury et al. 2024, arXiv 2403.00409. EXO, Ji et al.
2024, arXiv 2402.00856. DiscoPOP, Lu et al. 2024, arXiv 2406.08414.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from plad_fast.errors import UsageError
from plad_fast.losses.registry import register_loss
from plad_fast.losses.terms import (
    MAX_SQUARED_EXPONENT,
    check_positive,
    check_share,
    divergence_rewards,
    logistic_loss,
    margins,
    mean_over_rejected,
    means,
)


@register_loss("dpo", always_active=True)
def dpo(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:  # (B,)
    """DPO: -log sigmoid(beta d), d = (s - s_ref)(y+) - (s - s_ref)(y-).

    Rafailov et al., equation 7. `label_smoothing` is the share of preferences taken to be the
    wrong way round, in [0, 0.5): each pair then counts that much for the other order too (Mitchell
    2023, "A note on DPO with noisy preferences", cDPO).
    """
    gaps = _scaled_gaps(logps - reference_logps, beta, f_divergence, f_alpha)
    return mean_over_rejected(logistic_loss(gaps, label_smoothing))


@register_loss("dpo_robust", always_active=True)
def dpo_robust(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:  # (B,)
    """Robust DPO: ((1 - e) L(d) - e L(-d)) / (1 - 2 e), L the loss of `dpo`, e label_smoothing.

    Chowdhury et al., section 3.1: unbiased where a share e of the preferences, in [0, 0.5), has
    been flipped. It can be negative.
    """
    gaps = _scaled_gaps(logps - reference_logps, beta, f_divergence, f_alpha)
    check_share(label_smoothing)
    right = (1 - label_smoothing) * logistic_loss(gaps)
    return mean_over_rejected(
        (right - label_smoothing * logistic_loss(-gaps)) / (1 - 2 * label_smoothing)
    )


@register_loss("dpo_hinge")
def dpo_hinge(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:  # (B,)
    """Hinge on DPO's margin: max(0, 1 - beta d), d as in `dpo`.

    RSO, Liu et al., section 2: SLiC's loss on normalised likelihoods. At the hinge itself the
    gradient is 0.
    """
    gaps = _scaled_gaps(logps - reference_logps, beta, f_divergence, f_alpha)
    return mean_over_rejected(torch.relu(1 - gaps))


@register_loss("ipo", length_normalized=False, length_normalization=1.0, always_active=True)
def ipo(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    counts: Tensor,  # (B, K)
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:  # (B,)
    """IPO: (d - 1 / (2 beta)) ** 2, d as in `dpo` but of log-ratios a token.

    Azar et al., equation 17, where beta is called tau. The paper does not speak of means; TRL
    normalises so, whose authors had it confirmed by the paper's. They are taken here whatever
    the caller's length normalisation.
    """
    check_positive("beta", beta)
    ratios = logps - reference_logps
    rewards = divergence_rewards(ratios, f_divergence, f_alpha, MAX_SQUARED_EXPONENT)
    gaps = margins(means(rewards, counts))
    return mean_over_rejected((gaps - 1 / (2 * beta)) ** 2)


@register_loss("dpo_norm", length_normalized=False, length_normalization=1.0, always_active=True)
def dpo_norm(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    counts: Tensor,  # (B, K)
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:  # (B,)
    """`dpo` of log-ratios divided by the number of tokens: TRL's `sigmoid_norm`.

    The length-normalised DPO of Tulu 3, Lambert et al. 2024, arXiv 2411.15124. For DPO's own
    divergence it is `dpo` with a length normalisation of 1, and is so whatever the caller's.
    """
    check_positive("beta", beta)
    rewards = divergence_rewards(logps - reference_logps, f_divergence, f_alpha)
    return mean_over_rejected(logistic_loss(beta * margins(means(rewards, counts))))


@register_loss("exo_pair", always_active=True)
def exo_pair(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:  # (B,)
    """EXO of pairs: KL(q || p) of q = sigmoid(beta d) and p = 1 - label_smoothing for y+.

    Ji et al., equation 16: the reverse of the divergence that `dpo` with this label smoothing
    minimises. label_smoothing lies in (0, 0.5).
    """
    if not 0 < label_smoothing < 0.5:
        raise UsageError(f"label_smoothing must lie in (0, 0.5), got {label_smoothing}")
    gaps = _scaled_gaps(logps - reference_logps, beta, f_divergence, f_alpha)
    right = torch.sigmoid(gaps) * (F.logsigmoid(gaps) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-gaps) * (F.logsigmoid(-gaps) - math.log(label_smoothing))
    return mean_over_rejected(right + wrong)


@register_loss("discopop", always_active=True)
def discopop(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
    tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:  # (B,)
    """DiscoPOP: (1 - w) (-log sigmoid(beta d)) + w exp(-beta d), w = sigmoid(beta d / tau).

    Lu et al., equation 5 (log-ratio modulated loss). tau lies in (0, 1]: above 1 the exponential
    would win where it explodes.
    """
    if not 0 < tau <= 1:
        raise UsageError(f"tau is the softness of a switch and must lie in (0, 1], got {tau}")
    gaps = _scaled_gaps(logps - reference_logps, beta, f_divergence, f_alpha)
    logistic = torch.sigmoid(-gaps / tau) * logistic_loss(gaps)
    # In one exponent: apart, infinity would meet 0.
    exponential = torch.exp(F.logsigmoid(gaps / tau) - gaps)
    return mean_over_rejected(logistic + exponential)


def _scaled_gaps(
    ratios: Tensor,  # (B, K)
    beta: float,
    f_divergence: str,
    f_alpha: float,
) -> Tensor:  # (B, K - 1)
    check_positive("beta", beta)
    return beta * margins(divergence_rewards(ratios, f_divergence, f_alpha))
