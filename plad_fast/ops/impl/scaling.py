"""Gradients times a number, rounded to the dtype of what they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from plad_fast.ops.impl.products import accumulation_dtype

_SCALED_AT_ONCE = 2**20  # entries


def scaled_gradient(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`, multiplied in float32 (float64) and rounded once.

    One launch on a GPU, elsewhere block by block. With no factor and nothing to convert it is
    `grad` itself: a caller that retains the graph must not write to it.
    """
    if factor is None:
        return grad.to(dtype)
    # Of one dimension, or it would be rounded to the dtype of what it multiplies.
    wide = factor.to(accumulation_dtype(grad.dtype)).reshape(1)
    result = torch.empty_like(grad, dtype=dtype)
    step = max(1, len(grad) if grad.is_cuda else _SCALED_AT_ONCE // max(grad[:1].numel(), 1))
    for source, target in zip(grad.split(step), result.split(step), strict=True):
        torch.mul(source, wide, out=target)
    return result
