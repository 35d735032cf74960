"""Fingerprints that keep log-probabilities under different references, or of other rows, apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plad_fast.data.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]

# Entries of a config that do not change what the model computes.
_SILENT = {
    *("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
}
_BLOCK = 2**20  # entries of a weight hashed at once


def fingerprint(
    rows: Iterable[Mapping[str, Any]],
    model: PreTrainedModel,
    temperature: float,
    autocast: Autocast,
) -> dict[str, Any]:
    """Everything that reference log-probabilities depend on except rounding, as JSON values.

    Batch size, layout and backend change the rounding only and are left out.
    """
    device = next(model.parameters()).device.type
    with autocast():
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    config = {k: v for k, v in model.config.to_dict().items() if k not in _SILENT}
    hashed = hashlib.blake2b(digest_size=16)
    for row in rows:
        hashed.update(json.dumps([row["prompt_ids"], row["response_ids"]]).encode())
    return {
        "model": type(model).__name__,
        "config": digest(config),
        "weights": weights_digest(model),
        "adapters": adapters_digest(model),
        "tokens": hashed.hexdigest(),
        "temperature": temperature,
        "autocast": None if dtype is None else str(dtype),
    }


def adapters_digest(model: nn.Module) -> str | None:
    """Of PEFT's settings and of which adapters are in use, which no weight shows."""
    settings = getattr(model, "peft_config", None)
    if not isinstance(settings, Mapping):
        return None
    used = [
        (name, repr(module.active_adapters), repr(getattr(module, "scaling", None)))
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "adapter_layer_names")
    ]
    # The order of a set differs from process to process.
    plain = {
        name: {k: sorted(map(repr, v)) if isinstance(v, set) else v for k, v in vars(of).items()}
        for name, of in settings.items()
    }
    return digest([plain, used])


def weights_digest(model: nn.Module) -> str:
    """Of names, dtypes, shapes and bytes of all weights, read a block at a time.

    Adapters that are switched off (PEFT's `disable_adapter`) count as absent.
    """
    absent = tuple(
        f"{name}.{part}."
        for name, module in model.named_modules()
        if getattr(module, "disable_adapters", False)
        for part in getattr(module, "adapter_layer_names", ())
    )
    hashed = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        if not name.startswith(absent):
            hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            for block in weight.reshape(-1).split(_BLOCK):
                hashed.update(block.cpu().view(torch.uint8).numpy())
    return hashed.hexdigest()
