"""Stored logits -> log-probabilities of targets and, in the same rows and in 16 bits, what the
logits' gradient is a multiple of: one pass, a row a program.

With a reference r of the row, g the gradient of its log-probability and y its target, the gradient
of its raw products is g * factor * values:

    values[v]  -exp(z[v] - r), and at y the sum of exp(z[v] - r) over all others; with a softcap
               times its derivative
    factor     slope * exp(r - lse)

Neither depends on g, so a loss need not be known before the logits are gone, and the factors go to
the small operand of a product. r is the largest logit but the target's of the first block that is
not masked. Where a later block exceeds it by `_SLACK` nats, what is written so far is multiplied,
and rounded, once more: values are exp(`_SLACK`) at most, and V times that at y, which bfloat16
holds as float32 does; those below exp(-87) are rounded to 0, or nearly so. r never exceeds the
lse, so that factors are |slope| at most.

Block k of the values covers what block k // 2 of the logits was read from: every block is written
after it was read, if the warps of a program wait for one another between the two.

N rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from plad_fast.kernels import launch
from plad_fast.kernels.launch import RowsConfig
from plad_fast.kernels.logits_rows import load_logits
from plad_fast.kernels.primitives import capped_logits, finite_base, token_statistics
from torch import Tensor

_SLACK = tl.constexpr(40.0)


class ExponentialRows(NamedTuple):
    """float32, (N,) each; 0 for ignored rows."""

    token_logprobs: Tensor
    factor: Tensor


@triton.jit(do_not_specialize=["ignore_index"])
def _exponential_rows_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    logprobs_ptr,
    factor_ptr,
    out_ptr,
    vocab,
    row_width,  # entries of a row that exist, of which the first V are logits
    stride_l,
    stride_o,
    stride_b,
    cap_scale,
    z_scale,
    slope,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_l
    out_ptr += row * stride_o
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(factor_ptr + row, 0.0)
        # Times 0 whatever lies there would not be 0.
        for start in range(0, row_width, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            nothing = tl.zeros((BLOCK_V,), dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + offs_v, nothing, mask=offs_v < row_width)
    else:
        column = target.to(tl.int32)
        raw = tl.load(logits_ptr + target).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + target * stride_b).to(tl.float32)
        z_target, capped_target = capped_logits(raw, cap_scale, z_scale, HAS_SOFTCAP)
        reference = float("-inf")
        row_max = float("-inf")
        rests = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for start in range(0, vocab, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z, capped = load_logits(
                logits_ptr,
                bias_ptr,
                offs_v,
                vocab,
                row_width,
                1,
                stride_b,
                cap_scale,
                z_scale,
                HAS_BIAS,
                HAS_SOFTCAP,
                EVEN_V,
            )
            left_out = offs_v == column
            if not EVEN_V:
                left_out = left_out | (offs_v >= vocab)
            z = tl.where(left_out, float("-inf"), z)
            block_max = tl.max(z, axis=0)
            row_max = tl.maximum(row_max, block_max)
            if block_max > reference + _SLACK:
                decay = tl.exp(reference - block_max)
                reference = block_max
                rests *= decay
                tl.debug_barrier()
                for before in range(0, start, BLOCK_V):
                    out_ptrs = out_ptr + before + tl.arange(0, BLOCK_V)
                    values = tl.load(out_ptrs).to(tl.float32) * decay
                    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty))
            values = tl.exp(z - finite_base(reference))
            rests += values
            if HAS_SOFTCAP:
                values *= 1.0 - capped * capped
            values = (-values).to(out_ptr.dtype.element_ty)
            # Of the same memory another warp may still have this block, or one before it, to read.
            tl.debug_barrier()
            if EVEN_V:
                tl.store(out_ptr + offs_v, values)
            else:
                tl.store(out_ptr + offs_v, values, mask=offs_v < row_width)
        rest = tl.sum(rests, axis=0)
        of_max = rest * tl.exp(reference - finite_base(row_max))
        logprob, _, _, _, base, log_total = token_statistics(z_target, row_max, of_max)
        tl.store(logprobs_ptr + row, logprob)
        # 0 where all others are masked, whose reference is -inf.
        tl.store(factor_ptr + row, slope * tl.exp((reference - base) - log_total))
        if HAS_SOFTCAP:
            rest *= 1.0 - capped_target * capped_target
        tl.debug_barrier()
        tl.store(out_ptr + column, rest.to(out_ptr.dtype.element_ty))


def exponential_rows(
    logits: Tensor,  # (N, V), of unit stride along V
    targets: Tensor,  # (N,) int64
    *,
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    out: Tensor,  # (N, V); may be the first part of the logits' own rows, or these themselves
    row_width: int,
    config: RowsConfig | None = None,
) -> ExponentialRows:
    """Log-probabilities and factors; the values are written to `out`, in bfloat16 or float32. One
    launch.

    Args:
        row_width: entries that a row of the memory has, of the logits and of `out`, V or more; the
            others may be overwritten.
    """
    count, vocab = logits.shape
    assert logits.stride(1) == out.stride(1) == 1
    assert out.shape == logits.shape
    config = config or launch.rows_config(vocab)
    logprobs, factor = (
        torch.empty(count, device=logits.device, dtype=torch.float32) for _ in range(2)
    )
    if count:
        cap_scale, z_scale = launch.logit_scales(softcap, logit_scale, temperature)
        _exponential_rows_kernel[(count,)](
            logits,
            logits if bias is None else bias,
            targets.contiguous(),
            logprobs,
            factor,
            out,
            vocab,
            row_width,
            logits.stride(0),
            out.stride(0),
            0 if bias is None else bias.stride(0),
            cap_scale,
            z_scale,
            logit_scale / temperature,
            ignore_index,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            EVEN_V=vocab % config.BLOCK_V == 0,
            BLOCK_V=config.BLOCK_V,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return ExponentialRows(logprobs, factor)


@triton.jit
def _move_rows_kernel(
    values_ptr,
    sources_ptr,
    places_ptr,
    width,
    stride,
    BLOCK_V: tl.constexpr,
):
    source = tl.load(sources_ptr + tl.program_id(0)).to(tl.int64)
    place = tl.load(places_ptr + tl.program_id(0)).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = offs_v < width
    values = tl.load(values_ptr + source * stride + offs_v, mask=inside)
    tl.store(values_ptr + place * stride + offs_v, values, mask=inside)


def move_rows_(
    values: Tensor,  # (N, V), of unit stride along V
    sources: Tensor,  # (n,) int64
    places: Tensor,  # (n,) int64, none of which is a source
    config: RowsConfig | None = None,
) -> None:
    """values[places] = values[sources]; one launch, and no copy beside."""
    count, width = len(sources), values.shape[1]
    assert values.stride(1) == 1
    config = config or launch.rows_config(width)
    if count and width:
        _move_rows_kernel[(count, triton.cdiv(width, config.BLOCK_V))](
            values,
            sources,
            places,
            width,
            values.stride(0),
            BLOCK_V=config.BLOCK_V,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


@triton.jit
def _scale_rows_kernel(
    first_ptr,
    first_out_ptr,
    second_ptr,
    second_out_ptr,
    grads_ptr,
    factors_ptr,
    rows_ptr,
    width,
    stride_fn,
    stride_fd,
    stride_fon,
    stride_fod,
    stride_sn,
    stride_sd,
    stride_son,
    stride_sod,
    HAS_SECOND: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    inside = offs_d < width
    scale = tl.load(grads_ptr + row) * tl.load(factors_ptr + row)
    values = tl.load(first_ptr + row * stride_fn + offs_d * stride_fd, mask=inside).to(tl.float32)
    place = row
    if HAS_ROWS:
        place = tl.load(rows_ptr + row).to(tl.int64)
    out_ptrs = first_out_ptr + place * stride_fon + offs_d * stride_fod
    tl.store(out_ptrs, (values * scale).to(first_out_ptr.dtype.element_ty), mask=inside)
    if HAS_SECOND:
        second_ptrs = second_ptr + row * stride_sn + offs_d * stride_sd
        values = tl.load(second_ptrs, mask=inside).to(tl.float32)
        out_ptrs = second_out_ptr + row * stride_son + offs_d * stride_sod
        tl.store(out_ptrs, (values * scale).to(second_out_ptr.dtype.element_ty), mask=inside)


def scale_rows(
    grads: Tensor,  # (n,) float32
    factors: Tensor,  # (n,) float32
    first: tuple[Tensor, Tensor],  # (n, D) and (n, D), or (N, D) with `rows`
    second: tuple[Tensor, Tensor] | None = None,  # (n, D) each, which may be the same
    *,
    rows: Tensor | None = None,  # (n,) int64
    config: RowsConfig | None = None,
) -> None:
    """Rows of a matrix times grads * factors, in float32, rounded into the other of its pair; of
    one matrix or two. One launch.

    Args:
        rows: the row of the first pair's other matrix that each goes to; None for 0, 1, ...
    """
    count, width = first[0].shape
    second_or_first = first if second is None else second
    config = config or launch.rows_config(width)
    if count and width:
        _scale_rows_kernel[(count, triton.cdiv(width, config.BLOCK_V))](
            *first,
            *second_or_first,
            grads.contiguous(),
            factors.contiguous(),
            grads if rows is None else rows.contiguous(),
            width,
            *(n for matrix in (*first, *second_or_first) for n in matrix.stride()),
            HAS_SECOND=second is not None,
            HAS_ROWS=rows is not None,
            BLOCK_V=config.BLOCK_V,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
