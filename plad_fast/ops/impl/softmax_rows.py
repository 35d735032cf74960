"""Softmax statistics of a chunk of logits, and the logits' gradient, both in place.

n rows of the chunk, V vocabulary. Everything is float32, or float64 for float64 input. The same
buffer is in turn: raw product -> logits z -> exp(z - max z) -> gradient of the raw product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plad_fast.ops.backend import HeadOptions

_CACHED_ENTRIES = 2**19
"""Logits that a CPU takes through all passes at a time, so that they stay in its cache."""


class SoftmaxStatistics(NamedTuple):
    """What of a row of logits survives the chunk it was computed in."""

    row_max: Tensor  # (n,)
    sum_exp: Tensor  # (n,) of exp(z - row_max)
    token_logprobs: Tensor  # (n,)
    miss: Tensor  # (n,) 1 - p(target)
    entropy: Tensor | None  # (n,), nat

    def take(self, rows: Tensor) -> SoftmaxStatistics:
        return SoftmaxStatistics(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


def softmax_rows_(
    buffer: Tensor,  # (n, V): raw product on entry, exp(z - max z) on return, 0 at the target
    targets: Tensor,  # (n,)
    options: HeadOptions,
    bias: Tensor | None = None,  # (V,)
    tanh_slope: Tensor | None = None,  # (n, V), filled with d softcap / d argument
    entropy_order: int = 0,
    block_rows: int = 1,
) -> SoftmaxStatistics:
    """Turn raw products into unnormalised probabilities and take each row's statistics.

    The entropy is Shannon's (order 1) or Renyi's of order 2, -log of the sum of squared
    probabilities; for both `block_rows` rows are copied at a time.

    log p(target) is (z_t - max) - log(sum of exp): for a confident target both terms are near 0
    and keep their digits, which the difference z_t - lse would lose.
    """
    rows = max(1, _CACHED_ENTRIES // max(buffer.shape[1], 1))
    if buffer.device.type != "cpu" or len(buffer) <= rows:
        return _softmax_block_(
            buffer, targets, options, bias, tanh_slope, entropy_order, block_rows
        )
    parts = [
        _softmax_block_(
            buffer[block],
            targets[block],
            options,
            bias,
            None if tanh_slope is None else tanh_slope[block],
            entropy_order,
            block_rows,
        )
        for block in (slice(i, i + rows) for i in range(0, len(buffer), rows))
    ]
    row_max, sum_exp, token_logprobs, miss, entropy = zip(*parts, strict=True)
    return SoftmaxStatistics(
        torch.cat(row_max),
        torch.cat(sum_exp),
        torch.cat(token_logprobs),
        torch.cat(miss),
        torch.cat(entropy) if entropy_order else None,
    )


def _softmax_block_(
    buffer: Tensor,
    targets: Tensor,
    options: HeadOptions,
    bias: Tensor | None,
    tanh_slope: Tensor | None,
    entropy_order: int,
    block_rows: int,
) -> SoftmaxStatistics:
    logits_(buffer, options, bias, tanh_slope)
    row_max = buffer.amax(dim=1)
    buffer.sub_(row_max.unsqueeze(1))
    centred_target = buffer.gather(1, targets.unsqueeze(1)).squeeze(1)
    moment = None
    if entropy_order:
        moment = exp_with_moment_(buffer, entropy_order, block_rows)
    else:
        buffer.exp_()
    column = targets.unsqueeze(1)
    at_target = buffer.gather(1, column).squeeze(1)
    rest = buffer.scatter_(1, column, 0.0).sum(dim=1)
    sum_exp = rest + at_target
    log_sum = torch.where(centred_target == 0, rest.log1p(), sum_exp.log())
    entropy = None
    if moment is not None:
        of_order_2 = entropy_order == 2
        entropy = 2 * log_sum - moment.log() if of_order_2 else log_sum - moment / sum_exp
    return SoftmaxStatistics(row_max, sum_exp, centred_target - log_sum, rest / sum_exp, entropy)


def logits_(
    buffer: Tensor,  # (n, V): raw product on entry, logits on return
    options: HeadOptions,
    bias: Tensor | None = None,  # (V,)
    tanh_slope: Tensor | None = None,  # (n, V), filled with d softcap / d argument
) -> None:
    """Turn raw products into logits."""
    if bias is not None:
        buffer.add_(bias)
    if options.softcap is None:
        if options.slope != 1:
            buffer.mul_(options.slope)
    else:
        buffer.mul_(options.logit_scale / options.softcap).tanh_()
        if tanh_slope is not None:
            torch.mul(buffer, buffer, out=tanh_slope).neg_().add_(1)
        buffer.mul_(options.softcap / options.temperature)


def exp_with_moment_(buffer: Tensor, entropy_order: int, block_rows: int) -> Tensor:  # (n,)
    """exp in place; returns what a row's entropy needs: for order 1 the sum of x exp(x), with 0 for
    x = -inf, for order 2 that of exp(x) ** 2.
    """
    moment = buffer.new_empty(buffer.shape[0])
    for start in range(0, buffer.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        if entropy_order == 2:
            moment[rows] = buffer[rows].exp_().square().sum(dim=1)
            continue
        logits = buffer[rows].clone()
        probabilities = buffer[rows].exp_()
        moment[rows] = torch.where(probabilities > 0, logits.mul_(probabilities), 0).sum(dim=1)
    return moment


def logits_gradient_(
    buffer: Tensor,  # (n, V): as softmax_rows_ left it; d raw product on return
    targets: Tensor,  # (n,)
    options: HeadOptions,
    statistics: SoftmaxStatistics,  # of the same rows
    grad_logprobs: Tensor,  # (n,)
    grad_lse: Tensor | None = None,  # (n,)
    tanh_slope: Tensor | None = None,  # (n, V)
    owned: Tensor | None = None,  # (n,) bool
) -> None:
    """d raw = slope * (g (onehot - p) + g_lse p), for any upstream g and g_lse.

    owned: rows whose target is a column of the buffer, which then holds a part of the vocabulary;
    None for all.
    """
    at_target = grad_logprobs * statistics.miss
    of_probability = -grad_logprobs
    if grad_lse is not None:
        at_target = at_target + grad_lse * (1 - statistics.miss)
        of_probability = of_probability + grad_lse
    buffer.mul_((of_probability / statistics.sum_exp).unsqueeze(1))
    column = targets.unsqueeze(1)
    if owned is not None:
        at_target = at_target.where(owned, buffer.gather(1, column).squeeze(1))
    buffer.scatter_(1, column, at_target.unsqueeze(1))
    if tanh_slope is not None:
        buffer.mul_(tanh_slope)
    if options.slope != 1:
        buffer.mul_(options.slope)
