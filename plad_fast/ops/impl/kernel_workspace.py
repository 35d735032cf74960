"""Scratch memory of the one-pass loss in kernels: raw products, and the operands made of them.

N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plad_fast.ops.backend import Head, HeadOptions, one_pass_scratch_bytes
from plad_fast.ops.impl.products import Operand, products_for
from plad_fast.ops.impl.two_phase import ALIGNED_ENTRIES, ALIGNED_ROWS
from plad_fast.ops.impl.workspace import BLOCK_SHARE, TokenStatistics, Workspace

if TYPE_CHECKING:
    from plad_fast.kernels.logits_rows import RowStatistics


class KernelWorkspace(Workspace):
    """A workspace whose buffer keeps the raw products: one kernel reads them for the statistics,
    and one turns them into the operand of the next two products, compacting rows on the way.

    An operand of 16 bits takes the first half of its float32 row, so that a logit has 4 bytes in
    all. Where the budget and the accumulator of a 16-bit weight's gradient together hold the
    logits of all rows, these are one chunk: the gradient is a single product, and needs no
    accumulator.

    Args:
        needs_weight: whether the gradient of the weight is wanted.
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
        needs_weight: bool,
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
        rounds = for_gradient and needs_weight and weight.dtype == torch.bfloat16
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

    def forward(self, hidden: Tensor, targets: Tensor, entropy_order: int = 0) -> RowStatistics:
        from plad_fast.kernels.logits_rows import logits_rows_forward

        buffer = self._buffer[: len(hidden)]
        self.products.logits(hidden, out=buffer)
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
        from plad_fast.kernels.logits_rows import RowStatistics, logits_rows_backward

        assert isinstance(statistics, RowStatistics)
        count = len(targets) if order is None else len(order)
        scale = None
        if self.products.scales_operands:
            bound = self.options.gradient_bound(grad_logprobs, grad_lse)
            scale = self.products.operand_scale(bound)
        memory = self._memory.view(self.products.operand_dtype)
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
            out=memory[:count, : self._buffer.shape[1]],
            rows=order,
            scale=scale,
            row_width=self._row_width,
        )
        return Operand(values, scale)

    def segment_sums(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        from plad_fast.kernels.segments import segment_sums

        return segment_sums(values, cu_seqlens)
