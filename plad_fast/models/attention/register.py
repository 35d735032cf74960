"""Packed attention in the place of a model's own, by transformers' `AttentionInterface`.

`enable(model)` puts it there. A call whose keyword arguments carry a `row_layout` is computed by
`packed_attention`, without a mask over the row; every other call, of `generate` for example, goes
to the function that was there before.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plad_fast.data.row_layout import RowLayout
from plad_fast.errors import UsageError
from plad_fast.models.attention.packed import packed_attention
from plad_fast.models.attention.varlen import load_flash, load_varlen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "plad_fast_"
_SOFTCAP = "attn_logit_softcapping"
_NAMES: dict[tuple[str, str], str] = {}
_ORIGINALS: dict[str, str] = {}
_packed_forward = False


def enable(model: PreTrainedModel, implementation: str = "auto") -> None:
    """Lets a model's attention take packed rows. Calling it again changes the implementation.

    Args:
        model: a transformers model whose attention goes through `AttentionInterface`; whether it
            does, `plad_fast.models.sharing.prepare` finds out.
        implementation: "sdpa", "flash", "varlen", "flex", "eager", or "auto": the first of flash,
            varlen, sdpa and eager that is there, takes the tensors and has what the model asks for.
    """
    if implementation == "flash" and load_flash() is None:
        raise UsageError(
            "attention='flash' needs flash-attn on an NVIDIA GPU of compute capability 8.0 or "
            "newer (version 3: 9.0); `pip install flash-attn`, or take attention='auto'"
        )
    if implementation == "varlen" and load_varlen() is None:
        raise UsageError(
            "attention='varlen' needs PyTorch 2.12 or newer on an NVIDIA GPU of compute capability "
            "8.0 or newer; take attention='auto'"
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
