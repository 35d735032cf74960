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


@triton.jit(do_not_specialize=["ignore_index"])
def _sequence_sums_kernel(
    logprobs_ptr,
    targets_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    counts_ptr,
    alpha,
    ignore_index,
    HAS_ALPHA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence)
    stop = tl.load(cu_seqlens_ptr + sequence + 1)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float64)
    counts = tl.zeros((BLOCK_N,), dtype=tl.int64)
    for first in range(start, stop, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        exists = offs_n < stop
        sums += tl.load(logprobs_ptr + offs_n, mask=exists, other=0.0).to(tl.float64)
        targets = tl.load(targets_ptr + offs_n, mask=exists, other=ignore_index)
        counts += (targets != ignore_index).to(tl.int64)
    count = tl.sum(counts, axis=0)
    total = tl.sum(sums, axis=0)
    if HAS_ALPHA:
        total *= tl.exp(-alpha * tl.log(tl.maximum(count, 1).to(tl.float64)))
    tl.store(sums_ptr + sequence, total.to(tl.float32))
    tl.store(counts_ptr + sequence, count)


def sequence_sums(
    logprobs: Tensor,  # (N,) float32, 0 for ignored tokens
    targets: Tensor,  # (N,) int64
    cu_seqlens: Tensor,  # (S + 1,) int64
    *,
    length_normalization: float,
    ignore_index: int,
    config: SegmentsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(S,) each: sums divided by count ** length_normalization, and counts (int64) of the tokens
    that are not ignored.
    """
    config = config or SegmentsConfig()
    num_sequences = cu_seqlens.shape[0] - 1
    sums = torch.empty(num_sequences, device=logprobs.device, dtype=torch.float32)
    counts = torch.empty(num_sequences, device=logprobs.device, dtype=torch.int64)
    if num_sequences:
        _sequence_sums_kernel[(num_sequences,)](
            logprobs,
            targets.contiguous(),
            cu_seqlens.contiguous(),
            sums,
            counts,
            length_normalization,
            ignore_index,
            HAS_ALPHA=length_normalization != 0,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return sums, counts
