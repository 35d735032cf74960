"""The Triton backend: kernels that never store logits, library products for the gradients.

Two-phase: the forward keeps each token's lse; the backward recomputes logits a slice of the
vocabulary at a time, straight into the gradient of the logits, which two products then multiply on.
One pass: library products around row kernels. Kernels are imported where they run: Triton may be
missing.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plad_fast.losses.objective import Objective
from plad_fast.ops.backend import (
    Denominators,
    HeadGradient,
    HeadOptions,
    LinearProblem,
    LinearStatistics,
    Needs,
    Upstream,
)
from plad_fast.ops.impl import onepass
from plad_fast.ops.impl.products import Operand, products_for
from plad_fast.ops.impl.sliced_gradients import SlicedGradients, Tiling, balanced
from plad_fast.ops.impl.workspace import BLOCK_SHARE, TokenStatistics, Workspace

if TYPE_CHECKING:
    from plad_fast.kernels.logits_rows import RowStatistics

_OLDEST_TRITON = (3, 4)
_NO_TARGET = -1  # every row of a workspace counts
_TILE_OF_ROWS = 128  # of a library product


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


def linear_forward(
    problem: LinearProblem, length_normalization: float, entropy_order: int
) -> LinearStatistics:
    from plad_fast.kernels import launch
    from plad_fast.kernels.linear_forward import linear_forward as kernel

    *tensors, options = problem
    hidden = problem.hidden
    if len(hidden) and launch.uses_library(hidden, gradient=False):
        return _forward_by_library(problem, length_normalization, entropy_order)
    return LinearStatistics(
        *kernel(
            *tensors,
            **_logit_options(options),
            length_normalization=length_normalization,
            entropy_order=entropy_order,
        )
    )


def _forward_by_library(
    problem: LinearProblem, length_normalization: float, entropy_order: int
) -> LinearStatistics:
    """Logits in float32 of a chunk of rows at a time, as a softmax must not see them rounded."""
    from plad_fast.kernels.logits_rows import logits_rows_forward
    from plad_fast.kernels.segments import sequence_sums

    hidden, weight, bias, targets, cu_seqlens, options = problem
    scratch_bytes = options.scratch_on(hidden.device)
    block_bytes = scratch_bytes // BLOCK_SHARE
    products = products_for(weight, block_bytes)
    # The rows of an odd vocabulary, too, begin where vectors do.
    stride = -(-len(weight) // 64) * 64
    most = max(1, (scratch_bytes - block_bytes) // (stride * products.dtype.itemsize))
    rows = min(len(hidden), balanced(len(hidden), most, min(most, _TILE_OF_ROWS)))
    scratch = weight.new_empty(rows, stride, dtype=products.dtype)[:, : len(weight)]
    parts: list[Any] = []
    for start in range(0, len(hidden), rows):
        chunk = slice(start, min(start + rows, len(hidden)))
        logits = scratch[: chunk.stop - start]
        products.logits(hidden[chunk], out=logits)
        parts.append(
            logits_rows_forward(
                logits,
                targets[chunk],
                bias=bias,
                **_logit_options(options),
                entropy_order=entropy_order,
            )
        )
    logprobs, lse, tail, miss = (torch.cat(column) for column in list(zip(*parts, strict=True))[:4])
    entropy = torch.cat([part.entropy for part in parts]) if entropy_order else None
    sums, counts = sequence_sums(
        logprobs,
        targets,
        cu_seqlens,
        length_normalization=length_normalization,
        ignore_index=options.ignore_index,
    )
    return LinearStatistics(sums, counts, logprobs, lse, tail, miss, entropy)


def linear_backward(
    problem: LinearProblem,
    lse: Tensor,  # (N,)
    tail: Tensor,  # (N,)
    miss: Tensor,  # (N,)
    upstream: Upstream,
    needs: Needs,
    skip_inactive: bool,
) -> HeadGradient:
    from plad_fast.kernels import launch
    from plad_fast.kernels.linear_backward import logits_gradient

    hidden, weight, bias, targets, _, options = problem
    scratch_bytes = options.scratch_on(hidden.device)
    block_bytes = scratch_bytes // BLOCK_SHARE
    products = products_for(weight[:0], block_bytes)
    factors = launch.gradient_factors(tail, miss, *upstream)
    active_rows = factors.active.nonzero().squeeze(1) if skip_inactive else None
    if active_rows is not None and len(active_rows) == len(hidden):
        active_rows = None  # a view of all rows copies nothing
    tiling = Tiling.within(
        scratch_bytes - block_bytes,
        len(hidden) if active_rows is None else len(active_rows),
        len(weight),
        # A row has its gradient's sum over slices, and may have a copy of its hidden state.
        bytes_per_row=(products.dtype.itemsize + weight.dtype.itemsize) * weight.shape[1],
        bytes_per_logit=products.operand_dtype.itemsize,
    )
    scale = None
    if tiling.num_rows:
        scale = products.operand_scale(_bound(*upstream, options))
    scratch = weight.new_empty(tiling.rows, tiling.columns, dtype=products.operand_dtype)
    grads = SlicedGradients(problem.head, needs, tiling, block_bytes, scale)
    for block in tiling.blocks():
        rows: slice | Tensor = block if active_rows is None else active_rows[block]
        h, t, of_rows, factors_of_rows = hidden[rows], targets[rows], lse[rows], factors.take(rows)
        if not skip_inactive:
            # Whatever an ignored token holds, even if it is not finite, adds nothing.
            h = h.masked_fill((t == options.ignore_index)[:, None], 0)
        for columns in tiling.slices():
            d_logits = logits_gradient(
                h,
                weight[columns],
                None if bias is None else bias[columns],
                t,
                of_rows,
                factors_of_rows,
                **_logit_options(options),
                out=scratch[: len(h), : columns.stop - columns.start],
                first_column=columns.start,
                scale=scale,
            )
            grads.add(d_logits, h, block, columns)
        grads.finish_rows(rows)
    return grads.finish()


def linear_preference_loss(
    problem: LinearProblem,
    scores: Tensor | None,  # (S,)
    reference_logps: Tensor | None,  # (S,)
    objective: Objective,
    denominators: Denominators,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadGradient]:
    return onepass.linear_preference_loss(
        problem, scores, reference_logps, objective, denominators, needs, KernelWorkspace
    )


class KernelWorkspace(Workspace):
    """A workspace whose buffer keeps the raw products: one kernel reads them for the statistics,
    and one turns them into the operand of the next two products, compacting rows on the way.
    """

    keeps_slope = False
    keeps_wide = True
    _operands: Tensor | None = None

    def forward(self, hidden: Tensor, targets: Tensor, entropy_order: int = 0) -> RowStatistics:
        from plad_fast.kernels.logits_rows import logits_rows_forward

        buffer = self._buffer[: len(hidden)]
        self.products.logits(hidden, out=buffer)
        return logits_rows_forward(
            buffer, targets, bias=self.bias, **self._logit_options, entropy_order=entropy_order
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
        scale = self.products.operand_scale(_bound(grad_logprobs, grad_lse, self.options))
        buffer = self._buffer[: len(targets)]
        dtype = self.products.operand_dtype
        # In place of the logits where the dtype is theirs.
        out = self._buffer if dtype == buffer.dtype else self._operand_buffer(dtype)
        values = logits_rows_backward(
            buffer,
            targets,
            statistics.lse,
            statistics.tail,
            statistics.miss,
            grad_logprobs,
            grad_lse,
            bias=self.bias,
            **self._logit_options,
            out=out[:count],
            rows=order,
            scale=scale,
        )
        return Operand(values, scale)

    def segment_sums(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        from plad_fast.kernels.segments import segment_sums

        return segment_sums(values, cu_seqlens)

    def _operand_buffer(self, dtype: torch.dtype) -> Tensor:
        """Allocated when the first gradient is wanted, and kept."""
        if self._operands is None:
            self._operands = torch.empty_like(self._buffer, dtype=dtype)
        return self._operands

    @property
    def _logit_options(self) -> dict[str, Any]:
        return _logit_options(self.options._replace(ignore_index=_NO_TARGET))


def stored_forward(
    logits: Tensor, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from plad_fast.kernels.logits_rows import logits_rows_forward

    statistics = logits_rows_forward(
        logits, targets, bias=None, **_logit_options(options), entropy_order=0
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
        **_logit_options(options),
        out=torch.empty_like(logits),
        rows=None,
    )


def _bound(grad: Tensor, grad_lse: Tensor | None, options: HeadOptions) -> Tensor:  # ()
    """What no entry of the gradient of the raw products exceeds, in magnitude."""
    bound = grad.abs() if grad_lse is None else grad.abs() + grad_lse.abs()
    return bound.max() * abs(options.slope)


def _logit_options(options: HeadOptions) -> dict[str, Any]:
    return {
        "softcap": options.softcap,
        "logit_scale": options.logit_scale,
        "temperature": options.temperature,
        "ignore_index": options.ignore_index,
    }
