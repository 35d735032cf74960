"""Softmax statistics of logits whose vocabulary is cut into shards: a shard's part, and the whole.

A rank's part of a row is a few numbers; the parts of all ranks give the statistics of the row, by
the same formulas as `plad_fast.ops.impl.softmax_rows` and in the same accuracy, confident targets
included.

n rows, V columns of one shard, W shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plad_fast.ops.backend import Head, HeadOptions
from plad_fast.ops.impl.softmax_rows import SoftmaxStatistics, logits_
from plad_fast.ops.impl.workspace import Workspace
from plad_fast.ops.vocab_parallel.group import Shards

WIDTH = 3
"""Numbers of a part."""


def shard_part_(
    buffer: Tensor,  # (n, V): raw product on entry; exp(z - max z of the shard) on return
    columns: Tensor,  # (n,) of the targets in this shard; any column where another shard has it
    owned: Tensor,  # (n,) bool: the target is in this shard; its entry is 0 on return
    options: HeadOptions,
    bias: Tensor | None = None,  # (V,)
    tanh_slope: Tensor | None = None,  # (n, V), filled with d softcap / d argument
) -> Tensor:  # (n, 3)
    """Of every row: max, sum of exp(z - max) without the target, logit of the target or 0."""
    if not buffer.shape[1]:
        part = buffer.new_zeros(len(buffer), WIDTH)
        part[:, 0] = -torch.inf
        return part
    logits_(buffer, options, bias, tanh_slope)
    shard_max = buffer.amax(dim=1)
    column = columns.unsqueeze(1)
    target = buffer.gather(1, column).squeeze(1)
    # A shard may be masked as a whole: -inf less -inf would be no number.
    buffer.sub_(shard_max.where(shard_max != -torch.inf, 0).unsqueeze(1)).exp_()
    at_column = buffer.gather(1, column).squeeze(1)
    buffer.scatter_(1, column, at_column.where(~owned, 0).unsqueeze(1))
    rest = buffer.sum(dim=1)
    return torch.stack([shard_max, rest, target.where(owned, 0)], dim=1)


def whole_statistics(parts: Tensor) -> SoftmaxStatistics:  # (W, n, 3)
    """Statistics of the rows over the whole vocabulary. Shards are added in their order."""
    shard_max, rests, targets = parts.unbind(dim=2)
    row_max = shard_max.amax(dim=0)
    rest = ((shard_max - row_max).exp() * rests).sum(dim=0)
    centred_target = targets.sum(dim=0) - row_max
    sum_exp = rest + centred_target.exp()
    log_sum = torch.where(centred_target == 0, rest.log1p(), sum_exp.log())
    return SoftmaxStatistics(row_max, sum_exp, centred_target - log_sum, rest / sum_exp, None)


def seen_by_shard(
    whole: SoftmaxStatistics,
    part: Tensor,  # (n, 3)
) -> SoftmaxStatistics:
    """The sum of exponentials counted from the shard's own maximum, as its buffer is."""
    return whole._replace(sum_exp=whole.sum_exp * (whole.row_max - part[:, 0]).exp())


class ShardWorkspace(Workspace):
    """Logits of one rank's rows of the head; targets are those of the whole vocabulary.

    Args:
        shards: who holds which rows.
        together: all ranks call `forward` with the same rows, so they settle on a number of rows
            that fits all of their budgets. One collective of one number.
        others: as in `Workspace`, of the weight of this rank.
    """

    def __init__(
        self,
        head: Head,
        options: HeadOptions,
        num_rows: int,
        *,
        for_gradient: bool,
        shards: Shards,
        together: bool,
    ) -> None:
        super().__init__(head, options, num_rows, for_gradient=for_gradient)
        self.shards = shards
        # A part of a sum over the ranks, to be rounded after it.
        self.grad_hidden_dtype = self.products.dtype
        if together:
            self.rows = shards.smallest(self.rows, head[0].device)

    def part(
        self,
        hidden: Tensor,  # (n, D)
        targets: Tensor,  # (n,)
    ) -> Tensor:  # (n, 3)
        """This rank's part of the statistics of n <= rows tokens; see `shard_part_`."""
        buffer, slope = self._buffers(len(hidden))
        self.products.logits(hidden, out=buffer)
        columns, owned = self._columns(targets)
        return shard_part_(buffer, columns, owned, self.options, self.bias, slope)

    def forward(self, hidden: Tensor, targets: Tensor, entropy_order: int = 0) -> SoftmaxStatistics:
        """One collective."""
        assert not entropy_order
        part = self.part(hidden, targets)
        return seen_by_shard(whole_statistics(self.shards.gather(part)), part)

    def _columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:  # (n,), (n,) bool
        """Column of each target in this shard, and whether it has one there."""
        columns = targets - self.shards.start
        owned = (columns >= 0) & (columns < self.shards.rows)
        return columns.clamp(0, max(self.shards.rows - 1, 0)), owned
