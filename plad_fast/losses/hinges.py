"""PLaD's and SLiC's losses: hinges on differences of log-likelihood, without a reference.

PLaD, Zhang et al. 2024, arXiv 2406.02886. SLiC, Zhao et al. 2022, arXiv 2210.00045. SLiC-HF, Zhao
et al. 2023, arXiv 2305.10425. At a hinge itself the gradient is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plad_fast.losses.registry import register_loss
from plad_fast.losses.terms import (
    check_group_size,
    check_not_negative,
    check_positive,
    chosen_and_rejected,
    margins,
    mean_over_rejected,
    power_rewards,
)


@register_loss("plad_ranking", sft_weight=1.0, length_normalization=1.0)
def plad_ranking(
    logps: Tensor,  # (B, K)
    *,
    beta: float = 1.0,
) -> Tensor:  # (B,)
    """Ranking calibration: max(0, beta - s(y+) + s(y-)).

    PLaD's ranking loss, of the form of SLiC's rank loss. With more than one rejected response it
    is the mean over them.
    """
    check_not_negative("beta", beta)
    first, others = chosen_and_rejected(logps)
    return mean_over_rejected(torch.relu(beta - first + others))


@register_loss("plad_margin", sft_weight=1.0, length_normalization=1.0)
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
    check_not_negative("beta", beta)
    gaps = beta * margins(scores)
    first, others = chosen_and_rejected(logps)
    return mean_over_rejected(torch.relu(gaps - first + others))


@register_loss("plad_listwise", sft_weight=1.0, length_normalization=1.0)
def plad_listwise(
    logps: Tensor,  # (B, K)
    *,
    beta: float = 1.0,
) -> Tensor:  # (B,)
    """Listwise ranking: sum over i < j of max(0, beta (j - i) - s(y_i) + s(y_j)).

    SLiC's list rank loss over K candidates that lie in order, best first.
    """
    check_not_negative("beta", beta)
    check_group_size(logps, at_least=2)
    better, worse = torch.triu_indices(
        logps.shape[1], logps.shape[1], offset=1, device=logps.device
    )
    margins = beta * (worse - better).to(logps.dtype)
    return torch.relu(margins - logps[:, better] + logps[:, worse]).sum(dim=1)


@register_loss("slic", sft_weight=1.0)
def slic(
    logps: Tensor,  # (B, K)
    *,
    beta: float = 1.0,
    delta: float = 1.0,
    alpha: float = 0.0,
) -> Tensor:  # (B,)
    """SLiC: max(0, delta - beta (s(y+) - s(y-))).

    SLiC-HF's calibration loss (section 2), where beta is 1; its regulariser, the likelihood of the
    best response, is `sft_weight`. With delta = 1 it is CPO's `hinge` of TRL. `alpha` other than 0
    has AlphaPO's reward (1 - p ** -alpha) / alpha in place of s. The mean over the rejected
    responses if they are many.
    """
    check_positive("beta", beta)
    check_not_negative("delta", delta)
    return mean_over_rejected(torch.relu(delta - beta * margins(power_rewards(logps, alpha))))
