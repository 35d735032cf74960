"""Variable-length attention as flash-attn documents it, in plain torch."""

from __future__ import annotations

import torch


def varlen_attention(
    q,  # (total_q, H, C)
    k,  # (total_k, G, C)
    v,  # (total_k, G, C)
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    window_size,
    softcap=0.0,
):
    """What flash-attn's documentation says, sequence by sequence, in float64.

    "If causal=True, the causal mask is aligned to the bottom right corner of the attention matrix
    [...] query at position i will only attend to keys between [i + seqlen_k - seqlen_q -
    window_size[0], i + seqlen_k - seqlen_q + window_size[1]] inclusive"; -1: no limit.
    """
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[2] == k.shape[2] == v.shape[2]
    assert q.shape[2] % 8 == 0  # version 3 takes no other
    assert k.shape[1] == v.shape[1]
    assert q.shape[1] % k.shape[1] == 0
    for offsets, total, longest in (
        (cu_seqlens_q, len(q), max_seqlen_q),
        (cu_seqlens_k, len(k), max_seqlen_k),
    ):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
        assert offsets[0] == 0
        assert offsets[-1] == total
        assert isinstance(longest, int)
        assert longest == offsets.diff().max()
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    out = []
    share = q.shape[1] // k.shape[1]
    left, right = window_size
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].double().transpose(0, 1)
        keys, values = (
            x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].double().repeat_interleave(share, 1)
            for x in (k, v)
        )
        scores = queries @ keys.permute(1, 2, 0) * (softmax_scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        shift = scores.shape[2] - scores.shape[1]
        distance = torch.arange(scores.shape[1])[:, None] + shift - torch.arange(scores.shape[2])
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if left >= 0:
            hidden |= distance > left
        if right >= 0:
            hidden |= -distance > right
        weights = scores.masked_fill(hidden, -torch.inf).softmax(2)
        out.append((weights @ values.transpose(0, 1)).transpose(0, 1))
    return torch.cat(out)


def exact_and_gradients(out, tensors):
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    gradients = torch.autograd.grad(out, tensors, upstream.to(out.dtype))
    return out.double(), torch.cat([g.double() for g in gradients], 1)
