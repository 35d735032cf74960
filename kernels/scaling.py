"""Entries times a number that lies on the device, in another dtype: one pass, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from plad_fast.kernels.launch import ScalingConfig
from torch import Tensor


@triton.jit
def _scaled_kernel(
    values_ptr,
    factor_ptr,  # ()
    out_ptr,
    count,
    HAS_FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs < count
    values = tl.load(values_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        values *= tl.load(factor_ptr).to(tl.float32)
    tl.store(out_ptr + offs, values.to(out_ptr.dtype.element_ty), mask=inside)


def scaled(
    values: Tensor,  # of any shape, without gaps between its entries
    factor: Tensor | None,  # (), of any floating dtype
    dtype: torch.dtype,
    config: ScalingConfig | None = None,
) -> Tensor:
    """values * factor, multiplied in float32 and rounded once to `dtype`; strides as of `values`.

    No operation of torch does it in one launch: a factor without dimensions is rounded to the
    dtype of what it multiplies.
    """
    config = config or ScalingConfig()
    out = torch.empty_like(values, dtype=dtype)
    if values.stride() != out.stride():
        values = values.contiguous()
        out = torch.empty_like(values, dtype=dtype)
    count = values.numel()
    if count:
        _scaled_kernel[(triton.cdiv(count, config.BLOCK_N),)](
            values,
            values if factor is None else factor,
            out,
            count,
            HAS_FACTOR=factor is not None,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
