"""The router loss of mixtures of experts equals what a model adds to its own loss."""

from __future__ import annotations

import pytest
import torch

from plad_fast.errors import UsageError
from plad_fast.head import causal_lm_logprobs
from plad_fast.packing import PreferenceCollator
from plad_fast.router import asks_for_router_loss, router_losses
from plad_fast.sharing import prepare
from tests.test_head import FEATURES
from tests.tiny_configs import causal_lm_families, has_family, make_causal_lm

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "jetmoe"]


def model_of(family):
    if not has_family(family):
        pytest.skip(f"this transformers has no {family}")
    model = make_causal_lm(family, causal_lm_families()[family])
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_model_adds(family):
    """Value and gradients, without padding. The model's own loss is cross-entropy plus it."""
    model = model_of(family)
    batch = PreferenceCollator(pad_token_id=0, group_size=2)(FEATURES)
    with router_losses(model) as losses:
        sums = causal_lm_logprobs(model, batch).sums
    assert torch.equal(sums, causal_lm_logprobs(model, batch).sums)

    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    own = model(**inputs, labels=labels, output_router_logits=True).loss
    bare = model(**inputs, labels=labels, output_router_logits=False).loss
    (loss,) = losses
    assert loss > 0
    torch.testing.assert_close(loss, own - bare, rtol=1e-3, atol=1e-5)

    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(own - bare, parameters, allow_unused=True, materialize_grads=True)
    assert any(gradient.any() for gradient in ours)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_packed_rows_count_their_tokens():
    """Without prompts to share, packed rows have the tokens of padded ones, and the same loss."""
    model = model_of("mixtral")
    found = []
    for layout in ("padded", "packed"):
        assert prepare(model, layout) == layout
        with router_losses(model) as losses:
            causal_lm_logprobs(model, PreferenceCollator(0, 2, layout=layout)(FEATURES))
        found += losses
    torch.testing.assert_close(*found)


def test_a_model_without_one_is_refused():
    model = model_of("qwen3")
    batch = PreferenceCollator(pad_token_id=0, group_size=2)(FEATURES)
    with pytest.raises(UsageError, match="Qwen3ForCausalLM has none"), router_losses(model):
        causal_lm_logprobs(model, batch)
    model.config.output_router_logits = False
    assert not asks_for_router_loss(model)
    with router_losses(model) as losses:
        causal_lm_logprobs(model, batch)
    assert losses == []
