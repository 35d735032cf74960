"""Token values -> sums over ragged sequences: a program each, in a fixed order, in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from plad_fast.kernels.launch import SegmentsConfig
from torch import Tensor


@triton.jit
def _segment_sums_kernel(
    values_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    stride_n,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence)
    stop = tl.load(cu_seqlens_ptr + sequence + 1)
    # float64: what a sequence sums to does not depend on its length, at no cost that counts.
    sums = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for first in range(start, stop, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        values = tl.load(values_ptr + offs_n.to(tl.int64) * stride_n, mask=offs_n < stop, other=0.0)
        sums += values.to(tl.float64)
    tl.store(sums_ptr + sequence, tl.sum(sums, axis=0).to(tl.float32))


def segment_sums(
    values: Tensor,  # (N,) float32
    cu_seqlens: Tensor,  # (S + 1,) int64
    config: SegmentsConfig | None = None,
) -> Tensor:  # (S,) float32
    """values[cu_seqlens[i] : cu_seqlens[i + 1]].sum() for every i; 0 for an empty sequence."""
    config = config or SegmentsConfig()
    count = cu_seqlens.shape[0] - 1
    sums = torch.empty(count, device=values.device, dtype=torch.float32)
    if count:
        _segment_sums_kernel[(count,)](
            values,
            cu_seqlens.contiguous(),
            sums,
            values.stride(0),
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return sums
