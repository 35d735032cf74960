"""A workspace over a shard of the vocabulary, whose statistics are those of the whole."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from plad_fast._vocab_group import Shards
from plad_fast._vocab_rows import as_seen_by_shard, shard_part_, whole_statistics
from plad_fast.logit_spec import LogitSpec
from plad_fast.softmax_rows import RowStatistics, logits_gradient_
from plad_fast.workspace import TokenStatistics, Workspace


class ShardStatistics(NamedTuple):
    """Of rows of logits."""

    whole: RowStatistics
    shard_max: Tensor  # (n,)

    @property
    def token_logprobs(self) -> Tensor:  # (n,)
        return self.whole.token_logprobs


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
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: LogitSpec,
        scratch_bytes: int,
        *,
        shards: Shards,
        together: bool,
        for_gradient: bool,
    ) -> None:
        super().__init__(hidden, weight, bias, spec, scratch_bytes, for_gradient=for_gradient)
        self.shards = shards
        # A part of a sum over the ranks, to be rounded after it.
        self.grad_hidden_dtype = self.products.dtype
        if together:
            self.rows = shards.smallest(self.rows, hidden.device)

    def part(
        self,
        hidden: Tensor,  # (n, D)
        targets: Tensor,  # (n,)
        with_entropy: bool = False,
    ) -> Tensor:  # (n, 3 or 5)
        """This rank's part of the statistics of n <= rows tokens; see `shard_part_`."""
        n = len(hidden)
        buffer = self._buffer[:n]
        self.products.logits(hidden, out=buffer)
        return shard_part_(
            buffer,
            *self._places(targets),
            self.spec,
            self.bias,
            None if self._slope is None else self._slope[:n],
            self.block_rows if with_entropy else 0,
        )

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor, with_entropy: bool = False
    ) -> ShardStatistics:
        """One collective."""
        part = self.part(hidden, targets, with_entropy)
        return ShardStatistics(whole_statistics(self.shards.gather(part)), part[:, 0])

    def gradient(
        self,
        targets: Tensor,
        statistics: TokenStatistics,
        grad_logprobs: Tensor,
        grad_lse: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(statistics, ShardStatistics)
        whole, shard_max = statistics
        if order is not None:
            self._keep_rows_(order)
            targets, grad_logprobs = targets[order], grad_logprobs[order]
            whole, shard_max = whole.take(order), shard_max[order]
            grad_lse = None if grad_lse is None else grad_lse[order]
        buffer = self._buffer[: len(targets)]
        if not buffer.shape[1]:
            return buffer
        columns, owned = self._places(targets)
        logits_gradient_(
            buffer,
            columns,
            self.spec,
            as_seen_by_shard(whole, shard_max),
            grad_logprobs,
            grad_lse,
            None if self._slope is None else self._slope[: len(targets)],
            owned,
        )
        return buffer

    def _places(self, targets: Tensor) -> tuple[Tensor, Tensor]:  # (n,), (n,) bool
        """Column of each target in this shard, and whether it has one there."""
        columns = targets - self.shards.start
        owned = (columns >= 0) & (columns < self.shards.rows)
        return columns.clamp(0, max(self.shards.rows - 1, 0)), owned
