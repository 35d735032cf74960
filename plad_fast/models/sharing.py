"""Packed rows and shared prompts for a model: found to work, or refused.

A wrong attention trains without complaint. So the structure is looked at (does every layer ask the
registered attention, with the window its config names?), and the result is compared with that of
padded rows on a short group.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from plad_fast.data.packing import LAYOUTS, PreferenceBatch, PreferenceCollator, to_device
from plad_fast.data.row_layout import Attended, RowLayout
from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model, token_limits
from plad_fast.models.attention.packed import IMPLEMENTATIONS, NotPackedError
from plad_fast.models.attention.register import enable, is_enabled
from plad_fast.models.attention.varlen import working_dtype
from plad_fast.models.encoder_decoder import is_encoder_decoder
from plad_fast.models.head import batch_hidden, causal_lm_logprobs, evaluating

logger = logging.getLogger(__name__)

# Two groups, so that a leak from one to the next would show; lengths differ.
_PROMPTS, _RESPONSES = (40, 24), ((20, 12), (9, 15))
# Nats by which log-probabilities may differ in the mean over tokens. SmolLM2-135M in bfloat16, on
# random tokens: rounding 0.06, wrong positions 0.2, a leak 0.4, a lost prompt 0.9.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 0.15
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def prepare(
    model: nn.Module, layout: str = "auto", *, attention: str = "auto", check: bool = True
) -> str:
    """Gets a model ready for packed rows, and says which layout to collate for it.

    Args:
        model: a causal or encoder-decoder LM, whole and not wrapped, or PEFT around one.
        layout: "shared", "packed", "padded", or "auto": shared if the model can, else padded, with
            a warning that says why. An encoder-decoder model has a layout of its own, which "auto"
            and "encoder_decoder" ask for.
        attention: see `plad_fast.models.attention.register.enable`.
        check: compare log-probabilities of a short group in the two layouts, which takes a few
            forward passes.

    Returns:
        "shared", "packed", "padded" or "encoder_decoder".

    Raises:
        UsageError: an unknown name; a layout that was asked for by name and that the model cannot
            take; log-probabilities that differ.
    """
    if layout not in ("auto", *LAYOUTS):
        raise UsageError(f"unknown layout {layout!r}; known: auto, {', '.join(LAYOUTS)}")
    if attention not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise UsageError(f"unknown attention {attention!r}; known: auto, {known}")
    lm = base_model(model)
    family = type(lm).__name__
    if is_encoder_decoder(model):
        if layout not in ("auto", "encoder_decoder"):
            raise UsageError(
                f"layout {layout!r} puts prompt and response into one row, and {family} is an "
                "encoder-decoder model; use layout='auto'"
            )
        return "encoder_decoder"
    if layout == "encoder_decoder":
        raise UsageError(
            f"layout {layout!r} needs an encoder, which {family} has not; use layout='auto'"
        )
    if layout == "padded":
        return layout
    before = lm.config._attn_implementation
    reason: str | None = f"{family} does not use transformers' attention interface"
    if lm._can_set_attn_implementation():
        enable(lm, attention)
        reason = _why_not_packed(model, attention)
    if reason is not None:
        if is_enabled(lm):
            lm.set_attn_implementation(before)
        if layout != "auto":
            raise UsageError(
                f"layout {layout!r} is not possible: {reason}; use layout='padded' or 'auto'"
            )
        logger.warning("prompts are not shared and rows are padded: %s", reason)
        return "padded"
    chosen = "shared" if layout == "auto" else layout
    if check:
        _check(model, chosen)
    return chosen


def _why_not_packed(model: nn.Module, attention: str) -> str | None:
    """The trait of the model's structure that stands against packed rows, or None."""
    lm = base_model(model)
    family, config = type(lm).__name__, lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    unknown = sorted(set(kinds) - _KNOWN_LAYERS)
    if unknown:
        return f"{family} has layers of the kind {', '.join(unknown)}"
    if getattr(config, "attention_chunk_size", None):
        return f"{family} attends in chunks"
    # Not in all of the model: convolutions of an audio tower never meet a token.
    if any(isinstance(module, nn.Conv1d) for module in (lm.get_decoder() or lm).modules()):
        return f"{family} has convolutions, which see across the borders of a row's parts"
    trace: list[Attended] = []
    layout = RowLayout(((2, 1, 2), (1, 1)), trace)
    batch = PreferenceBatch(
        input_ids=torch.zeros(1, layout.num_tokens, dtype=torch.long),
        position_ids=layout.position_ids()[None],
        row_layout=layout,
    )
    try:
        with evaluating(model), torch.no_grad():
            batch_hidden(model, to_device(batch, _device_of(model)))
    except NotPackedError as error:
        return str(error)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a forward that takes no further arguments, say
        if attention != "auto":
            raise
        return f"{family} does not run on them ({type(error).__name__}: {error})"
    depth = config.num_hidden_layers
    if len(trace) != depth:
        return (
            f"{len(trace)} of the {depth} layers of {family} use transformers' attention interface"
        )
    windowed = [kind == "sliding_attention" for kind in kinds] or [_slides(config)] * depth
    if any(slides and note.window is None for slides, note in zip(windowed, trace, strict=True)):
        return f"{family} keeps the width of its sliding window to itself"
    return None


def _slides(config: Any) -> bool:
    """Whether all layers have a sliding window, in a config that does not list its layers."""
    used = getattr(config, "use_sliding_window", True)
    return bool(getattr(config, "sliding_window", None) and used)


def _check(model: nn.Module, layout: str) -> None:
    """Refuses a model that gives two short groups other log-probabilities than in padded rows."""
    limits, draw = token_limits(model), torch.Generator().manual_seed(0)
    room = (limits.positions or math.inf) - max(map(max, _RESPONSES))
    if room < 1:  # a model of so few positions trains on nothing longer either
        return

    def tokens(count: int) -> list[int]:
        # Ids that go in and come out: there may be more embeddings than rows of the head.
        vocab = min(limits.inputs, limits.outputs)
        return torch.randint(vocab, (count,), generator=draw).tolist()

    groups = [
        {
            "prompt_ids": tokens(int(min(prompt, room))),
            "response_ids": [tokens(count) for count in responses],
        }
        for prompt, responses in zip(_PROMPTS, _RESPONSES, strict=True)
    ]
    batches = [PreferenceCollator(0, 2, layout=name)(groups) for name in (layout, "padded")]
    with evaluating(model), torch.no_grad():
        found, expected = (
            causal_lm_logprobs(model, to_device(batch, _device_of(model))).token_logprobs.double()
            for batch in batches
        )
    difference = float((found - expected).abs().mean())
    dtype = working_dtype(next(model.parameters()))
    if dtype == torch.float32 and _rounds_products():
        dtype = torch.bfloat16  # TF32 has no more digits to speak of
    # NaN passes: `check_architecture` and the training report it.
    if difference > _TOLERANCE.get(dtype, _TOLERANCE_16_BIT):
        raise UsageError(
            f"{type(base_model(model)).__name__} gives other log-probabilities in the {layout} "
            f"layout than in the padded one (by {difference:.2g} nats a token); use "
            "layout='padded', and please report the model"
        )


def _rounds_products() -> bool:
    """Whether float32 operands may be multiplied as TF32."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set for a backend, by the newer names
        return True


def _device_of(model: nn.Module) -> torch.device:
    return base_model(model).get_input_embeddings().weight.device
