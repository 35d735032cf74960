"""Losses without a reference beside the hinges, and plain fine-tuning.

`label_smoothing` is the share of preferences taken to be the wrong way round, in [0, 0.5). `alpha`
other than 0 has AlphaPO's reward (1 - p ** -alpha) / alpha in place of log p, see
`plad_fast.losses.terms.power_rewards`. The regulariser of CPO and ORPO, the likelihood of the
best responses, is `sft_weight`.

With more than one rejected response each is the mean over the pairs that the first response forms
with each of the others.

SimPO, Meng et al. 2024, arXiv 2405.14734. CPO, Xu et al. 2024, arXiv 2401.08417. ORPO, Hong et al.
2024, arXiv 2403.07691.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plad_fast.losses.registry import register_loss
from plad_fast.losses.terms import (
    MAX_SQUARED_EXPONENT,
    NEAREST_TO_ONE,
    check_not_negative,
    check_positive,
    logistic_loss,
    margins,
    mean_over_rejected,
    means,
    power_rewards,
)


@register_loss("cpo", sft_weight=1.0, always_active=True)
def cpo(
    logps: Tensor,  # (B, K)
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:  # (B,)
    """CPO: -log sigmoid(beta (s(y+) - s(y-))).

    Xu et al., equation 3, its preference term: DPO's with a uniform reference. The whole objective
    has `sft_weight=1` beside it, and TRL's `cpo_alpha` is that weight.
    """
    check_positive("beta", beta)
    logits = beta * margins(power_rewards(logps, alpha))
    return mean_over_rejected(logistic_loss(logits, label_smoothing))


@register_loss("cpo_ipo", length_normalized=False, length_normalization=1.0, always_active=True)
def cpo_ipo(
    logps: Tensor,  # (B, K)
    *,
    counts: Tensor,  # (B, K)
    beta: float = 0.1,
    alpha: float = 0.0,
) -> Tensor:  # (B,)
    """`ipo` without a reference: (s(y+) / |y+| - s(y-) / |y-| - 1 / (2 beta)) ** 2.

    CPO's `ipo` of TRL. The means are taken whatever the caller's length normalisation.
    """
    check_positive("beta", beta)
    rewards = power_rewards(means(logps, counts), alpha, MAX_SQUARED_EXPONENT)
    gaps = margins(rewards)
    return mean_over_rejected((gaps - 1 / (2 * beta)) ** 2)


@register_loss("simpo", length_normalized=False, length_normalization=1.0, always_active=True)
def simpo(
    logps: Tensor,  # (B, K)
    *,
    counts: Tensor,  # (B, K)
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:  # (B,)
    """SimPO: -log sigmoid(beta (s(y+) / |y+| - s(y-) / |y-|) - gamma).

    Meng et al., equation 6. The means are taken whatever the caller's length normalisation.
    """
    check_positive("beta", beta)
    check_not_negative("gamma", gamma)
    logits = beta * margins(power_rewards(means(logps, counts), alpha)) - gamma
    return mean_over_rejected(logistic_loss(logits, label_smoothing))


@register_loss(
    "orpo", length_normalized=False, sft_weight=1.0, length_normalization=1.0, always_active=True
)
def orpo(
    logps: Tensor,  # (B, K)
    *,
    counts: Tensor,  # (B, K)
    beta: float = 0.1,
) -> Tensor:  # (B,)
    """ORPO's odds ratio: -beta log sigmoid(o(y+) - o(y-)), o = log (p / (1 - p)).

    Hong et al., equations 4 and 7, where p = exp(s / |y|) and beta is called lambda. The whole
    objective (equation 6) has `sft_weight=1` beside it: the likelihood of the responses, where TRL
    takes that of their prompts too. The means are taken whatever the caller's length
    normalisation. Within float32's rounding of p = 1 the odds end, and their gradient with them.
    """
    check_not_negative("beta", beta)
    average = means(logps, counts).clamp(max=-NEAREST_TO_ONE)
    log_odds = average - torch.log(-torch.expm1(average))
    return beta * mean_over_rejected(logistic_loss(margins(log_odds)))


@register_loss("sft", mean_over="tokens", length_normalized=False)
def sft(
    logps: Tensor,  # (B, K)
) -> Tensor:  # (B,)
    """Negative log-likelihood of each group's first response: sequence-level distillation.

    Kim and Rush 2016, arXiv 1606.07947, equation 5. The mean is over tokens, as everywhere.
    """
    return -logps[:, 0]
