"""The trainer on adapters: their steps, the base as reference, checkpoints, merged models.

The yardstick is what PEFT's own forward computes.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.models.loading import load_model
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.training import reference_logps
from tests.models.test_adapters import quantise
from tests.support.trainings import PAIRS, assert_same_weights, last_log, weights
from tests.training.test_trainer import naive_logps

peft = pytest.importorskip("peft")

BODY = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def adapt(tiny_model):
    """Adapts a copy of the tiny model; the adapters are moved, so that they are not its base."""

    def make(seed=1, tied=False, quantised=False, **options):
        model = copy.deepcopy(tiny_model)
        if quantised:  # the body alone, as in QLoRA
            quantise(model.model)
        if tied:
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.model.embed_tokens.weight
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=3, lora_alpha=5, **{"target_modules": BODY, **options})
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


def add_adapter(model, config):
    try:
        model.add_adapter(config)
    except (ValueError, TypeError) as error:
        # transformers 5.24 asks for 0.22, which was not out; 4.57 hands AdaLoRA what 0.15 lacks.
        if "version of PEFT" in str(error) or "low_cpu_mem_usage" in str(error):
            pytest.skip("this transformers wants a newer PEFT")
        raise


@pytest.mark.parametrize("attached", ["by PEFT", "by transformers"])
def test_a_term_that_pefts_forward_adds_to_the_loss_is_refused(attached, make, tiny_model):
    """AdaLoRA's, which keeps its matrices orthogonal."""

    def adapted(**options):
        model = copy.deepcopy(tiny_model)
        schedule = {"total_step": 10, "tinit": 2, "tfinal": 2}
        config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, **schedule, **options)
        if attached == "by PEFT":
            return peft.get_peft_model(model, config)
        add_adapter(model, config)
        return model

    with pytest.raises(
        UsageError, match=r"AdaLoraConfig has orth_reg_weight=0.5.* with orth_reg_weight=0.0"
    ):
        make(model=adapted())
    make(model=adapted(orth_reg_weight=0.0)).train()


