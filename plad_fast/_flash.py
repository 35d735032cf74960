"""flash-attn's variable-length attention over a packed row."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plad_fast.errors import UsageError
from plad_fast.row_layout import RowLayout

logger = logging.getLogger(__name__)

# Version 3 first. The last one is a repository that `kernels` loads, if the user has it.
_PACKAGES = ("flash_attn_interface", "flash_attn")
_HUB_KERNEL = "kernels-community/flash-attn2"


@functools.cache
def load_flash() -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of the newest flash-attn that is installed, or None."""
    if not torch.cuda.is_available():
        return None
    for package in _PACKAGES:
        try:
            return importlib.import_module(package).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        except Exception as error:  # a build for another torch breaks in its own ways
            logger.warning("%s is installed and does not load: %s", package, error)
    try:
        hub = importlib.import_module("kernels")
        return hub.get_kernel(_HUB_KERNEL).flash_attn_varlen_func
    except Exception:  # not installed, not downloaded, not for this GPU
        return None


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

    Raises:
        UsageError: tensors that are not of 16 bits, or an option that the version lacks.
    """
    attend = load_flash()
    assert attend is not None
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(
            f"flash-attn takes bfloat16 and float16, not {query.dtype}; train with bf16=True, or "
            "take attention='auto'"
        )
    spans = row_layout.varlen(query.device)
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if window is not None:
        # flash-attn counts the keys before the query's own.
        options["window_size"] = (window - 1, 0)
    if softcap is not None:
        options["softcap"] = softcap
    if dropout:
        options["dropout_p"] = dropout
    known = inspect.signature(attend).parameters
    lacking = sorted(set(options) - set(known))
    if lacking:
        raise UsageError(
            f"this version of flash-attn has no {', '.join(lacking)}, which the model asks for; "
            "install another, or take attention='auto'"
        )
    if "deterministic" in known:
        options["deterministic"] = True
    seen = (torch.cat(row_layout.by_span(x), dim=2)[0].transpose(0, 1) for x in (key, value))
    out = attend(
        query[0].transpose(0, 1),
        *seen,
        cu_seqlens_q=spans.cu_seqlens_q,
        cu_seqlens_k=spans.cu_seqlens_k,
        max_seqlen_q=spans.max_seqlen_q,
        max_seqlen_k=spans.max_seqlen_k,
        **options,
    )
    # Some versions return the log-sum-exp as well.
    return (out[0] if isinstance(out, tuple) else out)[None]
