"""The op on kernels: a forward that keeps each token's lse, and a backward that starts from it.

Logits stay in registers, or pass through memory in float32 a chunk of rows or of columns at a time,
as `launch.uses_library` says. The backward makes the gradient of the logits of a slice of the
vocabulary, and two library products multiply on. Kernels are imported where they run: Triton may be
missing.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plad_fast.ops.backend import HeadGradient, LinearProblem, LinearStatistics, Needs, Upstream
from plad_fast.ops.impl.products import Products, products_for
from plad_fast.ops.impl.sliced_gradients import SlicedGradients, Tiling, balanced
from plad_fast.ops.impl.workspace import BLOCK_SHARE

ALIGNED_ENTRIES = 64
"""A multiple of what kernels and products of a library read at once, in every dtype."""
ALIGNED_ROWS = 128
_NO_TARGET = -(2**31)  # wherever the columns are counted from


def linear_forward(problem: LinearProblem, entropy_order: int) -> LinearStatistics:
    from plad_fast.kernels import launch
    from plad_fast.kernels.linear_forward import launch_linear_forward

    hidden, weight, bias, targets, _, options = problem
    if len(hidden) and launch.uses_library(hidden, gradient=False):
        return _forward_by_library(problem, entropy_order)
    statistics = launch_linear_forward(
        hidden, weight, bias, targets, **options.of_logits, entropy_order=entropy_order
    )
    return LinearStatistics(*statistics)


def _forward_by_library(problem: LinearProblem, entropy_order: int) -> LinearStatistics:
    """Logits in float32 of a chunk of rows at a time, as a softmax must not see them rounded."""
    from plad_fast.kernels.logits_rows import logits_rows_forward

    hidden, weight, bias, targets, _, options = problem
    scratch_bytes = options.scratch_on(hidden.device)
    block_bytes = scratch_bytes // BLOCK_SHARE
    products = products_for(weight, block_bytes)
    # Rows begin where vectors do, whatever the vocabulary is.
    stride = -(-len(weight) // ALIGNED_ENTRIES) * ALIGNED_ENTRIES
    most = max(1, (scratch_bytes - block_bytes) // (stride * products.dtype.itemsize))
    rows = min(len(hidden), balanced(len(hidden), most, min(most, ALIGNED_ROWS)))
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
                **options.of_logits,
                entropy_order=entropy_order,
                row_width=stride,
            )
        )
    *columns, entropies = zip(*parts, strict=True)
    logprobs, lse, tail, miss = map(torch.cat, columns)
    entropy = torch.cat(entropies) if entropy_order else None
    return LinearStatistics(logprobs, lse, tail, miss, entropy)


class _Tokens(NamedTuple):
    """Rows that have a gradient, (n,) each but for hidden."""

    hidden: Tensor  # (n, D)
    targets: Tensor
    lse: Tensor
    tail: Tensor
    miss: Tensor
    grad_logprobs: Tensor
    grad_lse: Tensor | None

    def take(self, rows: slice | Tensor) -> _Tokens:
        return _Tokens._make(None if x is None else x[rows] for x in self)


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

    hidden, weight, bias, targets, _, options = problem
    scratch_bytes = options.scratch_on(hidden.device)
    block_bytes = scratch_bytes // BLOCK_SHARE
    products = products_for(weight[:0], block_bytes)
    make: Callable[..., Tensor] = _gradient_by_kernel
    dtype = products.operand_dtype
    if launch.uses_library(hidden, gradient=True):
        make, dtype = _gradient_by_library, products.dtype
    active_rows = upstream.active().nonzero().squeeze(1) if skip_inactive else None
    if active_rows is not None and len(active_rows) == len(hidden):
        active_rows = None  # a view of all rows copies nothing
    tiling = Tiling.within(
        scratch_bytes - block_bytes,
        len(hidden) if active_rows is None else len(active_rows),
        len(weight),
        # A row has its gradient's sum over slices, and may have a copy of its hidden state.
        bytes_per_row=(products.dtype.itemsize + weight.dtype.itemsize) * weight.shape[1],
        bytes_per_logit=dtype.itemsize,
    )
    scale = None
    if tiling.num_rows and products.scales_operands:
        scale = products.operand_scale(options.gradient_bound(*upstream))
    # A CPU's product with AMX reads on behind the end of a row, and takes it times 0.
    allocate = weight.new_zeros if weight.device.type == "cpu" else weight.new_empty
    memory = allocate(tiling.rows, tiling.columns, dtype=dtype)
    grads = SlicedGradients(problem.head, needs, tiling, scale)
    of_tokens = _Tokens(hidden, targets, lse, tail, miss, *upstream)
    for block in tiling.blocks():
        rows: slice | Tensor = block if active_rows is None else active_rows[block]
        tokens = of_tokens.take(rows)
        if not skip_inactive:
            # Whatever an ignored token holds, even if it is not finite, adds nothing.
            ignored = tokens.targets == options.ignore_index
            tokens = tokens._replace(hidden=tokens.hidden.masked_fill(ignored[:, None], 0))
        for columns in tiling.slices():
            products = products_for(weight[columns], block_bytes)
            d_logits = make(
                products,
                None if bias is None else bias[columns],
                tokens,
                columns.start,
                memory,
                scale=scale,
                **options.of_logits,
            )
            grads.add(d_logits, tokens.hidden, block, columns, products)
        grads.finish_rows(rows)
    return grads.finish()


def _gradient_by_kernel(
    products: Products,  # of the weights of a slice
    bias: Tensor | None,  # (columns,)
    tokens: _Tokens,
    first_column: int,
    memory: Tensor,  # (n or more, columns or more), in the dtype of an operand
    **options: Any,
) -> Tensor:  # (n, columns)
    from plad_fast.kernels.linear_backward import logits_gradient

    hidden, *rest = tokens
    out = memory[: len(hidden), : len(products.weight)]
    return logits_gradient(
        hidden, products.weight, bias, *rest, **options, out=out, first_column=first_column
    )


def _gradient_by_library(
    products: Products,
    bias: Tensor | None,
    tokens: _Tokens,
    first_column: int,
    memory: Tensor,  # (n or more, columns or more), in the dtype of a product's sums
    **options: Any,
) -> Tensor:
    """In the first part of the rows of logits."""
    from plad_fast.kernels.logits_rows import logits_rows_backward

    hidden, targets, *rest = tokens
    count, columns = len(hidden), len(products.weight)
    logits = memory[:count, :columns]
    products.logits(hidden, out=logits)
    # An ignored token has an upstream gradient of 0, and a target that must not be another's here.
    options["ignore_index"] = _NO_TARGET
    return logits_rows_backward(
        logits,
        targets - first_column,
        *rest,
        bias=bias,
        **options,
        out=memory.view(products.operand_dtype)[:count, :columns],
        row_width=memory.shape[1],
    )
