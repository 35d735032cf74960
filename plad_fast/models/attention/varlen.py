"""Variable-length attention over a packed row, one call for all of it: flash-attn's, or PyTorch's
own, for which flash-attn is compiled into PyTorch.

H heads of T queries; G heads of the keys, which is a part of H; C channels; K keys that the row's
spans see, span behind span.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plad_fast.data.row_layout import RowLayout
from plad_fast.errors import UsageError

logger = logging.getLogger(__name__)

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_WIDEST = 256
"""Channels of a head that the kernels take."""

_VERSION_3, _VERSION_2 = "flash_attn_interface", "flash_attn"
_OF_VERSION_3 = (9, 0)
"""The compute capability of the H100 and H800, which version 3 requires: elsewhere it loads, and
fails when it is called.
"""
_TORCH = "torch.nn.attention.varlen"
# Before these came, in PyTorch 2.10 and 2.11, the causal mask and shared keys were asked otherwise.
_NEEDED = {"scale", "window_size", "enable_gqa"}
_WIDTHS = 8
"""Of which PyTorch's kernels and version 3 take multiples; version 2 fills up by itself."""


@functools.cache
def load_flash() -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of the newest flash-attn that is installed and made for this GPU, or
    None.
    """
    if not _has_gpu():
        return None
    runs_3 = torch.cuda.get_device_capability() == _OF_VERSION_3
    for package in (_VERSION_3, _VERSION_2) if runs_3 else (_VERSION_2,):
        try:
            return importlib.import_module(package).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        except Exception as error:  # a build for another torch breaks in its own ways
            logger.warning("%s is installed and does not load: %s", package, error)
    return None


@functools.cache
def load_varlen() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn` where this PyTorch and this GPU have it, or None."""
    # On AMD's GPUs other kernels stand behind it, of which nothing here was looked at.
    if not _has_gpu() or torch.version.hip:
        return None
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        attend = importlib.import_module(_TORCH).varlen_attn
    except (ImportError, AttributeError):
        return None
    return attend if inspect.signature(attend).parameters.keys() >= _NEEDED else None


def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def can_flash(
    query: Tensor,  # (1, H, T, C)
    value: Tensor,  # (1, G, T, C)
    softcap: float | None,
    dropout: float,
) -> bool:
    """Whether an installed flash-attn takes these tensors and options."""
    attend = load_flash() if _fits(query, value) else None
    return attend is not None and not _lacking(attend, softcap=softcap, dropout_p=dropout or None)


def can_varlen(
    query: Tensor,  # (1, H, T, C)
    value: Tensor,  # (1, G, T, C)
    softcap: float | None,
    dropout: float,
) -> bool:
    """Whether the PyTorch that is installed takes these tensors and options."""
    return softcap is None and not dropout and _fits(query, value) and load_varlen() is not None


def _fits(query: Tensor, value: Tensor) -> bool:
    is_narrow = max(query.shape[-1], value.shape[-1]) <= _WIDEST
    return query.is_cuda and working_dtype(query) in _SIXTEEN_BIT and is_narrow


def working_dtype(query: Tensor) -> torch.dtype:
    """Under autocast a rotation or a norm may leave queries in float32."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def flash_varlen(
    query: Tensor,  # (1, H, T, C)
    key: Tensor,  # (1, G, T, C)
    value: Tensor,  # (1, G, T, C)
    row_layout: RowLayout,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (1, T, H, C)
    """flash-attn's: spans are its sequences, keys put together for each.

    Keys and values of a trunk stand there once for every span that sees them. The call is
    deterministic where the version has the option.
    """
    attend = load_flash()
    assert attend is not None
    asked = {
        "softmax_scale": scale,
        "causal": True,
        # flash-attn counts the keys before the query's own.
        "window_size": None if window is None else (window - 1, 0),
        "softcap": softcap,
        "dropout_p": dropout or None,
    }
    options: dict[str, Any] = {k: v for k, v in asked.items() if v is not None}
    lacking = _lacking(attend, **options)
    if lacking:
        raise UsageError(
            f"this version of flash-attn has no {', '.join(lacking)}, which the model asks for; "
            "install another, or take attention='auto'"
        )
    if not _lacking(attend, deterministic=True):
        options["deterministic"] = True
    spans = row_layout.varlen(query.device)
    out = attend(
        *_as_sequences("flash-attn", query, key, value, row_layout),
        cu_seqlens_q=spans.cu_seqlens_q,
        cu_seqlens_k=spans.cu_seqlens_k,
        max_seqlen_q=spans.max_seqlen_q,
        max_seqlen_k=spans.max_seqlen_k,
        **options,
    )
    # Some versions return the log-sum-exp as well.
    return (out[0] if isinstance(out, tuple) else out)[None, ..., : value.shape[-1]]


def _lacking(attend: Callable[..., Any], **options: Any) -> list[str]:
    """Options that are set and that the function has no parameter for."""
    known = inspect.signature(attend).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return []
    return sorted(
        name for name, value in options.items() if value is not None and name not in known
    )


def torch_varlen(
    query: Tensor,  # (1, H, T, C)
    key: Tensor,  # (1, G, T, C)
    value: Tensor,  # (1, G, T, C)
    row_layout: RowLayout,
    scale: float,
    window: int | None,
) -> Tensor:  # (1, T, H, C)
    """PyTorch's, as `flash_varlen`.

    Causal mask and window are aligned to the last query and the last key of each sequence, as a
    span needs it. PyTorch's documentation does not say so; `plad_fast.models.sharing.prepare` would
    find another alignment. Gradients repeat bit for bit under
    `torch.use_deterministic_algorithms(True)` only.
    """
    attend = load_varlen()
    assert attend is not None
    spans = row_layout.varlen(query.device)
    out = attend(
        *_as_sequences("varlen_attn", query, key, value, row_layout),
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


def _as_sequences(
    taker: str,
    query: Tensor,  # (1, H, T, C)
    key: Tensor,  # (1, G, T, C)
    value: Tensor,  # (1, G, T, C)
    row_layout: RowLayout,
) -> tuple[Tensor, Tensor, Tensor]:  # (T, H, W), (K, G, W), (K, G, W)
    """All in the working type and of one width W, a multiple of `_WIDTHS`: zeros fill it up.

    Raises UsageError where `taker` does not take that type.
    """
    dtype = working_dtype(query)
    if dtype not in _SIXTEEN_BIT:
        raise UsageError(
            f"{taker} takes bfloat16 and float16, not {dtype}; train with bf16=True, or "
            "take attention='auto'"
        )
    widest = max(query.shape[-1], value.shape[-1])
    widest += -widest % _WIDTHS
    query, key, value = (
        nn.functional.pad(x, (0, widest - x.shape[-1])).to(dtype) for x in (query, key, value)
    )
    keys, values = (
        torch.cat(row_layout.by_span(x), dim=2).squeeze(0).transpose(0, 1) for x in (key, value)
    )
    return query.squeeze(0).transpose(0, 1), keys, values
