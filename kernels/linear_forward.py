"""Hidden states x LM head -> log-probabilities of targets; logits live in registers only.

Two launches. `_linear_forward_kernel` runs over tiles of tokens times parts of the vocabulary:
each program multiplies tile after tile of its part and keeps a running maximum and sum of
exponentials per token, so hidden and weight are read and 2 or 3 numbers per token and part are
written. Tiles of tokens go in groups: what programs that run together read comes from the L2 cache
then. `_combine_kernel` folds the parts of each token in a fixed order. No atomics; the same inputs
on the same GPU give the same bits.

N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from plad_fast.kernels import autotune, launch
from plad_fast.kernels.launch import COMBINE, LinearConfig
from plad_fast.kernels.logits_rows import RowStatistics
from plad_fast.kernels.primitives import (
    capped_logits,
    entropy_of,
    finite_base,
    grouped_tile,
    online_update,
    token_statistics,
    without_target,
)
from torch import Tensor


@triton.jit
def logits_tile(
    hidden_ptr,  # with USE_TMA descriptors of blocks, hidden (BLOCK_N, BLOCK_D)
    weight_ptr,  # and weight (BLOCK_V, BLOCK_D)
    bias_ptr,
    first_n,
    first_v,
    num_tokens,
    vocab,
    width,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_b,
    HAS_BIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Raw products of a tile, float32. Of what lies past the edges the caller makes nothing."""
    offs_v = first_v + tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    # Rows past the end repeat the last one: loads need no mask.
    in_vocab = tl.minimum(offs_v, vocab - 1).to(tl.int64)
    raw = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if USE_TMA:
        for start in tl.range(0, width, BLOCK_D, warp_specialize=WARP_SPECIALIZE):
            hidden = hidden_ptr.load([first_n, start])
            weight = weight_ptr.load([first_v, start])
            if WIDEN:
                hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
            raw = tl.dot(hidden, weight.T, raw, input_precision=PRECISION)
    else:
        in_tokens = tl.minimum(first_n + tl.arange(0, BLOCK_N), num_tokens - 1).to(tl.int64)
        hidden_ptrs = (
            hidden_ptr + in_tokens[:, None] * stride_hn + offs_d[None, :].to(tl.int64) * stride_hd
        )
        weight_ptrs = (
            weight_ptr + in_vocab[None, :] * stride_wv + offs_d[:, None].to(tl.int64) * stride_wd
        )
        step_d = tl.full((), BLOCK_D, tl.int64)
        for start in range(0, width, BLOCK_D):
            if EVEN_D:
                hidden = tl.load(hidden_ptrs)
                weight = tl.load(weight_ptrs)
            else:
                left = width - start
                hidden = tl.load(hidden_ptrs, mask=offs_d[None, :] < left, other=0.0)
                weight = tl.load(weight_ptrs, mask=offs_d[:, None] < left, other=0.0)
            if WIDEN:
                hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
            raw = tl.dot(hidden, weight, raw, input_precision=PRECISION)
            hidden_ptrs += step_d * stride_hd
            weight_ptrs += step_d * stride_wd
    if HAS_BIAS:
        raw += tl.load(bias_ptr + in_vocab * stride_b).to(tl.float32)[None, :]
    return raw


