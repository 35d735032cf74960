"""The router loss of mixtures of experts equals what a model adds to its own loss."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.head import causal_lm_logprobs
from plad_fast.models.router import asks_for_router_loss, check_router_loss, router_losses
from plad_fast.models.sharing import prepare
from plad_fast.training.metrics import PreferenceMeter
from tests.models.test_head import FEATURES
from tests.support.encoder_decoders import make_model as make_encoder_decoder
from tests.support.tiny_configs import causal_lm_families, has_family, make_causal_lm
from tests.support.trainings import PAIRS, assert_same_weights, last_log, weights
from tests.training.test_trainer import naive_logps

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "jetmoe"]


def model_of(family):
    if not has_family(family):
        pytest.skip(f"this transformers has no {family}")
    if family == "jetmoe" and transformers.__version__ < "5":
        pytest.skip("in transformers 4 its own forward fails with a router loss")
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


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_count_their_tokens(family):
    """As padded rows do, a shared prompt for each of its responses: value and gradients."""
    model = model_of(family)
    if prepare(model) == "padded":
        pytest.skip("its rows are padded")
    found = []
    for layout in ("padded", "packed", "shared"):
        assert prepare(model, layout) == layout
        with router_losses(model) as losses:
            causal_lm_logprobs(model, PreferenceCollator(0, 2, layout=layout)(FEATURES))
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(losses[0], parameters, allow_unused=True)
        flat = [grad.flatten() for grad in grads if grad is not None]
        found.append(torch.cat([losses[0].detach()[None], *flat]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_the_coefficient_may_be_the_callers():
    model = model_of("mixtral")
    batch = PreferenceCollator(pad_token_id=0, group_size=2)(FEATURES)
    found = []
    for coefficient in (None, 1.0, 0.25):
        with router_losses(model, coefficient=coefficient) as losses:
            causal_lm_logprobs(model, batch)
        found += losses
    torch.testing.assert_close(found[0], model.config.router_aux_loss_coef * found[1])
    torch.testing.assert_close(found[2], found[1] / 4)


@pytest.mark.parametrize("budget", [None, 60])
def test_trainer_adds_it(budget, make, tiny_tokenizer):
    """Over the batches of a step, or the micro-batches of a batch, as a mean over groups."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 2.0}
    model = model_of("mixtral")
    model.resize_token_embeddings(len(tiny_tokenizer))
    start = copy.deepcopy(model)
    trainer = make(
        model=model, layout="padded", max_tokens_per_batch=budget, eval_rows=PAIRS, **options
    )
    collated, collate = [], trainer._batches.collator
    trainer._batches.collator = lambda features: collated.append(features) or collate(features)
    trainer.train()
    batches = collated.copy()
    assert (len(batches) == 2) == (budget is None)

    sums, _ = naive_logps(start, tiny_tokenizer, PAIRS)
    loss = torch.relu(2.0 - sums[:, 0] + sums[:, 1]).mean()
    routing = 0.0
    for features in batches:
        batch = collate(features)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        aux = start(**inputs, output_router_logits=True).aux_loss
        routing = routing + len(features) / 8 * start.config.router_aux_loss_coef * aux
    (loss + routing).backward()
    with torch.no_grad():
        for parameter in start.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert last_log(trainer)["router_loss"] == pytest.approx(routing.item(), rel=1e-4)
    assert last_log(trainer)["loss"] == pytest.approx((loss + routing).item(), rel=1e-4)
    assert_same_weights(weights(trainer), dict(start.named_parameters()), rtol=1e-3, atol=1e-5)
    found = trainer.evaluate()
    # What counts is the config as it was when the trainer was made.
    trainer.model.config.output_router_logits = False
    again = trainer.evaluate()
    assert [again[name] for name in ("eval_loss", "eval_router_loss")] == pytest.approx(
        [found[name] for name in ("eval_loss", "eval_router_loss")]
    )
    trainer._has_router_loss = False
    trainer._eval_meter = PreferenceMeter(trainer._objective)
    assert found["eval_loss"] - trainer.evaluate()["eval_loss"] == pytest.approx(
        found["eval_router_loss"], rel=1e-3
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_keep_its_gradient_or_are_refused(reentrant, make, tiny_tokenizer):
    """Re-entrant ones take the router logits without a graph."""
    model, found = model_of("mixtral"), []
    model.resize_token_embeddings(len(tiny_tokenizer))
    for checkpointed in (False, True):
        trainer = make(
            model=copy.deepcopy(model),
            loss=lambda logps: 0 * logps.sum(1),
            gradient_checkpointing=checkpointed,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointed else None,
        )
        before = weights(trainer)
        if reentrant and checkpointed:
            with pytest.raises(UsageError, match="re-entrant gradient checkpointing"):
                trainer.train()
            return
        trainer.train()
        found.append(weights(trainer))
    gates = [name for name in before if "gate.weight" in name]
    assert gates
    assert not any(torch.equal(found[0][name], before[name]) for name in gates)
    assert_same_weights(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_satisfied_groups_are_not_skipped(make, tiny_tokenizer):
    """Their hinge has no gradient, and the router loss has one."""
    model = model_of("mixtral")
    model.resize_token_embeddings(len(tiny_tokenizer))
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make(model=model, loss=lambda logps: 0 * logps.sum(1), max_steps=3)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("gate" in name for name in moved)
    assert not any("lm_head" in name for name in moved)
    assert "skipped_backwards" not in last_log(trainer)


def test_what_has_none_or_an_encoder_is_refused_before_training(make, tiny_model):
    model = copy.deepcopy(tiny_model)
    model.config.output_router_logits = True
    with pytest.raises(UsageError, match="LlamaForCausalLM has none"):
        make(model=model)
    model = make_encoder_decoder("t5")
    model.config.output_router_logits = True
    with pytest.raises(UsageError, match="encoder-decoder"):
        check_router_loss(model)


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
