"""Whether rows of a model may come and go: found out, not believed.

A cache that is not what it looks like gives wrong answers without complaint. So the layers are
looked at, and then a few tokens are decoded both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plad_fast.adapted_layers import vocabulary_size
from plad_fast.errors import UsageError
from plad_fast.head import base_model
from plad_fast.pairs.refill import RowDecoder, UnsuitableError

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_KNOWN_CACHES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
# Lengths of two prompts and of one that takes the place of the first.
_PROMPTS = (9, 5, 7)
# Nats by which log-probabilities may differ in the mean, rounding (TF32 too) and no more: see
# `plad_fast.sharing` for what errors amount to.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2}
_TOLERANCE_16_BIT = 0.15


def why_not_refill(model: Any, pad: int) -> str | None:
    """None, or what stands against rows that come and go.

    Call it in evaluation and inference mode. Takes a few forward passes of a few tokens.
    """
    lm = base_model(model)
    family = type(lm).__name__
    if lm.config.is_encoder_decoder:
        return f"{family} has an encoder"
    config = lm.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or []) - _KNOWN_LAYERS
    if unknown:
        return f"{family} has layers of the kind {', '.join(sorted(unknown))}"
    if getattr(config, "attention_chunk_size", None):
        return f"{family} attends in chunks"
    try:
        unknown = _cache_layers(config) - _KNOWN_CACHES
        if unknown:
            return f"{family} keeps {', '.join(sorted(unknown))} in its cache"
        difference = _difference(model, pad)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except UnsuitableError as error:
        return f"{family}: {error}"
    except Exception as error:  # a forward that takes other arguments, say
        return f"{family} does not decode row by row ({type(error).__name__}: {error})"
    dtype = next(model.parameters()).dtype
    # NaN passes: generation reports it, with the prompt.
    if difference > _TOLERANCE.get(dtype, _TOLERANCE_16_BIT):
        return f"{family} then gives other log-probabilities (by {difference:.2g} nats a token)"
    return None


def _cache_layers(config: Any) -> set[str]:
    from transformers import DynamicCache

    return {type(layer).__name__ for layer in DynamicCache(config=config).layers}


def _difference(model: Any, pad: int) -> float:
    """Mean difference from whole sequences, one at a time and without a cache."""
    vocab = vocabulary_size(model)
    draw = torch.Generator().manual_seed(0)
    first, stays, comes = (
        torch.randint(vocab, (length + 2,), generator=draw).tolist() for length in _PROMPTS
    )
    n_first, n_stays, n_comes = _PROMPTS
    decoder = RowDecoder(model, 2, pad, slack=1)
    found = [decoder.admit([first[:n_first], stays[:n_stays]], [1, 1])]
    found.append(decoder.step([first[n_first], stays[n_stays]]))
    decoder.drop(0)
    found.append(decoder.admit([comes[:n_comes]], [1]))
    found.append(decoder.step([stays[n_stays + 1], comes[n_comes]]))
    ends = (
        first[:n_first], stays[:n_stays], first[: n_first + 1], stays[: n_stays + 1],
        comes[:n_comes], stays, comes[: n_comes + 1],
    )  # fmt: skip
    expected = [_whole(model, ids) for ids in ends]
    distance = torch.cat(found).float().log_softmax(-1) - torch.stack(expected)
    # Masked logits are -inf both ways.
    return float(distance[distance.isfinite()].abs().mean())


def _whole(model: Any, ids: list[int]) -> Tensor:  # (V,)
    logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
    return logits.float().log_softmax(-1)
