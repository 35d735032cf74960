"""flash-attn's variable-length attention over a packed row."""

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

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
WIDEST = 256
"""Channels of a head that the kernels take."""

_PACKAGES = ("flash_attn_interface", "flash_attn")  # version 3 first


@functools.cache
def load_flash() -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of the newest flash-attn that is installed, or None."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return None
    for package in _PACKAGES:
        try:
            return importlib.import_module(package).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        except Exception as error:  # a build for another torch breaks in its own ways
            logger.warning("%s is installed and does not load: %s", package, error)
    return None


def can_flash(
    query: Tensor,  # (1, H, T, C)
    value: Tensor,  # (1, G, T, C)
    softcap: float | None,
    dropout: float,
) -> bool:
    """Whether an installed flash-attn takes these tensors and options."""
    if not query.is_cuda or working_dtype(query) not in SIXTEEN_BIT:
        return False
    attend = load_flash()
    if attend is None or max(query.shape[-1], value.shape[-1]) > WIDEST:
        return False
    return not _lacking(attend, softcap=softcap, dropout_p=dropout or None)


def _lacking(attend: Callable[..., Any], **options: Any) -> list[str]:
    """Options that are set and that the function has no parameter for."""
    known = inspect.signature(attend).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return []
    return sorted(
        name for name, value in options.items() if value is not None and name not in known
    )


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
    """One call for the whole row: spans are its sequences, keys put together for each.

    Keys and values of a trunk stand there once for every span that sees them. The call is
    deterministic where the version has the option.
    """
    attend = load_flash()
    assert attend is not None
    require_sixteen_bit("flash-attn", query)
    spans = row_layout.varlen(query.device)
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
    sequences = as_sequences(query, key, value, row_layout)
    out = attend(
        *sequences,
        cu_seqlens_q=spans.cu_seqlens_q,
        cu_seqlens_k=spans.cu_seqlens_k,
        max_seqlen_q=spans.max_seqlen_q,
        max_seqlen_k=spans.max_seqlen_k,
        **options,
    )
    # Some versions return the log-sum-exp as well.
    return (out[0] if isinstance(out, tuple) else out)[None, ..., : value.shape[-1]]


def require_sixteen_bit(what: str, query: Tensor) -> None:
    """Raises UsageError where the queries are of another type, which `what` does not take."""
    dtype = working_dtype(query)
    if dtype not in SIXTEEN_BIT:
        raise UsageError(
            f"{what} takes bfloat16 and float16, not {dtype}; train with bf16=True, or "
            "take attention='auto'"
        )


def as_sequences(
    query: Tensor,  # (1, H, T, C)
    key: Tensor,  # (1, G, T, C)
    value: Tensor,  # (1, G, T, C)
    row_layout: RowLayout,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # (T, H, W), (K, G, W), (K, G, W)
    """Queries of the row, and the K keys and values that its spans see, span behind span.

    All are of the working type and of one width W, a multiple of `multiple`: zeros fill it up.
    """
    dtype = working_dtype(query)
    widest = max(query.shape[-1], value.shape[-1])
    widest += -widest % multiple
    query, key, value = (
        nn.functional.pad(x, (0, widest - x.shape[-1])).to(dtype) for x in (query, key, value)
    )
    keys, values = (
        torch.cat(row_layout.by_span(x), dim=2).squeeze(0).transpose(0, 1) for x in (key, value)
    )
    return query.squeeze(0).transpose(0, 1), keys, values
