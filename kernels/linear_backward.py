"""Hidden states x LM head -> gradient of the raw logits, for a slice of the vocabulary.

A tile of logits is multiplied again, and becomes g (onehot - p) with the lse of the forward before
it leaves the registers: the result is written once and never read by a kernel. Two library products
of it give the gradients of hidden and weight. Tiles of tokens go in groups, as in the forward.

n tokens, V entries of the vocabulary, D hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from plad_fast.kernels import autotune, launch
from plad_fast.kernels.launch import LinearConfig
from plad_fast.kernels.linear_forward import logits_tile
from plad_fast.kernels.primitives import (
    capped_logits,
    gradient_factors,
    grouped_tile,
    logit_gradient,
)
from torch import Tensor


@triton.jit(do_not_specialize=["num_tokens", "first_column", "ignore_index"])
def _logits_gradient_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    lse_ptr,
    tail_ptr,
    miss_ptr,
    grad_ptr,
    grad_lse_ptr,
    scale_ptr,  # (), what the result is divided by
    out_ptr,
    num_tokens,
    vocab,
    first_column,
    width,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_b,
    stride_on,
    cap_scale,
    z_scale,
    slope,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
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
    tile, vocab_tile = grouped_tile(token_tiles, tl.cdiv(vocab, BLOCK_V), GROUP)
    offs_v = vocab_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = offs_n < num_tokens
    targets = tl.load(targets_ptr + offs_n, mask=exists, other=ignore_index)
    counted = targets != ignore_index
    lse = tl.load(lse_ptr + offs_n, mask=counted, other=0.0)
    tail = tl.load(tail_ptr + offs_n, mask=counted, other=0.0)
    miss = tl.load(miss_ptr + offs_n, mask=counted, other=0.0)
    grad = tl.load(grad_ptr + offs_n, mask=counted, other=0.0)
    grad_lse = grad
    if HAS_GRAD_LSE:
        grad_lse = tl.load(grad_lse_ptr + offs_n, mask=counted, other=0.0)
    silent, at_target, of_others = gradient_factors(grad, grad_lse, tail, miss, HAS_GRAD_LSE)
    # A tile of rows without a gradient has nothing to multiply.
    active = tl.max(tl.where(silent, 0, 1), axis=0) > 0
    raw = logits_tile(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        tile * BLOCK_N,
        vocab_tile * BLOCK_V,
        num_tokens,
        vocab,
        tl.where(active, width, 0),
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
    z, capped = capped_logits(raw, cap_scale, z_scale, HAS_SOFTCAP)
    if HAS_SCALE:
        slope = slope / tl.load(scale_ptr)
    d_raw = logit_gradient(
        z,
        lse[:, None],
        (offs_v + first_column)[None, :] == targets[:, None],
        at_target[:, None],
        of_others[:, None],
    )
    if HAS_SOFTCAP:
        # A row without a gradient has 0 here, whatever its logits are.
        d_raw = tl.where(d_raw == 0.0, 0.0, d_raw * (1.0 - capped * capped))
    d_raw *= slope
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * stride_on + offs_v[None, :]
    inside = exists[:, None]
    if not EVEN_V:
        inside = inside & (offs_v[None, :] < vocab)
    tl.store(out_ptrs, d_raw.to(out_ptr.dtype.element_ty), mask=inside)


def logits_gradient(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (n,) int64
    lse: Tensor,  # (n,)
    tail: Tensor,  # (n,)
    miss: Tensor,  # (n,)
    grad_logprobs: Tensor,  # (n,)
    grad_lse: Tensor | None,  # (n,)
    *,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    out: Tensor,  # (n, V), rows contiguous
    first_column: int = 0,
    scale: Tensor | None = None,  # ()
    config: LinearConfig | None = None,
) -> Tensor:
    """d raw / scale, written to `out` in its dtype and returned.

    Args:
        first_column: the target that the first row of `weight` stands for.
    """
    num_tokens, width = hidden.shape
    vocab = weight.shape[0]
    assert out.shape == (num_tokens, vocab)
    assert out.stride(1) == 1 or vocab == 1
    if num_tokens == 0:
        return out
    options = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "out": out,
        "first_column": first_column,
        "scale": scale,
    }
    of_tokens = targets, lse, tail, miss, grad_logprobs, grad_lse
    device = launch.device_of(hidden)
    loads = launch.load_kind(device, hidden, weight)
    if config is None and autotune.wanted(hidden):
        config = autotune.linear_config(
            logits_gradient, hidden, weight, bias, *of_tokens, **options
        )
    elif config is None:
        lean = launch.is_lean(bias, softcap, vocab)
        config = launch.linear_config(hidden.dtype, num_tokens, device, loads=loads, lean=lean)
    cap_scale, z_scale = launch.logit_scales(softcap, logit_scale, temperature)
    grid = (triton.cdiv(num_tokens, config.BLOCK_N) * triton.cdiv(vocab, config.BLOCK_V),)
    _logits_gradient_kernel[grid](
        *launch.operands(hidden, weight, bias, config, loads),
        targets.contiguous(),
        lse.contiguous(),
        tail.contiguous(),
        miss.contiguous(),
        grad_logprobs.contiguous(),
        (grad_logprobs if grad_lse is None else grad_lse).contiguous(),
        lse if scale is None else scale,
        out,
        num_tokens,
        vocab,
        first_column,
        width,
        *launch.head_strides(hidden, weight, bias),
        out.stride(0),
        cap_scale,
        z_scale,
        logit_scale / temperature,
        ignore_index,
        HAS_GRAD_LSE=grad_lse is not None,
        HAS_SCALE=scale is not None,
        **launch.linear_constants(hidden, weight, bias, softcap, config, loads),
    )
    return out
