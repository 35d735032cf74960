"""Scales, caps and weights of a head as its model has them, or a refusal by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from plad_fast.errors import UsageError
from plad_fast.models.head import check_architecture
from plad_fast.models.lm_head import find_head
from tests.models.test_head import COMMON, build

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_unknown_scale_is_refused_by_name():
    """Some models multiply by an entry of that name, others divide by it or ignore it."""
    model = build("Llama", logit_scale=0.5)
    with pytest.raises(UsageError, match=r"config\.logit_scale is 0\.5"):
        find_head(model)


@pytest.mark.parametrize("family", ["Gemma3", "AyaVision"])
def test_text_part_of_a_larger_model_is_seen(family):
    """Batches of text alone. Both ignore what their text model's config says on scale or cap."""
    text = {"final_logit_softcapping": 2.0}
    if family == "AyaVision":
        text = {"model_type": "cohere2", "logit_scale": 0.25}
    config = getattr(transformers, f"{family}Config")(
        text_config={**COMMON, "head_dim": 8, **text},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    head = find_head(model)
    assert (head.softcap, head.logit_scale) == (None, 1.0)
    check_architecture(model)


def test_scale_of_a_larger_model_is_not_guessed():
    """What a model of text and images does with its text model's entries is its own affair."""
    config = transformers.LlavaConfig(
        text_config={**COMMON, "model_type": "gemma2", "head_dim": 8},
        vision_config={**VISION, "model_type": "clip_vision_model"},
    )
    with pytest.raises(UsageError, match="final_logit_softcapping is 30"):
        find_head(transformers.LlavaForConditionalGeneration(config))


class LoraLinear(nn.Module):
    """Stands for PEFT's wrapper, which holds a linear layer without being one."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.weight = base.weight


def test_unsafe_heads_are_refused():
    model = build("Llama")
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(UsageError, match="LoraLinear"):
        find_head(model)

    model = build("Llama")
    model.lm_head.weight = nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves outside of forward
    with pytest.raises(UsageError, match="sharded"):
        find_head(model)

    with torch.device("meta"), pytest.raises(UsageError, match="meta device"):
        find_head(build("Llama"))

    with pytest.raises(UsageError, match="no LM head"):
        find_head(build("Llama").model)

    with pytest.raises(UsageError, match="not a transformers model"):
        find_head(nn.Linear(2, 2))
