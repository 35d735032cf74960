"""Softmax statistics of logits whose vocabulary is cut into shards: a shard's part, and the whole.

A rank's part of a row is a few numbers; the parts of all ranks give the statistics of the row, by
the same formulas as `plad_fast.softmax_rows` and in the same accuracy, confident targets included.

n rows, V columns of one shard, W shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plad_fast.logit_spec import LogitSpec
from plad_fast.softmax_rows import RowStatistics, exp_with_expectation_, logits_

_WIDTH = 3
_WIDTH_WITH_ENTROPY = 5


def shard_part_(
    buffer: Tensor,  # (n, V): raw product on entry; exp(z - max z of the shard) on return
    columns: Tensor,  # (n,) of the targets in this shard; any column where another shard has it
    owned: Tensor,  # (n,) bool: the target is in this shard; its entry is 0 on return
    spec: LogitSpec,
    bias: Tensor | None = None,  # (V,)
    tanh_slope: Tensor | None = None,  # (n, V), filled with d softcap / d argument
    entropy_rows: int = 0,
) -> Tensor:  # (n, 3), or (n, 5) with entropy
    """Of every row: max, sum of exp(z - max) without the target, logit of the target or 0, and
    with entropy the sum of (z - max) exp(z - max) and of exp(z - max), target included.
    """
    if not buffer.shape[1]:
        part = buffer.new_zeros(len(buffer), _WIDTH_WITH_ENTROPY if entropy_rows else _WIDTH)
        part[:, 0] = -torch.inf
        return part
    logits_(buffer, spec, bias, tanh_slope)
    shard_max = buffer.amax(dim=1)
    column = columns.unsqueeze(1)
    target = buffer.gather(1, column).squeeze(1)
    # A shard may be masked as a whole: -inf less -inf would be no number.
    buffer.sub_(shard_max.where(shard_max != -torch.inf, 0).unsqueeze(1))
    more = []
    if entropy_rows:
        more = [exp_with_expectation_(buffer, entropy_rows), buffer.sum(dim=1)]
    else:
        buffer.exp_()
    at_column = buffer.gather(1, column).squeeze(1)
    buffer.scatter_(1, column, at_column.where(~owned, 0).unsqueeze(1))
    rest = buffer.sum(dim=1)
    return torch.stack([shard_max, rest, target.where(owned, 0), *more], dim=1)


def whole_statistics(parts: Tensor) -> RowStatistics:  # (W, n, 3 or 5)
    """Statistics of the rows over the whole vocabulary. Shards are added in their order."""
    shard_max, rests, targets, *more = parts.unbind(dim=2)
    row_max = shard_max.amax(dim=0)
    weights = (shard_max - row_max).exp()
    rest = (weights * rests).sum(dim=0)
    centred_target = targets.sum(dim=0) - row_max
    sum_exp = rest + centred_target.exp()
    log_sum = torch.where(centred_target == 0, rest.log1p(), sum_exp.log())
    entropy = None
    if more:
        expected, totals = more
        distance = (shard_max - row_max).where(weights > 0, 0)
        entropy = log_sum - (weights * (expected + distance * totals)).sum(dim=0) / sum_exp
    return RowStatistics(row_max, sum_exp, centred_target - log_sum, rest / sum_exp, entropy)


def as_seen_by_shard(
    statistics: RowStatistics,
    shard_max: Tensor,  # (n,)
) -> RowStatistics:
    """The sum of exponentials counted from the shard's own maximum, as its buffer is."""
    return statistics._replace(sum_exp=statistics.sum_exp * (statistics.row_max - shard_max).exp())