@triton.jit(do_not_specialize=["num_tokens", "tiles_per_split", "ignore_index"])
def _linear_forward_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    max_ptr,  # (splits, N)
    rest_ptr,  # (splits, N)
    moment_ptr,  # (splits, N)
    z_target_ptr,  # (N,)
    num_tokens,
    vocab,
    width,
    tiles_per_split,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_b,
    cap_scale,
    z_scale,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY_ORDER: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    token_tiles = tl.cdiv(num_tokens, BLOCK_N)
    tile, split = grouped_tile(token_tiles, tl.num_programs(0) // token_tiles, GROUP)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = offs_n < num_tokens
    targets = tl.load(targets_ptr + offs_n, mask=exists, other=ignore_index)
    counted = targets != ignore_index

    row_max = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    rest = tl.zeros((BLOCK_N,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
    z_target = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, BLOCK_V))
    # A tile of ignored tokens has nothing to multiply.
    last = tl.where(tl.max(counted.to(tl.int32), axis=0) > 0, last, first)
    for vocab_tile in range(first, last):
        offs_v = vocab_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        raw = logits_tile(
            hidden_ptr,
            weight_ptr,
            bias_ptr,
            tile * BLOCK_N,
            vocab_tile * BLOCK_V,
            num_tokens,
            vocab,
            width,
            stride_hn,
            stride_hd,
            stride_wv,
            stride_wd,
            stride_b,
            HAS_BIAS,
            EVEN_D,
            USE_TMA,
            PRECISION,
            WIDEN,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
            WARP_SPECIALIZE,
        )
        z, _ = capped_logits(raw, cap_scale, z_scale, HAS_SOFTCAP)
        others, at_target = without_target(z, offs_v, targets, vocab, EVEN_V)
        z_target += at_target
        row_max, rest, moment = online_update(others, row_max, rest, moment, ENTROPY_ORDER)

    out = split.to(tl.int64) * num_tokens + offs_n
    tl.store(max_ptr + out, row_max, mask=exists)
    tl.store(rest_ptr + out, rest, mask=exists)
    if ENTROPY_ORDER:
        tl.store(moment_ptr + out, moment, mask=exists)
    # One part of the vocabulary has the target.
    mine = (targets >= first * BLOCK_V) & (targets < (first + tiles_per_split) * BLOCK_V)
    tl.store(z_target_ptr + offs_n, z_target, mask=exists & counted & mine)


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "ignore_index"])
def _combine_kernel(
    max_ptr,  # (splits, N)
    rest_ptr,  # (splits, N)
    moment_ptr,  # (splits, N)
    z_target_ptr,  # (N,)
    targets_ptr,
    logprobs_ptr,
    lse_ptr,
    tail_ptr,
    miss_ptr,
    entropy_ptr,
    num_tokens,
    num_splits,
    ignore_index,
    ENTROPY_ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = offs_n < num_tokens
    targets = tl.load(targets_ptr + offs_n, mask=exists, other=ignore_index)
    counted = exists & (targets != ignore_index)
    z_target = tl.load(z_target_ptr + offs_n, mask=counted, other=0.0)
    row_max = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    part = offs_n.to(tl.int64)
    for _ in range(num_splits):
        row_max = tl.maximum(row_max, tl.load(max_ptr + part, mask=counted, other=0.0))
        part += num_tokens
    base = finite_base(row_max)
    rest = tl.zeros((BLOCK_N,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
    part = offs_n.to(tl.int64)
    for _ in range(num_splits):
        part_max = tl.load(max_ptr + part, mask=counted, other=0.0)
        part_rest = tl.load(rest_ptr + part, mask=counted, other=1.0)
        decay = tl.exp(part_max - base)
        if ENTROPY_ORDER == 1:
            part_moment = tl.load(moment_ptr + part, mask=counted, other=0.0)
            shift = tl.where(part_max == float("-inf"), 0.0, part_max - base)
            moment += decay * (part_moment + shift * part_rest)
        elif ENTROPY_ORDER == 2:
            moment += decay * decay * tl.load(moment_ptr + part, mask=counted, other=0.0)
        rest += decay * part_rest
        part += num_tokens
    logprob, lse, tail, miss, base, log_total = token_statistics(z_target, row_max, rest)
    tl.store(logprobs_ptr + offs_n, tl.where(counted, logprob, 0.0), mask=exists)
    tl.store(lse_ptr + offs_n, tl.where(counted, lse, 0.0), mask=exists)
    tl.store(tail_ptr + offs_n, tl.where(counted, tail, 0.0), mask=exists)
    tl.store(miss_ptr + offs_n, tl.where(counted, miss, 0.0), mask=exists)
    if ENTROPY_ORDER:
        entropy = entropy_of(moment, row_max, rest, z_target, base, log_total, ENTROPY_ORDER)
        tl.store(entropy_ptr + offs_n, tl.where(counted, entropy, 0.0), mask=exists)


def launch_linear_forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    *,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    entropy_order: int,  # 0 for none, 1, or 2
    config: LinearConfig | None = None,
) -> RowStatistics:
    """Statistics of every token; nothing waits for the device."""
    num_tokens, width = hidden.shape
    vocab = weight.shape[0]
    options = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "entropy_order": entropy_order,
    }
    device = launch.device_of(hidden)
    loads = launch.load_kind(device, hidden, weight)
    if config is None and num_tokens and autotune.wanted(hidden):
        config = autotune.linear_config(
            launch_linear_forward, hidden, weight, bias, targets, **options
        )
    elif config is None:
        lean = launch.is_lean(bias, softcap, vocab)
        config = launch.linear_config(hidden.dtype, num_tokens, device, loads=loads, lean=lean)
    targets = targets.contiguous()

    def per_token() -> Tensor:
        return torch.empty(num_tokens, device=hidden.device, dtype=torch.float32)

    logprobs, lse, tail, miss = per_token(), per_token(), per_token(), per_token()
    entropy = per_token() if entropy_order else None

    if num_tokens:
        vocab_tiles = triton.cdiv(vocab, config.BLOCK_V)
        tiles_per_split = triton.cdiv(
            vocab_tiles, launch.vocab_splits(num_tokens, vocab, config, device)
        )
        splits = triton.cdiv(vocab_tiles, tiles_per_split)
        shape = (3 if entropy_order else 2, splits, num_tokens)
        row_max, rest, *moments = torch.empty(shape, device=hidden.device, dtype=torch.float32)
        moment = moments[0] if moments else rest
        z_target = per_token()
        cap_scale, z_scale = launch.logit_scales(softcap, logit_scale, temperature)
        _linear_forward_kernel[(triton.cdiv(num_tokens, config.BLOCK_N) * splits,)](
            *launch.operands(hidden, weight, bias, config, loads),
            targets,
            row_max,
            rest,
            moment,
            z_target,
            num_tokens,
            vocab,
            width,
            tiles_per_split,
            *launch.head_strides(hidden, weight, bias),
            cap_scale,
            z_scale,
            ignore_index,
            ENTROPY_ORDER=entropy_order,
            **launch.linear_constants(hidden, weight, bias, softcap, config, loads),
        )
        _combine_kernel[(triton.cdiv(num_tokens, COMBINE.BLOCK_N),)](
            row_max,
            rest,
            moment,
            z_target,
            targets,
            logprobs,
            lse,
            tail,
            miss,
            lse if entropy is None else entropy,
            num_tokens,
            splits,
            ignore_index,
            ENTROPY_ORDER=entropy_order,
            BLOCK_N=COMBINE.BLOCK_N,
            num_warps=COMBINE.num_warps,
            num_stages=COMBINE.num_stages,
        )
    return RowStatistics(logprobs, lse, tail, miss, entropy)
