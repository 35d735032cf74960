"""Token log-probabilities of logits that somebody stored already, on the torch backend.

No copy of the logits is made in the forward; the backward writes one gradient of their size.
Temporaries are a block of rows, allocated once: blocks allocated in turn fragment the heap.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from plad_fast.logit_spec import LogitSpec
from plad_fast.products import accumulation_dtype
from plad_fast.softmax_rows import logits_gradient_, softmax_rows_


def stored_forward(
    logits: Tensor,  # (N, V) or (S, T, V), of any strides
    targets: Tensor,  # (N,) or (S, T)
    spec: LogitSpec,
    ignore_index: int,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, lse, a tail of 0, and miss of every target, 0 where it is ignored."""
    dtype = accumulation_dtype(logits.dtype)
    token_logprobs, lse, tail, miss = (
        logits.new_zeros(targets.shape, dtype=dtype) for _ in range(4)
    )
    scratch = logits.new_empty(_block_rows(logits, scratch_bytes), logits.shape[-1], dtype=dtype)
    for block in _blocks(logits, scratch_bytes):
        keep = targets[block] != ignore_index
        buffer = scratch[: len(keep)].copy_(logits[block])
        part = softmax_rows_(buffer, targets[block].where(keep, 0), spec)
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
    spec: LogitSpec,
    ignore_index: int,
    scratch_bytes: int,
) -> Tensor:
    """The gradient of the logits. Rows without one are left at 0, whatever their logits hold."""
    d_logits = torch.zeros_like(logits)
    shape = _block_rows(logits, scratch_bytes), logits.shape[-1]
    scratch = logits.new_empty(shape, dtype=grad.dtype)
    rounded = scratch if logits.dtype == grad.dtype else logits.new_empty(shape)
    slopes = None if spec.softcap is None else torch.empty_like(scratch)
    for block in _blocks(logits, scratch_bytes):
        rows = grad[block].where(targets[block] != ignore_index, 0).nonzero().squeeze(1)
        n = len(rows)
        if not n:
            continue
        torch.index_select(logits[block], 0, rows, out=rounded[:n])
        buffer = scratch[:n].copy_(rounded[:n])
        block_targets = targets[block][rows]
        slope = None if slopes is None else slopes[:n]
        part = softmax_rows_(buffer, block_targets, spec, tanh_slope=slope)
        logits_gradient_(buffer, block_targets, spec, part, grad[block][rows], tanh_slope=slope)
        d_logits[block].index_copy_(0, rows, rounded[:n].copy_(buffer))
    return d_logits


def _blocks(logits: Tensor, scratch_bytes: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of blocks of rows, which never cross from one sequence of a batch to the next."""
    *batch, num_tokens, _ = logits.shape
    step = _block_rows(logits, scratch_bytes)
    for sequence in range(*batch) if batch else [None]:
        for start in range(0, num_tokens, step):
            rows = slice(start, start + step)
            yield (rows,) if sequence is None else (sequence, rows)


def _block_rows(logits: Tensor, scratch_bytes: int) -> int:
    """With softcap and a rounded result a row takes up to three times its size in float32."""
    *_, num_tokens, vocab = logits.shape
    row_bytes = 3 * vocab * accumulation_dtype(logits.dtype).itemsize
    return max(1, min(num_tokens, scratch_bytes // max(row_bytes, 1)))
