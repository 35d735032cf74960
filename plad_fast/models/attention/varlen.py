"""PyTorch's own variable-length attention over a packed row: flash-attention without flash-attn."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plad_fast.data.row_layout import RowLayout
from plad_fast.models.attention.flash import (
    SIXTEEN_BIT,
    WIDEST,
    as_sequences,
    require_sixteen_bit,
    working_dtype,
)

_MODULE = "torch.nn.attention.varlen"
# Before these came, in PyTorch 2.10 and 2.11, the causal mask and shared keys were asked otherwise.
_NEEDED = {"scale", "window_size", "enable_gqa"}
_WIDTHS = 8
"""Of which the kernels take multiples."""


@functools.cache
def load_varlen() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn` where this PyTorch and this GPU have it, or None."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return None
    # On AMD's GPUs other kernels stand behind it, of which nothing here was looked at.
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        attend = importlib.import_module(_MODULE).varlen_attn
    except (ImportError, AttributeError):
        return None
    return attend if inspect.signature(attend).parameters.keys() >= _NEEDED else None


def can_varlen(
    query: Tensor,  # (1, H, T, C)
    value: Tensor,  # (1, G, T, C)
    softcap: float | None,
    dropout: float,
) -> bool:
    """Whether the PyTorch that is installed takes these tensors and options."""
    if not query.is_cuda or working_dtype(query) not in SIXTEEN_BIT:
        return False
    if softcap is not None or dropout or max(query.shape[-1], value.shape[-1]) > WIDEST:
        return False
    return load_varlen() is not None


def torch_varlen(
    query: Tensor,  # (1, H, T, C)
    key: Tensor,  # (1, G, T, C)
    value: Tensor,  # (1, G, T, C)
    row_layout: RowLayout,
    scale: float,
    window: int | None,
) -> Tensor:  # (1, T, H, C)
    """One call for the whole row, as `flash_varlen`.

    The kernels are flash-attn's, compiled into PyTorch: their causal mask and their window are
    aligned to the last query and the last key of each sequence, as a span needs it. PyTorch's
    documentation does not say so; `plad_fast.models.sharing.prepare` would find another alignment.
    Gradients repeat bit for bit under `torch.use_deterministic_algorithms(True)` only.
    """
    attend = load_varlen()
    assert attend is not None
    require_sixteen_bit("varlen_attn", query)
    spans = row_layout.varlen(query.device)
    out = attend(
        *as_sequences(query, key, value, row_layout, _WIDTHS),
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        scale=scale,
        # Causal, and the keys before the query's own. Only as a tuple is it recognised.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.narrow(2, 0, value.shape[-1]).unsqueeze(0)
