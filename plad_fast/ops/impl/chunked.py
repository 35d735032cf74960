"""The torch backend: any device, any floating dtype, memory within a scratch budget.

Two-phase: the forward keeps no logits, the backward computes a chunk's anew, so four products of
2NVD flop in all, and fewer where tokens are ignored or upstream gradients are zero.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from plad_fast.ops.backend import (
    HeadGradient,
    HeadOptions,
    LinearProblem,
    LinearStatistics,
    Needs,
    Upstream,
)
from plad_fast.ops.impl.exponentials import workspace_for
from plad_fast.ops.impl.products import accumulation_dtype
from plad_fast.ops.impl.softmax_rows import SoftmaxStatistics, logits_gradient_, softmax_rows_
from plad_fast.ops.impl.workspace import HeadGradients, Workspace

__all__ = [
    "TAKES_IGNORED",
    "linear_backward",
    "linear_forward",
    "preferred",
    "stored_backward",
    "stored_forward",
    "unavailable",
    "workspace",
]

TAKES_IGNORED = False
workspace = workspace_for


def unavailable(tensor: Tensor) -> str | None:
    """It can take every tensor."""
    return None


def preferred(tensor: Tensor) -> bool:
    """Where no other backend is."""
    return True


def linear_forward(problem: LinearProblem, entropy_order: int) -> LinearStatistics:
    hidden, _, _, targets, _, options = problem
    rows = (targets != options.ignore_index).nonzero().squeeze(1)
    make = Workspace if entropy_order else functools.partial(workspace_for, needs=(False,) * 3)
    workspace = make(problem.head, options, len(rows), for_gradient=False)
    token_logprobs = hidden.new_zeros(len(hidden), dtype=workspace.products.dtype)
    lse, tail, miss = (torch.zeros_like(token_logprobs) for _ in range(3))
    entropy = torch.zeros_like(token_logprobs) if entropy_order else None
    for chunk in workspace.chunks(len(rows)):
        at = _slice_if_whole(rows[chunk], chunk, len(hidden) == len(rows))
        part = workspace.forward(hidden[at], targets[at], entropy_order)
        token_logprobs[at] = part.token_logprobs
        lse[at] = part.row_max + part.sum_exp.log()
        miss[at] = part.miss
        if entropy is not None and part.entropy is not None:
            entropy[at] = part.entropy
    return LinearStatistics(token_logprobs, lse, tail, miss, entropy)


def linear_backward(
    problem: LinearProblem,
    # Not needed: the statistics come with the second product.
    lse: Tensor,  # (N,)
    tail: Tensor,  # (N,)
    miss: Tensor,  # (N,)
    upstream: Upstream,
    needs: Needs,
    skip_inactive: bool,
) -> HeadGradient:
    hidden, weight, _, targets, _, options = problem
    active = upstream.active() if skip_inactive else targets != options.ignore_index
    active_rows = active.nonzero().squeeze(1)
    make = Workspace if upstream.lse is not None else functools.partial(workspace_for, needs=needs)
    workspace = make(problem.head, options, len(active_rows), for_gradient=True)
    grads = HeadGradients(problem.head, needs, workspace, weight_dtype=workspace.grad_weight_dtype)
    for chunk in workspace.chunks(len(active_rows)):
        rows = _slice_if_whole(active_rows[chunk], chunk, len(hidden) == len(active_rows))
        h, t = hidden[rows], targets[rows]
        statistics: SoftmaxStatistics = workspace.forward(h, t)
        grad_lse = None if upstream.lse is None else upstream.lse[rows]
        grads.add(workspace.gradient(t, statistics, upstream.logprobs[rows], grad_lse), h, rows)
    return grads.finish(weight.dtype)


def _slice_if_whole(rows: Tensor, chunk: slice, whole: bool) -> Tensor | slice:
    """The rows of a chunk; a slice, which copies nothing, where no row is left out."""
    return chunk if whole else rows


def stored_forward(
    logits: Tensor,  # (N, V) or (S, T, V), of any strides
    targets: Tensor,  # (N,) or (S, T)
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, lse, a tail of 0, and miss of every target, 0 where it is ignored."""
    dtype = accumulation_dtype(logits.dtype)
    token_logprobs, lse, tail, miss = (
        logits.new_zeros(targets.shape, dtype=dtype) for _ in range(4)
    )
    scratch = logits.new_empty(_block_rows(logits, options), logits.shape[-1], dtype=dtype)
    for block in _blocks(logits, options):
        keep = targets[block] != options.ignore_index
        buffer = scratch[: len(keep)].copy_(logits[block])
        part = softmax_rows_(buffer, targets[block].where(keep, 0), options)
        token_logprobs[block] = part.token_logprobs.where(keep, 0)
        lse[block] = (part.row_max + part.sum_exp.log()).where(keep, 0)
        miss[block] = part.miss.where(keep, 0)
    return token_logprobs, lse, tail, miss


def stored_backward(
    logits: Tensor,
    targets: Tensor,
    # Not needed: the statistics are taken again.
    lse: Tensor,
    tail: Tensor,
    miss: Tensor,
    grad: Tensor,  # of the targets' shape
    options: HeadOptions,
) -> Tensor:
    """The gradient of the logits. Rows without one are left at 0, whatever their logits hold."""
    d_logits = torch.zeros_like(logits)
    shape = _block_rows(logits, options), logits.shape[-1]
    scratch = logits.new_empty(shape, dtype=grad.dtype)
    rounded = scratch if logits.dtype == grad.dtype else logits.new_empty(shape)
    slopes = None if options.softcap is None else torch.empty_like(scratch)
    for block in _blocks(logits, options):
        rows = grad[block].where(targets[block] != options.ignore_index, 0).nonzero().squeeze(1)
        n = len(rows)
        if not n:
            continue
        torch.index_select(logits[block], 0, rows, out=rounded[:n])
        buffer = scratch[:n].copy_(rounded[:n])
        block_targets = targets[block][rows]
        slope = None if slopes is None else slopes[:n]
        part = softmax_rows_(buffer, block_targets, options, tanh_slope=slope)
        logits_gradient_(buffer, block_targets, options, part, grad[block][rows], tanh_slope=slope)
        d_logits[block].index_copy_(0, rows, rounded[:n].copy_(buffer))
    return d_logits


def _blocks(logits: Tensor, options: HeadOptions) -> Iterator[tuple[int | slice, ...]]:
    """Indices of blocks of rows, which never cross from one sequence of a batch to the next."""
    *batch, num_tokens, _ = logits.shape
    step = _block_rows(logits, options)
    for sequence in range(*batch) if batch else [None]:
        for start in range(0, num_tokens, step):
            rows = slice(start, start + step)
            yield (rows,) if sequence is None else (sequence, rows)


def _block_rows(logits: Tensor, options: HeadOptions) -> int:
    """With softcap and a rounded result a row takes up to three times its size in float32."""
    *_, num_tokens, vocab = logits.shape
    row_bytes = 3 * vocab * accumulation_dtype(logits.dtype).itemsize
    return max(1, min(num_tokens, options.scratch_on(logits.device) // max(row_bytes, 1)))
