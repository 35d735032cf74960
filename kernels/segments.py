"""Token values -> sums over ragged sequences, in float64, in a fixed order; numbers of sequences
-> numbers of their tokens. A sequence a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from plad_fast.kernels.launch import SegmentsConfig
from torch import Tensor


@triton.jit(do_not_specialize=["origin"])
def _segment_sums_kernel(
    values_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    origin,
    stride_n,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence) - origin
    stop = tl.load(cu_seqlens_ptr + sequence + 1) - origin
    # float64: what a sequence sums to does not depend on its length, at no cost that counts.
    sums = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for first in range(start, stop, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        values = tl.load(values_ptr + offs_n.to(tl.int64) * stride_n, mask=offs_n < stop, other=0.0)
        sums += values.to(tl.float64)
    tl.store(sums_ptr + sequence, tl.sum(sums, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["origin"])
def _expand_segments_kernel(
    values_ptr,
    cu_seqlens_ptr,
    out_ptr,
    origin,
    stride_s,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence) - origin
    stop = tl.load(cu_seqlens_ptr + sequence + 1) - origin
    value = tl.load(values_ptr + sequence.to(tl.int64) * stride_s)
    for first in range(start, stop, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + offs_n, tl.zeros((BLOCK_N,), tl.float32) + value, mask=offs_n < stop)


def segment_sums(
    values: Tensor,  # (N,) float32
    cu_seqlens: Tensor,  # (S + 1,) int64
    origin: int = 0,
    config: SegmentsConfig | None = None,
) -> Tensor:  # (S,) float32
    """values[cu_seqlens[i] - origin : cu_seqlens[i + 1] - origin].sum() for every i; 0 for an empty
    sequence.
    """
    config = config or SegmentsConfig()
    count = cu_seqlens.shape[0] - 1
    sums = torch.empty(count, device=values.device, dtype=torch.float32)
    if count:
        _segment_sums_kernel[(count,)](
            values,
            cu_seqlens.contiguous(),
            sums,
            origin,
            values.stride(0),
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return sums


def expand_segments(
    values: Tensor,  # (S,) float32
    cu_seqlens: Tensor,  # (S + 1,) int64
    origin: int,
    num_tokens: int,
    config: SegmentsConfig | None = None,
) -> Tensor:  # (num_tokens,) float32
    """values[i] of the tokens cu_seqlens[i] - origin to cu_seqlens[i + 1] - origin, for every i.
    Sequences shall reach from the first token to the last.
    """
    config = config or SegmentsConfig()
    out = torch.empty(num_tokens, device=values.device, dtype=torch.float32)
    if len(values):
        _expand_segments_kernel[(len(values),)](
            values,
            cu_seqlens.contiguous(),
            out,
            origin,
            values.stride(0),
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
