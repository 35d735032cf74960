"""Token log-probabilities of logits that somebody stored already, on the torch backend.

No copy of the logits is made in the forward; the backward writes one gradient of their size.
Temporaries are a block of rows.
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, lse and miss of every target, 0 where it is ignored."""
    dtype = accumulation_dtype(logits.dtype)
    results = [logits.new_zeros(targets.shape, dtype=dtype) for _ in range(3)]
    for block in _blocks(logits, scratch_bytes):
        keep = targets[block] != ignore_index
        buffer = logits[block].to(dtype, copy=True)
        part = softmax_rows_(buffer, targets[block].where(keep, 0), spec)
        lse = part.row_max + part.sum_exp.log()
        for result, values in zip(results, (part.token_logprobs, lse, part.miss), strict=True):
            result[block] = values.where(keep, 0)
    return results[0], results[1], results[2]


def stored_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,  # not needed: the statistics are taken again
    miss: Tensor,
    grad: Tensor,  # of the targets' shape
    spec: LogitSpec,
    ignore_index: int,
    scratch_bytes: int,
) -> Tensor:
    """The gradient of the logits. Rows without one are left at 0, whatever their logits hold."""
    d_logits = torch.zeros_like(logits)
    for block in _blocks(logits, scratch_bytes):
        rows = grad[block].where(targets[block] != ignore_index, 0).nonzero().squeeze(1)
        if not len(rows):
            continue
        buffer = logits[block][rows].to(grad.dtype)
        block_targets = targets[block][rows]
        slope = None if spec.softcap is None else torch.empty_like(buffer)
        part = softmax_rows_(buffer, block_targets, spec, tanh_slope=slope)
        logits_gradient_(buffer, block_targets, spec, part, grad[block][rows], tanh_slope=slope)
        d_logits[block][rows] = buffer.to(logits.dtype)
    return d_logits


def _blocks(logits: Tensor, scratch_bytes: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of blocks of rows, which never cross from one sequence of a batch to the next.

    With softcap and a converted result a row takes up to four times its size in float32.
    """
    *batch, num_tokens, vocab = logits.shape
    row_bytes = 4 * vocab * accumulation_dtype(logits.dtype).itemsize
    step = max(1, scratch_bytes // max(row_bytes, 1))
    for sequence in range(*batch) if batch else [None]:
        for start in range(0, num_tokens, step):
            rows = slice(start, start + step)
            yield (rows,) if sequence is None else (sequence, rows)
