"""The torch backend: any device, any floating dtype, memory within a scratch budget.

Two-phase: the forward keeps no logits, the backward computes a chunk's anew, so four products of
2NVD flop in all, and fewer where tokens are ignored or upstream gradients are zero.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plad_fast.backend import HeadGradient, LinearProblem, LinearStatistics, Upstream
from plad_fast.onepass import linear_preference_loss
from plad_fast.segments import length_normalized, segment_counts, segment_sums
from plad_fast.softmax_rows import RowStatistics
from plad_fast.stored_logits import stored_backward, stored_forward
from plad_fast.workspace import HeadGradients, Workspace

__all__ = [
    "linear_backward",
    "linear_forward",
    "linear_preference_loss",
    "preferred",
    "stored_backward",
    "stored_forward",
    "unavailable",
]


def unavailable(tensor: Tensor) -> str | None:
    """It can take every tensor."""
    return None


def preferred(tensor: Tensor) -> bool:
    """Where no other backend is."""
    return True


def linear_forward(
    problem: LinearProblem, length_normalization: float, with_entropy: bool
) -> LinearStatistics:
    hidden, weight, bias, targets, cu_seqlens, spec, ignore_index, scratch_bytes = problem
    keep = targets != ignore_index
    rows = keep.nonzero().squeeze(1)
    space = Workspace(hidden[: len(rows)], weight, bias, spec, scratch_bytes, for_gradient=False)
    token_logprobs = hidden.new_zeros(len(hidden), dtype=space.products.dtype)
    lse, tail, miss = (torch.zeros_like(token_logprobs) for _ in range(3))
    entropy = torch.zeros_like(token_logprobs) if with_entropy else None
    for chunk in space.chunks(0, len(rows)):
        at = _slice_if_whole(rows[chunk], chunk, len(hidden) == len(rows))
        part = space.forward(hidden[at], targets[at], with_entropy)
        token_logprobs[at] = part.token_logprobs
        lse[at] = part.row_max + part.sum_exp.log()
        miss[at] = part.miss
        if entropy is not None and part.entropy is not None:
            entropy[at] = part.entropy
    counts = segment_counts(keep, cu_seqlens)
    sums = segment_sums(token_logprobs, cu_seqlens)
    sums = length_normalized(sums, counts, length_normalization)
    return LinearStatistics(sums, counts, token_logprobs, lse, tail, miss, entropy)


def linear_backward(
    problem: LinearProblem,
    # Not needed: the statistics come with the second product.
    lse: Tensor,  # (N,)
    tail: Tensor,  # (N,)
    miss: Tensor,  # (N,)
    upstream: Upstream,
    needs: tuple[bool, bool, bool],
    skip_inactive: bool,
) -> HeadGradient:
    hidden, weight, bias, targets, _, spec, ignore_index, scratch_bytes = problem
    active = upstream.active() if skip_inactive else targets != ignore_index
    active_rows = active.nonzero().squeeze(1)
    space = Workspace(
        hidden[: len(active_rows)], weight, bias, spec, scratch_bytes, for_gradient=True
    )
    grads = HeadGradients(
        hidden if needs[0] else None,
        weight if needs[1] else None,
        bias if needs[2] else None,
        space.products,
    )
    for chunk in space.chunks(0, len(active_rows)):
        rows = _slice_if_whole(active_rows[chunk], chunk, len(hidden) == len(active_rows))
        h, t = hidden[rows], targets[rows]
        statistics: RowStatistics = space.forward(h, t)
        grad_lse = None if upstream.lse is None else upstream.lse[rows]
        grads.add(space.gradient(t, statistics, upstream.logprobs[rows], grad_lse), h, rows)
    return grads.finish(weight.dtype)


def _slice_if_whole(rows: Tensor, chunk: slice, whole: bool) -> Tensor | slice:
    """The rows of a chunk; a slice, which copies nothing, where no row is left out."""
    return chunk if whole else rows
