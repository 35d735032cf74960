"""PEFT seen through: adapters in the body, on the head, and switched off.

The yardstick is what PEFT's own forward computes: its logits, and the gradients of autograd.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity

from plad_fast import fused_linear_preference_loss, linear_sequence_logprobs
from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.head import causal_lm_logprobs, check_architecture, head_arguments
from plad_fast.models.lm_head import find_head
from tests.models.test_head import FEATURES, build, naive_sums

peft = pytest.importorskip("peft")

UPSTREAM = torch.tensor([1.0, -2.0, 0.5, 0.25])
BODY = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def batch():
    return PreferenceCollator(pad_token_id=0, group_size=2)(FEATURES)


def adapted(*, tied=False, family="Llama", model=None, move=True, **options):
    """A PEFT model whose adapters are moved: as they are created they add nothing."""
    model = build(family, tie_word_embeddings=tied) if model is None else model
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **options)).eval()
    if move:
        shift(model)
    return model


def shift(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)


def assert_as_peft_computes(model, batch):
    check_architecture(model)
    ours, theirs = causal_lm_logprobs(model, batch).sums, naive_sums(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = [
        torch.autograd.grad(sums @ UPSTREAM, list(trained.values()), allow_unused=True)
        for sums in (ours, theirs)
    ]
    for name, got, expected in zip(trained, *gradients, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    return trained


CASES = {
    "body": {"target_modules": BODY},
    "body, with a task": {"target_modules": BODY, "task_type": "CAUSAL_LM"},
    "head": {"target_modules": [*BODY, "lm_head"]},
    "head alone": {"target_modules": ["lm_head"]},
    "head with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "head, scaled by the root of the rank": {"target_modules": ["lm_head"], "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", *BODY]},
    "head saved": {"target_modules": BODY, "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": BODY, "modules_to_save": ["embed_tokens"]},
    "both saved": {"target_modules": BODY, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": BODY, "trainable_token_indices": [2, 7, 33]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, on tied weights
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_gradients_are_those_of_peft(case, tied, batch):
    """Also where a tied embedding is trained: what the head sees of it is PEFT's decision."""
    trained = assert_as_peft_computes(adapted(tied=tied, **CASES[case]), batch)
    if "head" in case:
        assert any("lm_head" in name for name in trained)


def test_scale_cap_and_bias_of_the_head_are_kept_under_lora(batch):
    """The cap bites behind the adapter's part, and Phi's head has a bias of its own."""
    gemma = build("Gemma2", head_dim=8, final_logit_softcapping=2.0)
    assert_as_peft_computes(adapted(model=gemma, target_modules=["lm_head"]), batch)
    phi = {"target_modules": ["lm_head"], "lora_bias": True}
    assert_as_peft_computes(adapted(family="Phi", **phi), batch)


def test_adapters_add_up_switch_off_and_merge(batch):
    """The head has whatever PEFT has in use at the moment."""
    model = adapted(target_modules=["lm_head"])
    plain = naive_sums(build("Llama"), batch)
    with model.disable_adapter():
        assert find_head(model).adapters == ()
        torch.testing.assert_close(causal_lm_logprobs(model, batch).sums, plain)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter("other")
    shift(model)
    assert_as_peft_computes(model, batch)
    model.base_model.set_adapter(["default", "other"])
    assert len(find_head(model).adapters) == 2
    assert_as_peft_computes(model, batch)
    both = naive_sums(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(causal_lm_logprobs(model, batch).sums, both)
    with model.disable_adapter():
        torch.testing.assert_close(causal_lm_logprobs(model, batch).sums, plain)


def test_dropout_of_the_head_acts_in_training_only(batch):
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    quiet = causal_lm_logprobs(model, batch).sums
    assert torch.equal(causal_lm_logprobs(model, batch).sums, quiet)
    model.train()
    torch.manual_seed(0)
    draws = torch.stack([causal_lm_logprobs(model, batch).sums.detach() for _ in range(2)])
    assert not torch.equal(draws[0], draws[1])
    # The mask is drawn for the adapter's input alone: the layer's own part stays whole.
    head = find_head(model)
    hidden = torch.ones(1, 16)
    assert torch.equal(head.inputs(hidden)[:, :16], hidden)


@pytest.mark.parametrize("impl", ["torch", "two-phase"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_frozen_head_costs_no_product_for_its_gradient(trained, impl, batch):
    """Logits and the gradient of the hidden states are two products with the head, or three where
    the logits are made anew; its own gradient is one more."""
    model = adapted(target_modules=BODY)
    weight = model.get_output_embeddings().weight.requires_grad_(trained)
    arguments = head_arguments(model, batch)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profile:
        if impl == "two-phase":
            loss = -linear_sequence_logprobs(**arguments, impl="torch").sums.sum()
        else:
            loss = fused_linear_preference_loss(**arguments, beta=100.0, impl="torch").loss
        loss.backward()
    products = [
        event.input_shapes
        for event in profile.events()
        if event.name in ("aten::mm", "aten::addmm")
        and any(len(weight) in shape for shape in event.input_shapes)
    ]
    assert len(products) == 2 + (impl == "two-phase") + trained, products
    assert (weight.grad is not None) == trained
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


class Quantised(nn.Linear):
    """Stands for a 4-bit layer: bytes for weights, and a forward of its own."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().max() / 127
        self.scale = scale
        self.weight = nn.Parameter((layer.weight / scale).round().to(torch.int8), False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def quantise(module):
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, Quantised(child))
        else:
            quantise(child)


def test_quantised_body_under_adapters(batch):
    """As in QLoRA: the body's layers are of another kind, the head stays a plain one."""
    model = build("Llama")
    quantise(model.model)
    trained = assert_as_peft_computes(adapted(model=model, target_modules=BODY), batch)
    assert trained
    assert all("lora_" in name for name in trained)


def refused():
    from peft import (
        IA3Config,
        PrefixTuningConfig,
        PromptTuningConfig,
        TaskType,
    )

    task = {"task_type": TaskType.CAUSAL_LM}
    lora = {"target_modules": ["lm_head"], "r": 2}
    return {
        "DoRA": (peft.LoraConfig(**lora, use_dora=True), "DoRA|Dora"),
        "IA3": (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3"),
        "LoHa": (peft.LoHaConfig(**lora), "loha"),
        "prompts": (PromptTuningConfig(**task, num_virtual_tokens=2), "PROMPT_TUNING"),
        "prefixes": (PrefixTuningConfig(**task, num_virtual_tokens=2), "PREFIX_TUNING"),
    }


@pytest.mark.parametrize("name", refused())
def test_what_is_not_known_is_refused_by_name(name):
    config, message = refused()[name]
    model = peft.get_peft_model(build("Llama"), config)
    with pytest.raises(UsageError, match=message):
        find_head(model)


def test_lora_on_a_quantised_head_is_refused():
    model = build("Llama")
    model.lm_head = Quantised(model.lm_head)
    with pytest.raises(UsageError, match="Quantised"):
        find_head(adapted(model=model, target_modules=["lm_head"]))


def test_half_precision_adapters_on_a_half_precision_body(batch):
    """PEFT keeps adapters in float32 beside 16-bit weights; the op gets one dtype."""
    truth = naive_sums(adapted(target_modules=["lm_head"]), batch)
    model = copy.deepcopy(adapted(target_modules=["lm_head"])).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    ours, theirs = causal_lm_logprobs(model, batch).sums, naive_sums(model, batch)
    ours.sum().backward()
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    budget = 2 * (theirs.float() - truth).abs().max() + 1e-3
    assert (ours - truth).abs().max() <= budget
