"""The one-pass loss on a GPU: library products around row kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plad_fast.kernels import logits_rows
from plad_fast.kernels.segments import segment_sums
from plad_fast.ops.impl.products import Operand
from plad_fast.ops.impl.workspace import TokenStatistics, Workspace

_NO_TARGET = -1  # every row of a workspace counts


class KernelWorkspace(Workspace):
    """A workspace whose buffer keeps the raw products: one kernel reads them for the statistics,
    and one turns them into the operand of the next two products, compacting rows on the way.
    """

    keeps_slope = False
    _operands: Tensor | None = None

    def forward(
        self, hidden: Tensor, targets: Tensor, with_entropy: bool = False
    ) -> logits_rows.RowStatistics:
        buffer = self._buffer[: len(hidden)]
        self.products.logits(hidden, out=buffer)
        return logits_rows.logits_rows_forward(
            buffer, targets, **self._options, with_entropy=with_entropy
        )

    def gradient(
        self,
        targets: Tensor,
        statistics: TokenStatistics,
        grad_logprobs: Tensor,
        grad_lse: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Operand:
        assert isinstance(statistics, logits_rows.RowStatistics)
        count = len(targets) if order is None else len(order)
        bound = grad_logprobs.abs() if grad_lse is None else grad_logprobs.abs() + grad_lse.abs()
        scale = self.products.operand_scale(bound.max() * abs(self.spec.slope))
        buffer = self._buffer[: len(targets)]
        dtype = self.products.operand_dtype
        # In place of the logits where the dtype is theirs.
        out = self._buffer if dtype == buffer.dtype else self._operand_buffer(dtype)
        values = logits_rows.logits_rows_backward(
            buffer,
            targets,
            statistics.lse,
            statistics.tail,
            statistics.miss,
            grad_logprobs,
            grad_lse,
            **self._options,
            out=out[:count],
            rows=order,
            scale=scale,
        )
        return Operand(values, scale)

    def segment_sums(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        return segment_sums(values, cu_seqlens)

    def _operand_buffer(self, dtype: torch.dtype) -> Tensor:
        """Allocated when the first gradient is wanted, and kept."""
        if self._operands is None:
            self._operands = torch.empty_like(self._buffer, dtype=dtype)
        return self._operands

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "bias": self.bias,
            "softcap": self.spec.softcap,
            "logit_scale": self.spec.logit_scale,
            "temperature": self.spec.temperature,
            "ignore_index": _NO_TARGET,
        }