CASES = {
    "body": {},
    "with a task": {"task_type": "CAUSAL_LM"},
    "head": {"target_modules": [*BODY, "lm_head"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": [*BODY, "embed_tokens"]},
    "tokens": {"trainable_token_indices": [2, 7, 33]},
    "quantised": {"quantised": True},
}


@pytest.mark.parametrize("case", CASES)
def test_first_step_against_the_base_equals_the_naive_one(case, adapt, make, tiny_tokenizer):
    """DPO whose reference is the base, which never exists a second time."""
    model = adapt(**CASES[case])
    trainer = make(
        model=model, loss="dpo", beta=0.3, reference_model="base", per_device_train_batch_size=8
    )
    start = copy.deepcopy(model).eval()
    trainer.train()

    sums, _ = naive_logps(start, tiny_tokenizer, PAIRS)
    with torch.no_grad(), start.disable_adapter():
        reference, _ = naive_logps(start, tiny_tokenizer, PAIRS)
    assert not torch.allclose(sums, reference, atol=0.1)
    margins = (sums - reference) @ torch.tensor([1.0, -1.0])
    loss = -nn.functional.logsigmoid(0.3 * margins).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in start.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert last_log(trainer)["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_weights(weights(trainer), dict(start.named_parameters()), rtol=1e-4, atol=1e-6)


def test_reference_is_the_adapted_model_unless_the_base_is_asked_for(adapt, make):
    at_start = make(model=adapt(), loss="dpo", eval_rows=PAIRS).evaluate()["eval_loss"]
    assert at_start == pytest.approx(math.log(2), abs=1e-6)
    trainer = make(model=adapt(), loss="dpo", eval_rows=PAIRS, reference_model="base")
    assert trainer.evaluate()["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in adapt().named_parameters() if not p.requires_grad}
    # The base is there at any time: also data that come after training can be compared with it.
    trainer.train()
    assert trainer.evaluate(PAIRS[:2])["eval_loss"] > 0
    assert not any(getattr(m, "disable_adapters", 0) is True for m in trainer.model.modules())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resumed_run_and_merged_model(tied, adapt, make, tmp_path, tiny_tokenizer):
    """Checkpoints hold the adapters alone; the base as reference is scored once for both runs,
    though the resumed one is made with other adapters."""
    options = {
        **{"loss": "dpo", "reference_model": "base", "max_steps": 4, "save_steps": 2},
        "reference_cache": str(tmp_path / "reference"),
    }
    targets = {"target_modules": BODY if tied else [*BODY, "lm_head"], "tied": tied}
    straight = make(model=adapt(**targets), output=tmp_path / "a", save_strategy="steps", **options)
    straight.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    saved = {path.name for path in Path(checkpoint).glob("*.safetensors")}
    assert saved == {"adapter_model.safetensors"}

    with mock.patch.object(reference_logps, "causal_lm_logprobs") as scored:
        resumed = make(model=adapt(seed=2, **targets), output=tmp_path / "b", **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
    scored.assert_not_called()
    assert_same_weights(weights(resumed), weights(straight), rtol=0, atol=0)

    model = straight.model.eval()
    with torch.no_grad():
        expected, _ = naive_logps(model, tiny_tokenizer, PAIRS)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    with torch.no_grad():
        found, _ = naive_logps(merged, tiny_tokenizer, PAIRS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("saved", [False, True], ids=["body", "head saved"])
def test_adapters_that_transformers_added_switch_off_too(saved, adapt, make, tiny_model):
    """`model.add_adapter` makes no model of PEFT; the same adapters, the same training."""
    options = {"modules_to_save": ["lm_head"]} if saved else {}
    wrapped, native = adapt(**options), copy.deepcopy(tiny_model)
    add_adapter(native, peft.LoraConfig(r=3, lora_alpha=5, target_modules=BODY, **options))
    inner = wrapped.get_base_model()
    native.load_state_dict(inner.state_dict())
    wanted = {"loss": "dpo", "beta": 0.3, "reference_model": "base", "eval_rows": PAIRS}
    wrapped, native = (make(model=model, **wanted) for model in (wrapped, native))
    for trainer in (wrapped, native):
        trainer.train()
    assert last_log(native)["loss"] == pytest.approx(last_log(wrapped)["loss"], rel=1e-6)
    assert last_log(native)["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert_same_weights(
        weights(native), dict(wrapped.model.get_base_model().named_parameters()), rtol=0, atol=0
    )
    trained = {name: p.requires_grad for name, p in native.model.named_parameters()}
    assert trained == {name: p.requires_grad for name, p in inner.named_parameters()}
    assert not any(getattr(m, "disable_adapters", 0) is True for m in native.model.modules())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_base_that_the_adapters_changed_is_refused(init, make, tiny_model):
    """These begin with a part of the base in the adapter: the sum is the original model."""
    model = copy.deepcopy(tiny_model)
    before = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=init)
    adapted = peft.get_peft_model(model, config)
    changed = adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(changed, before["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(UsageError, match=f"init_lora_weights='{init}'.*reference_model=None"):
        make(model=adapted, loss="dpo", reference_model="base")
    make(model=adapted, loss="dpo")


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_checkpoints_of_adapters_load_onto_their_base(task, make, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=[*BODY, "lm_head"], task_type=task)
    model = peft.get_peft_model(load_model(tmp_path / "base"), config)
    trainer = make(model=model, output=tmp_path / "run", save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert not (checkpoint / "config.json").exists()
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(tokens).logits
        loaded = load_model(checkpoint)(tokens).logits
        assert not torch.allclose(expected, load_model(tmp_path / "base")(tokens).logits)
    torch.testing.assert_close(loaded, expected)

    settings = checkpoint / "adapter_config.json"
    without_a_base = {**json.loads(settings.read_text()), "base_model_name_or_path": ""}
    settings.write_text(json.dumps(without_a_base))
    with pytest.raises(UsageError, match=r"^'.*has no base_model_name_or_path"):
        load_model(checkpoint)
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(UsageError, match="peft must be installed"),
    ):
        load_model(checkpoint)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("refill", [False, True])
def test_answers_leave_the_generation_config_as_it_was(refill, task, adapt, tiny_tokenizer):
    """PEFT's `generate` puts that of the outer model into the one inside."""
    model = adapt(task_type=task)
    inner = model.get_base_model()
    sampling, prompts = Sampling(max_new_tokens=4, temperature=0), [Prompt("1", "abc")]
    own = inner.generation_config

    def answer(model):
        local = LocalModel(model, tiny_tokenizer, "adapted", refill=refill)
        [[found]] = local.generate(prompts, sampling)
        return found

    found = answer(model)
    assert inner.generation_config is own
    assert "generation_config" not in vars(model)
    outer = model.generation_config = copy.deepcopy(own)
    assert answer(model) == found
    assert (model.generation_config, inner.generation_config) == (outer, own)
    assert model.generation_config is outer
    assert inner.generation_config is own
    assert answer(model.merge_and_unload()) == found


def test_base_of_a_model_without_adapters_is_refused(make):
    with pytest.raises(UsageError, match="not a PEFT model"):
        make(loss="dpo", reference_model="base")
    with pytest.raises(UsageError, match="reference_model is 'other'"):
        make(loss="dpo", reference_model="other")
