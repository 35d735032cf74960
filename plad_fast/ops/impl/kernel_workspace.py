"""Scratch memory of the one-pass loss in kernels: raw products, and the operands made of them.

In bfloat16 one kernel reads the raw products, and leaves values in their place of which the logits'
gradient is a multiple, row by row: see `plad_fast.kernels.exponential_rows`. float16, whose numbers
end too soon for that, float32 and a wanted gradient of the bias take two: the raw products are read
for the statistics, and again to be turned into the gradient.

N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plad_fast.ops.backend import Head, HeadOptions, Needs, one_pass_scratch_bytes, sent
from plad_fast.ops.impl.products import Operand, products_for
from plad_fast.ops.impl.two_phase import ALIGNED_ENTRIES, ALIGNED_ROWS
from plad_fast.ops.impl.workspace import BLOCK_SHARE, TokenStatistics, Workspace, moves

if TYPE_CHECKING:
    from plad_fast.kernels.exponential_rows import ExponentialRows
    from plad_fast.kernels.logits_rows import RowStatistics


class KernelWorkspace(Workspace):
    """A workspace whose operands take the place of the raw products that they are made of.

    An operand of 16 bits takes the first half of its float32 row, so that a logit has 4 bytes in
    all. Where the budget and the accumulator of a 16-bit weight's gradient together hold the
    logits of all rows, these are one chunk: the gradient is a single product, and needs no
    accumulator.

    Args:
        needs: which gradients are wanted.
        others: as in `Workspace`.
    """

    keeps_wide = True
    balances = True
    reading_waits = True

    def __init__(
        self,
        head: Head,
        options: HeadOptions,
        num_rows: int,
        *,
        for_gradient: bool,
        needs: Needs,
    ) -> None:
        hidden, weight, self.bias = head
        self.options = options
        vocab, width = weight.shape
        scratch_bytes = options.scratch_bytes or one_pass_scratch_bytes(hidden.device, vocab, width)
        block_bytes = scratch_bytes // BLOCK_SHARE
        self.products = products_for(weight, block_bytes)
        dtype = self.products.dtype
        self._row_width = -(-vocab // ALIGNED_ENTRIES) * ALIGNED_ENTRIES
        # Beside its logits a row has a copy of its hidden state, and its gradient in float32.
        bytes_per_row = self._row_width * dtype.itemsize
        bytes_per_row += width * (dtype.itemsize + weight.dtype.itemsize)
        # float16 keeps float32 until backward: a loss scale comes only with the upstream.
        rounds = for_gradient and needs[1] and weight.dtype == torch.bfloat16
        accumulator_bytes = vocab * width * dtype.itemsize if rounds else 0
        if num_rows * bytes_per_row <= scratch_bytes + accumulator_bytes:
            self.rows = max(1, num_rows)
            self.grad_weight_dtype = weight.dtype if rounds else None
        else:
            rows = (scratch_bytes - block_bytes) // bytes_per_row
            self.rows = max(1, rows // ALIGNED_ROWS * ALIGNED_ROWS or rows)
        self._memory = weight.new_empty(self.rows, self._row_width, dtype=dtype)
        self._buffer = self._memory[:, :vocab]
        self._slope = None
        self._operands = self._memory.view(self.products.operand_dtype)[:, :vocab]
        self._exponentials = for_gradient and weight.dtype == torch.bfloat16 and not needs[2]

    def forward(
        self, hidden: Tensor, targets: Tensor, entropy_order: int = 0
    ) -> RowStatistics | ExponentialRows:
        from plad_fast.kernels.exponential_rows import exponential_rows
        from plad_fast.kernels.logits_rows import logits_rows_forward

        buffer = self._buffer[: len(hidden)]
        self.products.logits(hidden, out=buffer)
        if self._exponentials:
            assert not entropy_order
            return exponential_rows(
                buffer,
                targets,
                bias=self.bias,
                **self.options.of_logits,
                out=self._operands[: len(hidden)],
                row_width=self._row_width,
            )
        return logits_rows_forward(
            buffer,
            targets,
            bias=self.bias,
            **self.options.of_logits,
            entropy_order=entropy_order,
            row_width=self._row_width,
        )

    def gradient(
        self,
        targets: Tensor,
        statistics: TokenStatistics,
        grad_logprobs: Tensor,
        grad_lse: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Operand:
        from plad_fast.kernels.exponential_rows import ExponentialRows, move_rows_
        from plad_fast.kernels.logits_rows import RowStatistics, logits_rows_backward

        count = len(targets) if order is None else len(order)
        rows = None if order is None else sent(order, targets.device)
        if isinstance(statistics, ExponentialRows):
            assert grad_lse is None
            of_rows = (grad_logprobs, statistics.factor)
            if order is not None:
                of_rows = (of_rows[0][rows], of_rows[1][rows])
                move_rows_(self._operands, *sent(torch.stack(moves(order)), targets.device))
            return Operand(self._operands[:count], of_rows=of_rows)
        assert isinstance(statistics, RowStatistics)
        scale = None
        if self.products.scales_operands:
            bound = self.options.gradient_bound(grad_logprobs, grad_lse)
            scale = self.products.operand_scale(bound)
        values = logits_rows_backward(
            self._buffer[: len(targets)],
            targets,
            statistics.lse,
            statistics.tail,
            statistics.miss,
            grad_logprobs,
            grad_lse,
            bias=self.bias,
            **self.options.of_logits,
            out=self._operands[:count],
            rows=rows,
            scale=scale,
            row_width=self._row_width,
        )
        return Operand(values, scale)

    # In one launch each.

    def segment_sums(self, values: Tensor, cu_seqlens: Tensor, origin: int) -> Tensor:
        from plad_fast.kernels.segments import segment_sums

        return segment_sums(values, cu_seqlens, origin)

    def expand_segments(
        self, values: Tensor, cu_seqlens: Tensor, origin: int, num_tokens: int
    ) -> Tensor:
        from plad_fast.kernels.segments import expand_segments

        return expand_segments(values, cu_seqlens, origin, num_tokens)

    @staticmethod
    def scale_rows(
        factors: tuple[Tensor, Tensor],
        rows: Tensor | slice,
        product: tuple[Tensor, Tensor] | None,
        hidden: tuple[Tensor, Tensor] | None,
    ) -> None:
        from plad_fast.kernels.exponential_rows import scale_rows

        if product is None:
            if hidden is not None:
                scale_rows(*factors, hidden)
        elif isinstance(rows, slice):
            scale_rows(*factors, (product[0], product[1][rows]), hidden)
        else:
            scale_rows(*factors, product, hidden, rows=rows)
