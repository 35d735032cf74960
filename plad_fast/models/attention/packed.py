"""Attention over a packed row, span by span, without a mask over the row.

Implementations, all of the same result:

* "flash": one call of flash-attn's `flash_attn_varlen_func` (version 2, and 3 on Hopper), in 16-bit
  types on NVIDIA GPUs;
* "varlen": one call of PyTorch's own `varlen_attn` (2.12 or newer), which needs no further package
  and has neither softcap nor dropout, in 16-bit types on NVIDIA GPUs;
* "sdpa": PyTorch's scaled_dot_product_attention, a call for every span of the row;
* "flex": PyTorch's flex_attention with a block mask, compiled on CUDA;
* "eager": plain products, for what the others lack: sinks, and softcap without flash-attn.

T tokens in the row, H heads of the queries, G of the keys (H is a multiple of G), C channels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plad_fast.data.row_layout import Attended, RowLayout, Span
from plad_fast.errors import UsageError
from plad_fast.models.attention.varlen import can_flash, can_varlen, flash_varlen, torch_varlen

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("sdpa", "flash", "varlen", "flex", "eager")
_ON_CUDA = ("flash", "varlen")
# What transformers may hand to an attention function and what changes its result.
_UNKNOWN = (
    "position_bias", "alibi", "head_mask", "cache", "block_table", "indices", "block_indices",
    "sinks",
)  # fmt: skip


class NotPackedError(UsageError):
    """A layer asks for what packed rows do not have."""


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, C)
    key: Tensor,  # (1, G, T, C)
    value: Tensor,  # (1, G, T, C)
    row_layout: RowLayout,
    *,
    implementation: str = "auto",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,)
    **kwargs: Any,
) -> Tensor:  # (1, T, H, C)
    """Attention of every span of the row to its keys; arguments are those of transformers.

    Args:
        row_layout: of the row's T tokens.
        implementation: see the module.
        scaling: of the products; None takes C ** -0.5.
        sliding_window: keys that a query sees, its own included; positions count, not places in
            the row.
        softcap: c in c * tanh(products / c).
        s_aux: a logit for every head beside those of the keys (a sink).
    """
    asked = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if asked or not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        what = ", ".join(asked) or "attention that is not causal"
        raise NotPackedError(
            f"{type(module).__name__} asks for {what}, which packed rows do not have; "
            "use layout='padded'"
        )
    if query.shape[0] != 1 or query.shape[2] != row_layout.num_tokens:
        raise UsageError(
            f"the row layout is of 1 row of {row_layout.num_tokens} tokens, and the model runs "
            f"{query.shape[0]} of {query.shape[2]}; pass the batch as the collator made it"
        )
    if row_layout.trace is not None:
        row_layout.trace.append(Attended(getattr(module, "layer_idx", None), sliding_window))
    name = implementation
    # FSDP places a model only when training begins; until then it is looked at on the CPU.
    if name == "auto" or (name in _ON_CUDA and not query.is_cuda and torch.cuda.is_available()):
        name = _choose(query, value, softcap, s_aux, dropout)
    sinks, capped = s_aux is not None, softcap is not None
    lacking = {
        "sdpa": sinks or capped,
        "flash": sinks,
        "varlen": sinks or capped or dropout,
        "flex": sinks or dropout,
    }
    if lacking.get(name):
        raise UsageError(
            f"attention={name!r} lacks the softcap, sink or dropout that {type(module).__name__} "
            "asks for; use attention='auto'"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if name == "flash":
        return flash_varlen(query, key, value, row_layout, scale, dropout, sliding_window, softcap)
    if name == "varlen":
        return torch_varlen(query, key, value, row_layout, scale, sliding_window)
    if name == "flex":
        return _flex(query, key, value, row_layout, scale, sliding_window, softcap)
    attend = functools.partial(_sdpa, scale=scale, dropout=dropout)
    if name == "eager":
        attend = functools.partial(
            _eager, scale=scale, dropout=dropout, softcap=softcap, sinks=s_aux
        )
    spans = row_layout.spans
    queries = query.split([span.stop - span.start for span in spans], dim=2)
    seen = zip(queries, row_layout.by_span(key), row_layout.by_span(value), strict=True)
    outputs = [
        attend(q, k, v, _mask_of(span, row_layout, sliding_window, q.device))
        for span, (q, k, v) in zip(spans, seen, strict=True)
    ]
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1)


def _choose(
    query: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None, dropout: float
) -> str:
    """The implementation that "auto" stands for."""
    if sinks is None and can_flash(query, value, softcap, dropout):
        return _told("flash")
    if sinks is None and can_varlen(query, value, softcap, dropout):
        return _told("varlen")
    return _told("eager" if sinks is not None or softcap is not None else "sdpa")


@functools.cache
def _told(name: str) -> str:
    logger.info("attention over packed rows: %s", name)
    return name


def _mask_of(
    span: Span, row_layout: RowLayout, window: int | None, device: torch.device
) -> Tensor | None:  # (queries, keys) bool
    """None where plain causal attention is meant."""
    queries, keys = span.stop - span.start, span.num_keys
    if window is not None and window >= keys:
        window = None
    if queries == keys and window is None:
        return None
    return row_layout.mask(queries, keys, window, device)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, dropout: float
) -> Tensor:
    share = query.shape[1] // key.shape[1]
    # On CUDA the kernels that take a mask want as many heads of keys as of queries.
    if share > 1 and query.is_cuda and mask is not None:
        key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
        share = 1
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=share > 1,
    )


def _eager(
    query: Tensor,  # (1, H, n, C)
    key: Tensor,  # (1, G, k, C)
    value: Tensor,
    mask: Tensor | None,  # (n, k)
    *,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,  # (H,)
) -> Tensor:
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        mask = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).tril()
    logits = logits.masked_fill(~mask, -torch.inf).float()
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(-1, -1, logits.shape[2], 1)
        logits = torch.cat([logits, sink], dim=3)
    weights = logits.softmax(dim=3)[..., : key.shape[2]].to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_layout: RowLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if query.device.type == "cpu" and any(x.requires_grad for x in (query, key, value)):
        raise UsageError("attention='flex' has no backward on CPUs; take attention='auto'")
    tokens = row_layout.num_tokens
    group, piece, position = row_layout.token_ids(query.device)

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (group[q] == group[k]) & ((piece[k] == 0) | (piece[k] == piece[q]))
        near = position[q] >= position[k]
        if window is not None:
            near = near & (position[q] - position[k] < window)
        return same & near

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    block_mask = row_layout.once(
        ("flex", window, query.device),
        lambda: create_block_mask(sees, None, None, tokens, tokens, device=query.device),
    )
    attend: Any = _compiled_flex() if query.is_cuda else flex_attention
    out = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
