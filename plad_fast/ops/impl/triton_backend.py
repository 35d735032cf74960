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
from collections.abc import Sequence
from typing import Any

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
from plad_fast.ops.impl.kernel_workspace import KernelWorkspace, largest_entry, logit_options
from plad_fast.ops.impl.products import products_for
from plad_fast.ops.impl.sliced_gradients import SlicedGradients, Tiling, balanced
from plad_fast.ops.impl.workspace import BLOCK_SHARE

_OLDEST_TRITON = (3, 4)
_TILE_OF_ROWS = 128  # of a library product

TAKES_IGNORED = True


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
    problem: LinearProblem, length_normalization: float, with_entropy: bool
) -> LinearStatistics:
    from plad_fast.kernels import launch
    from plad_fast.kernels.linear_forward import linear_forward as kernel

    *tensors, options = problem
    hidden = problem.hidden
    if len(hidden) and launch.uses_library(hidden, gradient=False):
        return _forward_by_library(problem, length_normalization, with_entropy)
    return LinearStatistics(
        *kernel(
            *tensors,
            **logit_options(options),
            length_normalization=length_normalization,
            with_entropy=with_entropy,
        )
    )


def _forward_by_library(
    problem: LinearProblem, length_normalization: float, with_entropy: bool
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
                **logit_options(options),
                with_entropy=with_entropy,
                row_width=stride,
            )
        )
    logprobs, lse, tail, miss = (torch.cat(column) for column in list(zip(*parts, strict=True))[:4])
    entropy = torch.cat([part.entropy for part in parts]) if with_entropy else None
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
        scale = products.operand_scale(largest_entry(*upstream, options))
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
                **logit_options(options),
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
    counts: Tensor | None = None,  # (S,)
    bounds: Sequence[int] | None = None,  # (S + 1,)
) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadGradient]:
    return onepass.linear_preference_loss(
        problem,
        scores,
        reference_logps,
        objective,
        denominators,
        needs,
        counts,
        bounds,
        functools.partial(KernelWorkspace, needs_weight=needs[1]),
    )


def stored_forward(
    logits: Tensor, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from plad_fast.kernels.logits_rows import logits_rows_forward

    statistics = logits_rows_forward(
        logits, targets, bias=None, **logit_options(options), with_entropy=False
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
        **logit_options(options),
        out=torch.empty_like(logits),
        rows=None,
    )
