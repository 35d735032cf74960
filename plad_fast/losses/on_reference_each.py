"""Losses that judge every response's own log-ratio to a reference, log (p / p_ref) = s - s_ref.

r is beta times a log-ratio. With several rejected responses a term of y- is the mean over them,
unless the docstring says otherwise.

BCO, Jung et al. 2024, arXiv 2404.04656. NCA, Chen et al. 2024, arXiv 2402.05369. SPPO, Wu et al.
2024, arXiv 2405.00675. APO, D'Oosterlinck et al. 2024, arXiv 2408.06266. KTO, Ethayarajh et al.
2024, arXiv 2402.01306.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plad_fast.checks import check_number
from plad_fast.errors import UsageError
from plad_fast.losses.registry import register_loss
from plad_fast.losses.terms import (
    check_group_size,
    check_not_negative,
    check_positive,
    logistic_loss,
    margins,
    mean_over_rejected,
)


@register_loss("bco_pair", always_active=True)
def bco_pair(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
) -> Tensor:  # (B,)
    """BCO of pairs: -log sigmoid(r(y+)) - log sigmoid(-r(y-)).

    Jung et al., section 4, with a reward shift of 0 as in TRL: the paper's is a running mean over
    batches.
    """
    rewards = _rewards(logps, reference_logps, beta)
    return logistic_loss(rewards[:, 0]) + mean_over_rejected(logistic_loss(-rewards[:, 1:]))


@register_loss("nca_pair", always_active=True)
def nca_pair(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
) -> Tensor:  # (B,)
    """NCA: -log sigmoid(r(y+)) - mean over all K responses of log sigmoid(-r(y)).

    Chen et al., section 4.1, with all preference on the first response.
    """
    rewards = _rewards(logps, reference_logps, beta)
    return logistic_loss(rewards[:, 0]) + logistic_loss(-rewards).mean(dim=1)


@register_loss("sppo_hard", always_active=True)
def sppo_hard(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
) -> Tensor:  # (B,)
    """SPPO: (g(y+) - 1 / (2 beta)) ** 2 + (g(y-) + 1 / (2 beta)) ** 2, g = s - s_ref.

    Wu et al., equation 4.7, where beta is 1 / eta and the preference is certain.
    """
    check_positive("beta", beta)
    check_group_size(logps, at_least=2)
    log_ratios = logps - reference_logps
    target = 1 / (2 * beta)
    return (log_ratios[:, 0] - target) ** 2 + mean_over_rejected((log_ratios[:, 1:] + target) ** 2)


@register_loss("apo_zero", always_active=True)
def apo_zero(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
) -> Tensor:  # (B,)
    """APO-zero: sigmoid(-r(y+)) + sigmoid(r(y-)): y+ up and y- down.

    D'Oosterlinck et al., equation 7: for chosen responses better than the model's own.
    """
    rewards = _rewards(logps, reference_logps, beta)
    return torch.sigmoid(-rewards[:, 0]) + mean_over_rejected(torch.sigmoid(rewards[:, 1:]))


@register_loss("apo_down", always_active=True)
def apo_down(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    beta: float = 0.1,
) -> Tensor:  # (B,)
    """APO-down: sigmoid(r(y+)) + sigmoid(r(y-) - r(y+)): both down, y- further.

    D'Oosterlinck et al., equation 8: for chosen responses worse than the model's own.
    """
    rewards = _rewards(logps, reference_logps, beta)
    gaps = margins(rewards)
    return torch.sigmoid(rewards[:, 0]) + mean_over_rejected(torch.sigmoid(-gaps))


@register_loss("kto", always_active=True)
def kto(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    scores: Tensor | None = None,  # (B, K)
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:  # (B,)
    """KTO: the mean over a group's responses of w (1 - sigmoid(± beta (s - s_ref - kl))).

    Ethayarajh et al., equation 7; + and `desirable_weight` for a desirable response, - and
    `undesirable_weight` for another. A response is desirable if its score is above 0, and without
    scores if it is the first of its group. Data without pairs are groups of one response, with
    scores of 1 and -1.

    `kl` is the paper's z_0, an estimate of the divergence from the reference, at least 0: the mean
    of s - s_ref over responses that belong to other prompts. That takes sequences of their own,
    which the loss does not have: compute it with `linear_sequence_logprobs` under `no_grad`, and
    pass a number or a tensor () without a graph. In a compiled graph, add a tensor to
    `reference_logps` and pass `kl=0`, which is the same. With `kl=0` alone it is TRL's
    `apo_zero_unpaired`.
    """
    check_positive("beta", beta)
    _check_kl(kl)
    for name, weight in (("desirable", desirable_weight), ("undesirable", undesirable_weight)):
        check_not_negative(f"{name}_weight", weight)
    if scores is None:
        if logps.shape[1] < 2:
            raise UsageError(
                "kto needs scores for groups of one response: above 0 for a desirable one"
            )
        desirable = torch.arange(logps.shape[1], device=logps.device) == 0
    else:
        desirable = scores > 0
    rewards = beta * (logps - reference_logps - kl)
    good = desirable_weight * torch.sigmoid(-rewards)
    bad = undesirable_weight * torch.sigmoid(rewards)
    return torch.where(desirable, good, bad).mean(dim=1)


def _rewards(
    logps: Tensor,  # (B, K)
    reference_logps: Tensor,  # (B, K)
    beta: float,
) -> Tensor:  # (B, K)
    check_positive("beta", beta)
    check_group_size(logps, at_least=2)
    return beta * (logps - reference_logps)


def _check_kl(kl: float | Tensor) -> None:
    if isinstance(kl, Tensor):
        if kl.ndim:
            raise UsageError(f"kl must be one number, got a tensor of shape {tuple(kl.shape)}")
        # Reading it would stall a GPU, and break a graph that is being traced.
        if kl.device.type != "cpu" or torch.compiler.is_compiling():
            return
        kl = kl.item()
    check_number("kl", kl)
    if not 0 <= kl < math.inf:
        raise UsageError(
            f"kl is an estimate of a divergence: a finite number of at least 0, got {kl}"
        )
