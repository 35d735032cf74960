"""Logits that exist -> log-probabilities of targets, and the logits' gradient, a row a program.

The forward reads a row once, a block at a time, with a running maximum and sum of exponentials.
The backward reads it once more and writes the gradient, in place or elsewhere, in any floating
dtype, and on request compacted: row i of the result from row rows[i].

In place, a gradient of 16 bits takes the first half of its float32 row. Block k of it covers what
block k // 2 of the logits was read from: every block is written after it was read, if the warps of
a program wait for one another between the two.

N rows, V vocabulary. Logits may be (N, V) or (S, T, V), of any strides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from plad_fast.kernels import launch
from plad_fast.kernels.launch import RowsConfig
from plad_fast.kernels.primitives import (
    capped_logits,
    entropy_of,
    gradient_factors,
    logit_gradient,
    online_update,
    token_statistics,
    without_target,
)
from torch import Tensor


class RowStatistics(NamedTuple):
    """float32, each of the targets' shape; 0 for ignored rows."""

    token_logprobs: Tensor
    lse: Tensor
    tail: Tensor  # what rounding took from lse
    miss: Tensor  # 1 - p(target)
    entropy: Tensor | None


@triton.jit(do_not_specialize=["rows_per_sequence", "ignore_index"])
def _logits_rows_forward_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    logprobs_ptr,
    lse_ptr,
    tail_ptr,
    miss_ptr,
    entropy_ptr,
    vocab,
    row_width,  # entries of a row that exist, of which the first V are logits
    rows_per_sequence,
    stride_ls,
    stride_lt,
    stride_lv,
    stride_b,
    cap_scale,
    z_scale,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY_ORDER: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(tail_ptr + row, 0.0)
        tl.store(miss_ptr + row, 0.0)
        if ENTROPY_ORDER:
            tl.store(entropy_ptr + row, 0.0)
    else:
        sequence = (row // rows_per_sequence).to(tl.int64)
        token = (row % rows_per_sequence).to(tl.int64)
        logits_ptr += sequence * stride_ls + token * stride_lt
        # Vectors of one: the helpers are written for tiles of rows.
        targets = tl.full((1,), 0, dtype=tl.int64) + target
        row_max = tl.full((1,), float("-inf"), dtype=tl.float32)
        rest = tl.zeros((1,), dtype=tl.float32)
        moment = tl.zeros((1,), dtype=tl.float32)
        z_target = tl.zeros((1,), dtype=tl.float32)
        for start in range(0, vocab, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z, _ = load_logits(
                logits_ptr,
                bias_ptr,
                offs_v,
                vocab,
                row_width,
                stride_lv,
                stride_b,
                cap_scale,
                z_scale,
                HAS_BIAS,
                HAS_SOFTCAP,
                EVEN_V,
            )
            others, at_target = without_target(z[None, :], offs_v, targets, vocab, EVEN_V)
            z_target += at_target
            row_max, rest, moment = online_update(others, row_max, rest, moment, ENTROPY_ORDER)
        logprob, lse, tail, miss, base, log_total = token_statistics(z_target, row_max, rest)
        one = row + tl.arange(0, 1)
        tl.store(logprobs_ptr + one, logprob)
        tl.store(lse_ptr + one, lse)
        tl.store(tail_ptr + one, tail)
        tl.store(miss_ptr + one, miss)
        if ENTROPY_ORDER:
            entropy = entropy_of(moment, row_max, rest, z_target, base, log_total, ENTROPY_ORDER)
            tl.store(entropy_ptr + one, entropy)


@triton.jit
def load_logits(
    logits_ptr,
    bias_ptr,
    offs_v,
    vocab,
    row_width,
    stride_lv,
    stride_b,
    cap_scale,
    z_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """A block of a row's logits and what their cap has made of them; past the vocabulary of 0."""
    offsets = offs_v.to(tl.int64)
    if EVEN_V:
        raw = tl.load(logits_ptr + offsets * stride_lv).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + offsets * stride_b).to(tl.float32)
    else:
        # A mask that ends at a multiple of 16 leaves loads of 16 bytes.
        exists = offs_v < row_width
        raw = tl.load(logits_ptr + offsets * stride_lv, mask=exists, other=0.0).to(tl.float32)
        inside = offs_v < vocab
        raw = tl.where(inside, raw, 0.0)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + offsets * stride_b, mask=inside, other=0.0).to(tl.float32)
    return capped_logits(raw, cap_scale, z_scale, HAS_SOFTCAP)


@triton.jit(do_not_specialize=["rows_per_sequence", "ignore_index"])
def _logits_rows_backward_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    lse_ptr,
    tail_ptr,
    miss_ptr,
    grad_ptr,
    grad_lse_ptr,
    rows_ptr,
    scale_ptr,  # (), what the result is divided by
    out_ptr,
    vocab,
    row_width,  # entries of a row that exist, of which the first V are logits
    rows_per_sequence,
    stride_ls,
    stride_lt,
    stride_lv,
    stride_b,
    stride_os,
    stride_ot,
    stride_ov,
    cap_scale,
    z_scale,
    slope,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NARROWS: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    sequence = place // rows_per_sequence
    token = place % rows_per_sequence
    out_ptr += sequence * stride_os + token * stride_ot
    row = place
    if HAS_ROWS:
        row = tl.load(rows_ptr + place)
        sequence = row * 0
        token = row
    logits_ptr += sequence * stride_ls + token * stride_lt
    target = tl.load(targets_ptr + row)
    lse = tl.load(lse_ptr + row)
    miss = tl.load(miss_ptr + row)
    # Whatever came for an ignored row, also NaN.
    counted = target != ignore_index
    grad = tl.where(counted, tl.load(grad_ptr + row), 0.0)
    grad_lse = grad
    if HAS_GRAD_LSE:
        grad_lse = tl.where(counted, tl.load(grad_lse_ptr + row), 0.0)
    tail = tl.load(tail_ptr + row)
    _, at_target, of_others = gradient_factors(grad, grad_lse, tail, miss, HAS_GRAD_LSE)
    if HAS_SCALE:
        slope = slope / tl.load(scale_ptr)
    for start in range(0, vocab, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z, capped = load_logits(
            logits_ptr,
            bias_ptr,
            offs_v,
            vocab,
            row_width,
            stride_lv,
            stride_b,
            cap_scale,
            z_scale,
            HAS_BIAS,
            HAS_SOFTCAP,
            EVEN_V,
        )
        d_raw = logit_gradient(z, lse, offs_v == target, at_target, of_others)
        if HAS_SOFTCAP:
            # A row without a gradient has 0 here, whatever its logits are.
            d_raw = tl.where(d_raw == 0.0, 0.0, d_raw * (1.0 - capped * capped))
        d_raw = (d_raw * slope).to(out_ptr.dtype.element_ty)
        out_ptrs = out_ptr + offs_v.to(tl.int64) * stride_ov
        if NARROWS:
            # Of the same memory another warp may still have this block, or one before it, to read.
            tl.debug_barrier()
        if EVEN_V:
            tl.store(out_ptrs, d_raw)
        else:
            tl.store(out_ptrs, d_raw, mask=offs_v < row_width)


def logits_rows_forward(
    logits: Tensor,  # (N, V) or (S, T, V)
    targets: Tensor,  # (N,) or (S, T) int64
    *,
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    entropy_order: int,  # 0 for none, 1, or 2
    row_width: int | None = None,
    config: RowsConfig | None = None,
) -> RowStatistics:
    """Statistics of every row; one launch.

    Args:
        row_width: entries that a row of the memory has, V or more; the others may hold anything.
    """
    vocab = logits.shape[-1]
    config = config or launch.rows_config(vocab)
    count = 5 if entropy_order else 4
    outputs = [
        torch.empty(targets.shape, device=logits.device, dtype=torch.float32) for _ in range(count)
    ]
    logprobs, lse, tail, miss, *entropies = outputs
    if targets.numel():
        cap_scale, z_scale = launch.logit_scales(softcap, logit_scale, temperature)
        stride_ls, stride_lt = _row_strides(logits)
        _logits_rows_forward_kernel[(targets.numel(),)](
            logits,
            logits if bias is None else bias,
            targets.contiguous(),
            logprobs,
            lse,
            tail,
            miss,
            entropies[0] if entropies else lse,
            vocab,
            vocab if row_width is None else row_width,
            targets.shape[-1],
            stride_ls,
            stride_lt,
            logits.stride(-1),
            0 if bias is None else bias.stride(0),
            cap_scale,
            z_scale,
            ignore_index,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            ENTROPY_ORDER=entropy_order,
            EVEN_V=vocab % config.BLOCK_V == 0,
            BLOCK_V=config.BLOCK_V,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return RowStatistics(logprobs, lse, tail, miss, entropies[0] if entropies else None)


def logits_rows_backward(
    logits: Tensor,  # (N, V) or (S, T, V)
    targets: Tensor,  # (N,) or (S, T) int64
    lse: Tensor,  # of the targets' shape
    tail: Tensor,  # of the targets' shape
    miss: Tensor,  # of the targets' shape
    grad_logprobs: Tensor,  # of the targets' shape
    grad_lse: Tensor | None,  # of the targets' shape
    *,
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    out: Tensor,  # of the logits' shape, or (n, V); may be the logits
    rows: Tensor | None = None,  # (n,) int64, of 2-D logits
    scale: Tensor | None = None,  # ()
    row_width: int | None = None,
    config: RowsConfig | None = None,
) -> Tensor:
    """d raw / scale, written to `out` in its dtype and returned; one launch.

    A narrower `out` may be the first part of the logits' own rows. In place with `rows`, a row that
    is written must not be read by another program: each is either rows[i] = i, or a row that no
    entry of `rows` names.

    Args:
        row_width: entries that a row of the memory has, of the logits and of `out`, V or more; the
            others may be overwritten.
    """
    vocab = logits.shape[-1]
    config = config or launch.rows_config(vocab)
    count = targets.numel() if rows is None else rows.numel()
    assert rows is None or logits.ndim == 2
    assert out.shape == (logits.shape if rows is None else (count, vocab))
    if count == 0:
        return out
    row_width = vocab if row_width is None else row_width
    cap_scale, z_scale = launch.logit_scales(softcap, logit_scale, temperature)
    _logits_rows_backward_kernel[(count,)](
        logits,
        logits if bias is None else bias,
        targets.contiguous(),
        lse.contiguous(),
        tail.contiguous(),
        miss.contiguous(),
        grad_logprobs.contiguous(),
        grad_logprobs if grad_lse is None else grad_lse.contiguous(),
        targets if rows is None else rows.contiguous(),
        lse if scale is None else scale,
        out,
        vocab,
        row_width,
        out.shape[-2],
        *_row_strides(logits),
        logits.stride(-1),
        0 if bias is None else bias.stride(0),
        *_row_strides(out),
        out.stride(-1),
        cap_scale,
        z_scale,
        logit_scale / temperature,
        ignore_index,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_GRAD_LSE=grad_lse is not None,
        HAS_ROWS=rows is not None,
        HAS_SCALE=scale is not None,
        NARROWS=out.element_size() < logits.element_size(),
        EVEN_V=vocab % config.BLOCK_V == 0,
        BLOCK_V=config.BLOCK_V,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _row_strides(logits: Tensor) -> tuple[int, int]:
    """Strides from sequence to sequence and from token to token."""
    return (0, logits.stride(0)) if logits.ndim == 2 else (logits.stride(0), logits.stride(1))
