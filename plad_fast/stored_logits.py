"""Token log-probabilities of logits that somebody stored already.

No copy of the logits is made in the forward; the backward writes one gradient of their size.
Temporaries are a block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plad_fast.logit_spec import LogitSpec
from plad_fast.products import accumulation_dtype
from plad_fast.softmax_rows import logits_gradient_, softmax_rows_


def stored_token_logprobs(
    logits: Tensor,  # (N, V) or (S, T, V), of any strides
    targets: Tensor,  # (N,) or (S, T), all within the vocabulary
    spec: LogitSpec,
    scratch_bytes: int,
) -> Tensor:  # the shape of the targets
    """Differentiable log-probability of every target, float32 (float64 for float64 logits)."""
    return _StoredTokenLogprobs.apply(logits, targets, spec, scratch_bytes)


class _StoredTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, spec: LogitSpec, scratch_bytes: int
    ) -> Tensor:
        dtype = accumulation_dtype(logits.dtype)
        token_logprobs = logits.new_empty(targets.shape, dtype=dtype)
        for block in _blocks(logits, scratch_bytes):
            buffer = logits[block].to(dtype, copy=True)
            token_logprobs[block] = softmax_rows_(buffer, targets[block], spec).token_logprobs
        ctx.save_for_backward(logits, targets)
        ctx.spec, ctx.scratch_bytes = spec, scratch_bytes
        return token_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets = ctx.saved_tensors
        d_logits = torch.zeros_like(logits)
        for block in _blocks(logits, ctx.scratch_bytes):
            # Rows without a gradient are left at 0, whatever their logits hold.
            rows = grad[block].nonzero().squeeze(1)
            if not len(rows):
                continue
            buffer = logits[block][rows].to(grad.dtype)
            block_targets = targets[block][rows]
            slope = None if ctx.spec.softcap is None else torch.empty_like(buffer)
            part = softmax_rows_(buffer, block_targets, ctx.spec, tanh_slope=slope)
            logits_gradient_(
                buffer,
                block_targets,
                ctx.spec,
                part,
                grad[block][rows],
                tanh_slope=slope,
            )
            d_logits[block][rows] = buffer.to(logits.dtype)
        return d_logits, None, None, None


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
