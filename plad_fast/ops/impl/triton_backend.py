"""The Triton backend: kernels that never store all logits, library products for the gradients.

The op is in `two_phase`; the one pass has library products around row kernels. Kernels are imported
where they run: Triton may be missing.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plad_fast.losses.objective import Objective
from plad_fast.ops.backend import (
    Denominators,
    Head,
    HeadGradient,
    HeadOptions,
    LinearProblem,
    Needs,
    one_pass_scratch_bytes,
)
from plad_fast.ops.impl import onepass
from plad_fast.ops.impl.products import Operand, products_for
from plad_fast.ops.impl.two_phase import (
    ALIGNED_ENTRIES,
    ALIGNED_ROWS,
    linear_backward,
    linear_forward,
)
from plad_fast.ops.impl.workspace import BLOCK_SHARE, TokenStatistics, Workspace

if TYPE_CHECKING:
    from plad_fast.kernels.logits_rows import RowStatistics

__all__ = [
    "linear_backward",
    "linear_forward",
    "linear_preference_loss",
    "preferred",
    "stored_backward",
    "stored_forward",
    "unavailable",
]

_OLDEST_TRITON = (3, 4)
SKIPS_IGNORED = True


def unavailable(tensor: Tensor) -> str | None:
    """Triton, a GPU it compiles for, and a dtype of at most 32 bits are needed."""
    if reason := _missing():
        return reason
    if tensor.dtype == torch.float64:
        return "the kernels compute in float32; float64 is the torch backend's"
    if tensor.is_cuda and torch.version.hip:
        return "the kernels are not ready for ROCm"
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        if major < 8:
            return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0"
        return None
    if tensor.device.type != "cpu":
        return f"there are no kernels for {tensor.device.type} tensors"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
    return None


def preferred(tensor: Tensor) -> bool:
    """On a GPU; the interpreter only for those who name it."""
    return tensor.is_cuda


@functools.cache
def _missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton is {triton.__version__}; the kernels need {oldest} or newer"
    return None


def linear_preference_loss(
    problem: LinearProblem,
    scores: Tensor | None,  # (S,)
    reference_logps: Tensor | None,  # (S,)
    objective: Objective,
    denominators: Denominators,
    needs: Needs,
    bounds: Sequence[int] | None = None,  # (S + 1,)
) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadGradient]:
    return onepass.linear_preference_loss(
        problem,
        scores,
        reference_logps,
        objective,
        denominators,
        needs,
        bounds,
        functools.partial(KernelWorkspace, needs_weight=needs[1]),
    )


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

    def forward(self, hidden: Tensor, targets: Tensor, with_entropy: bool = False) -> RowStatistics:
        from plad_fast.kernels.logits_rows import logits_rows_forward

        buffer = self._buffer[: len(hidden)]
        self.products.logits(hidden, out=buffer)
        return logits_rows_forward(
            buffer,
            targets,
            bias=self.bias,
            **self.options.of_logits,
            with_entropy=with_entropy,
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
            scale = self.products.operand_scale(
                self.options.gradient_bound(grad_logprobs, grad_lse)
            )
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
            out=self._memory.view(self.products.operand_dtype)[:count, : self._buffer.shape[1]],
            rows=order,
            scale=scale,
            row_width=self._row_width,
        )
        return Operand(values, scale)

    def segment_sums(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        from plad_fast.kernels.segments import segment_sums

        return segment_sums(values, cu_seqlens)


def stored_forward(
    logits: Tensor, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from plad_fast.kernels.logits_rows import logits_rows_forward

    statistics = logits_rows_forward(
        logits, targets, bias=None, **options.of_logits, with_entropy=False
    )
    return statistics[:4]


def stored_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    tail: Tensor,
    miss: Tensor,
    grad: Tensor,
    options: HeadOptions,
) -> Tensor:
    from plad_fast.kernels.logits_rows import logits_rows_backward

    return logits_rows_backward(
        logits,
        targets,
        lse,
        tail,
        miss,
        grad.contiguous(),
        None,
        bias=None,
        **options.of_logits,
        out=torch.empty_like(logits),
        rows=None,
    )
