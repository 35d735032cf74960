"""Losses of pairs whose sequences are more, or other, than y+ and y-.

B pairs in groups of K sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from plad_fast.checks import check_flag, check_number
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.registry import get_loss
from plad_fast.losses.terms import means
from plad_fast.losses.trl_options import Translated, translate_dpo

Loss = str | Callable[..., Tensor]


def translate_weighted_dpo(options: Mapping[str, Any]) -> Translated:
    """`translate_dpo` of all options but `ld_alpha` and `use_weighting`, which no loss of sequence
    sums can have.

    Raises:
        UsageError: as there; a value of these two that is none, has no effect, or fails in TRL.
    """
    share, weighted = options.get("ld_alpha"), options.get("use_weighting", False)
    check_flag("use_weighting", weighted)
    loss, given, sft_weight = translate_dpo({**options, "ld_alpha": None, "use_weighting": False})
    likelihood = get_loss(loss).is_likelihood
    if share is not None:
        check_number("ld_alpha", share)
        if not 0 <= share <= 1:
            raise UsageError(f"ld_alpha must lie in [0, 1], got {share}")
        if likelihood and share != 1:
            raise UsageError(f"ld_alpha={share} has no effect in TRL with loss_type 'sft' alone")
    if weighted and (likelihood or sft_weight):
        raise UsageError("use_weighting=True fails in TRL with loss_type 'sft'; leave one of them")
    return loss, given, sft_weight


def pair_losses(
    logps: Tensor,  # (B, 2)
    *,
    counts: Tensor,  # (B, 2)
    reference_logps: Tensor | None = None,  # (B, 2)
    name: Loss,
    options: Mapping[str, Any],
) -> Tensor:  # (B,)
    """A registered loss with its options."""
    objective = Objective(get_loss(name), 2, options)
    return objective.group_losses(logps, counts, reference_logps=reference_logps)


def with_prompt_nll(
    logps: Tensor,  # (B, 3): y+, y-, the prompt of y+
    *,
    counts: Tensor,  # (B, 3)
    name: Loss,
    options: Mapping[str, Any],
    nll_weight: Tensor,  # ()
) -> Tensor:  # (B,)
    """ORPO's: the regulariser is the likelihood of the prompt and y+ together."""
    losses = pair_losses(logps[:, :2], counts=counts[:, :2], name=name, options=options)
    return losses - nll_weight.to(logps.dtype) * (logps[:, 0] + logps[:, 2])


def length_desensitised(
    logps: Tensor,  # (B, 4): y+, its tail, y-, its tail
    *,
    counts: Tensor,  # (B, 4)
    reference_logps: Tensor,  # (B, 4)
    name: Loss,
    options: Mapping[str, Any],
    ld_alpha: float,
    nll_weight: Tensor,  # ()
) -> Tensor:  # (B,)
    """LD-DPO's, Liu et al. 2024, arXiv 2409.06411: what the longer response has more counts less.

    The regulariser, the likelihood of y+, counts every token alike.
    """
    losses = pair_losses(
        joined(logps, ld_alpha),
        counts=joined(counts, 1),
        reference_logps=joined(reference_logps, ld_alpha),
        name=name,
        options=options,
    )
    return losses - nll_weight.to(logps.dtype) * (logps[:, 0] + logps[:, 1])


def joined(
    parts: Tensor,  # (B, 4): y+, its tail, y-, its tail
    tail_share: float,
) -> Tensor:  # (B, 2)
    """Both sequences, of their tails a share."""
    return parts[:, ::2] + tail_share * parts[:, 1::2]


def policy_weights(
    aligned: Tensor,  # (B, 2), or (B, 4) with tails: sums over tokens of log p + H
    counts: Tensor,  # of the same shape
) -> Tensor:  # (B,)
    """WPO's weights of pairs, Zhou et al. 2024, arXiv 2406.11827, equation 2.

    The product of both sequences' exp(mean of log p + H), H a token's entropy of order 2: a token
    is compared with one drawn from the policy.
    """
    if aligned.shape[1] == 4:
        aligned, counts = joined(aligned, 1), joined(counts, 1)
    return means(aligned, counts).exp().prod(dim=1)
