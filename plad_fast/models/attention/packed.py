"""Attention over packed rows, registered with transformers' `AttentionInterface`.

`enable(model)` puts it in the place of the model's own attention function. A call whose keyword
arguments carry a `row_layout` is computed here, without a mask over the row; every other call, of
`generate` for example, goes to the function that was there before.

Implementations, all of the same result:

* "flash": one call of flash-attn's `flash_attn_varlen_func` (versions 2 and 3, or the builds of
  Hugging Face's `kernels`), in 16-bit types on NVIDIA GPUs;
* "sdpa": PyTorch's scaled_dot_product_attention, a call for every span of the row;
* "flex": PyTorch's flex_attention with a block mask, compiled on CUDA;
* "eager": plain products, for what the others lack: sinks, and softcap without flash-attn.

T tokens in the row, H heads of the queries, G of the keys (H is a multiple of G), C channels.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plad_fast.data.row_layout import Attended, RowLayout, Span
from plad_fast.errors import UsageError
from plad_fast.models.attention.flash import can_flash, flash_varlen, load_flash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("sdpa", "flash", "flex", "eager")
_PREFIX = "plad_fast_"
# What transformers may hand to an attention function and what changes its result.
_UNKNOWN = (
    "position_bias", "alibi", "head_mask", "cache", "block_table", "indices", "block_indices",
    "sinks",
)  # fmt: skip


_SOFTCAP = "attn_logit_softcapping"


class NotPackedError(UsageError):
    """A layer asks for what packed rows do not have."""


def check_implementation(name: str) -> None:
    """Raise a UsageError unless there is an implementation of that name, installed or not."""
    if name not in ("auto", *IMPLEMENTATIONS):
        raise UsageError(f"unknown attention {name!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")


def enable(model: PreTrainedModel, implementation: str = "auto") -> None:
    """Lets a model's attention take packed rows; see the module. Calling it again changes the
    implementation.

    Args:
        model: a transformers model whose attention goes through `AttentionInterface`; whether it
            does, `plad_fast.models.sharing.prepare` finds out.
        implementation: "sdpa", "flash", "flex", "eager", or "auto": flash where it is installed
            and the tensors allow it, sdpa where that knows what the model asks for, else eager.

    Raises:
        UsageError: an unknown implementation, or flash where it is not installed.
    """
    check_implementation(implementation)
    if implementation == "flash" and load_flash(from_hub=True) is None:
        raise UsageError(
            "attention='flash' needs flash-attn on an NVIDIA GPU of compute capability 8.0 or "
            "newer; `pip install flash-attn`, or take attention='auto'"
        )
    original = model.config.get_text_config()._attn_implementation or "eager"
    if original.startswith(_PREFIX):
        original = _ORIGINALS[original]
    if original == "sdpa" and getattr(model.config.get_text_config(), _SOFTCAP, None) is not None:
        # transformers 4 loads such models with sdpa, which leaves the softcap out.
        original = "eager"
    # Neither "flash" nor "sdpa" may be in the name: transformers would take it for its own.
    name = f"{_PREFIX}{len(_NAMES)}"
    name = _NAMES.setdefault((implementation, original), name)
    _ORIGINALS[name] = original
    AttentionInterface.register(name, _attention_of(implementation, original))
    # Without a mask function of its own the model makes none: right for packed rows, and for the
    # rest the one of the original.
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
    if make_mask is not None:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _without_packed(make_mask))
    model.set_attn_implementation(name)


_NAMES: dict[tuple[str, str], str] = {}
_ORIGINALS: dict[str, str] = {}
_packed_forward = False


class packed_forward:  # noqa: N801 (a context manager, as those of torch)
    """Within it models build no attention mask."""

    def __enter__(self) -> None:
        global _packed_forward
        self._before, _packed_forward = _packed_forward, True

    def __exit__(self, *_: object) -> None:
        global _packed_forward
        _packed_forward = self._before


def _without_packed(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_mask)
    def mask(*args: Any, **kwargs: Any) -> Any:
        return None if _packed_forward else make_mask(*args, **kwargs)

    return mask


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether `enable` was called on the model."""
    return (model.config.get_text_config()._attn_implementation or "").startswith(_PREFIX)


def _attention_of(implementation: str, original: str) -> Callable[..., tuple[Tensor, Any]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        row_layout: RowLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if row_layout is None:
            with _under_its_name(original, module):
                attend = _original(original, module)
                return attend(module, query, key, value, attention_mask, **kwargs)
        return packed_attention(
            module, query, key, value, row_layout, implementation=implementation, **kwargs
        ), None

    return attention


@contextlib.contextmanager
def _under_its_name(name: str, module: nn.Module) -> Iterator[None]:
    """transformers loads the flash-attn that the config names, in the middle of the call."""
    if "flash" not in name:
        yield
        return
    config: Any = module.config
    before, config._attn_implementation_internal = config._attn_implementation_internal, name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _original(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function of that name; each modelling file has an "eager" of its own."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    for kind in type(module).__mro__:  # a class of the user's may derive from the model's
        if found := getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None):
            return found
    raise UsageError(f"{type(module).__name__} has no eager attention; load the model with sdpa")


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

    Raises:
        UsageError: an argument that has no meaning here (a position bias, say), a row of another
            length, or an implementation that lacks what was asked for.
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
    if name == "auto" or (name == "flash" and not query.is_cuda and torch.cuda.is_available()):
        name = _choose(query, value, softcap, s_aux, dropout)
    lacking = {"sdpa": softcap is not None or s_aux is not None, "flash": s_aux is not None}
    if lacking.get(name) or (name == "flex" and (s_aux is not None or dropout)):
        raise UsageError(
            f"attention={name!r} lacks the softcap, sink or dropout that {type(module).__name__} "
            "asks for; use attention='auto'"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    arguments = (query, key, value, row_layout)
    if name == "flash":
        return flash_varlen(*arguments, scale, dropout, sliding_window, softcap)
    if name == "flex":
        return _flex(*arguments, scale, sliding_window, softcap)
    attend = functools.partial(_sdpa, scale=scale, dropout=dropout)
    if name == "eager":
        attend = functools.partial(
            _eager, scale=scale, dropout=dropout, softcap=softcap, sinks=s_aux
        )
    return _by_spans(*arguments, sliding_window, attend)


def _choose(
    query: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None, dropout: float
) -> str:
    """What "auto" stands for."""
    if sinks is None and can_flash(query, value, softcap, dropout):
        return _told("flash")
    return _told("eager" if sinks is not None or softcap is not None else "sdpa")


@functools.cache
def _told(name: str) -> str:
    logger.info("attention over packed rows: %s", name)
    return name


def _by_spans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_layout: RowLayout,
    window: int | None,
    attend: Callable[..., Tensor],
) -> Tensor:
    """A call of `attend` for every span."""
    spans = row_layout.spans
    queries = query.split([span.stop - span.start for span in spans], dim=2)
    seen = zip(queries, row_layout.by_span(key), row_layout.by_span(value), strict=True)
    outputs = [
        attend(q, k, v, _mask_of(span, row_layout, window, q.device))
        for span, (q, k, v) in zip(spans, seen, strict=True)
    ]
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1)


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
