"""Gradients times a number, rounded to the dtype of what they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from plad_fast.ops.impl.products import accumulation_dtype

_SCALED_AT_ONCE = 2**20  # entries


def scaled_gradient(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`, multiplied in float32 (float64) and rounded once.

    One launch on a GPU that runs the kernels, elsewhere block by block. With no factor and nothing
    to convert it is `grad` itself: a caller that retains the graph must not write to it.
    """
    if factor is None and grad.dtype == dtype:
        return grad
    from plad_fast.ops.impl import triton_backend  # which scales gradients itself

    if triton_backend.preferred(grad) and triton_backend.unavailable(grad) is None:
        from plad_fast.kernels.scaling import scaled

        return scaled(grad, factor, dtype)
    result = torch.empty_like(grad, dtype=dtype)
    step = max(1, _SCALED_AT_ONCE // max(grad[:1].numel(), 1))
    for source, target in zip(grad.split(step), result.split(step), strict=True):
        wide = source.to(accumulation_dtype(source.dtype))
        target.copy_(wide if factor is None else wide * factor)
    return result
