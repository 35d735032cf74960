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
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,), all within the vocabulary
    spec: LogitSpec,
    scratch_bytes: int,
) -> Tensor:  # (N,)
    """Differentiable log-probability of every target, float32 (float64 for float64 logits)."""
    return _StoredTokenLogprobs.apply(logits, targets, spec, scratch_bytes)


class _StoredTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, spec: LogitSpec, scratch_bytes: int
    ) -> Tensor:
        token_logprobs = logits.new_empty(len(logits), dtype=accumulation_dtype(logits.dtype))
        for rows in _blocks(logits, scratch_bytes):
            block = _copy(logits[rows])
            token_logprobs[rows] = softmax_rows_(block, targets[rows], spec).token_logprobs
        ctx.save_for_backward(logits, targets)
        ctx.spec, ctx.scratch_bytes = spec, scratch_bytes
        return token_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets = ctx.saved_tensors
        d_logits = torch.zeros_like(logits)
        for rows in _blocks(logits, ctx.scratch_bytes):
            if not grad[rows].any():
                continue
            block = _copy(logits[rows])
            slope = None if ctx.spec.softcap is None else torch.empty_like(block)
            part = softmax_rows_(block, targets[rows], ctx.spec, tanh_slope=slope)
            logits_gradient_(
                block,
                targets[rows],
                ctx.spec,
                part.sum_exp,
                part.token_logprobs,
                grad[rows],
                tanh_slope=slope,
            )
            d_logits[rows] = block.to(logits.dtype)
        return d_logits, None, None, None


def _copy(block: Tensor) -> Tensor:
    return block.to(accumulation_dtype(block.dtype), copy=True)


def _blocks(logits: Tensor, scratch_bytes: int) -> Iterator[slice]:
    """Blocks of rows; with softcap and a converted result a row takes three times its size."""
    num_tokens, vocab = logits.shape
    step = max(1, scratch_bytes // max(3 * vocab * accumulation_dtype(logits.dtype).itemsize, 1))
    for start in range(0, num_tokens, step):
        yield slice(start, start + step)
