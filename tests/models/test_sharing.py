"""Packed and shared rows give what one unpadded sequence at a time gives, or are refused."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import plad_fast.models.attention.register
from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.row_layout import RowLayout
from plad_fast.errors import UsageError
from plad_fast.models.attention.register import is_enabled
from plad_fast.models.head import batch_hidden, causal_lm_logprobs
from plad_fast.models.sharing import prepare
from tests.support.naive import (
    features,
    largest_error,
    naive_logprobs,
    naive_step,
    places,
    relative,
    sequences,
    step_of,
)
from tests.support.tiny_models import PADDED, SHARED, make_model

TOLERANCE = 1e-5
# Gradients of sinks are small sums of large terms: in float32 the naive forward itself is up to
# 2e-5 away from its result in float64.
LOOSER = {"gpt_oss": 4e-5}
VISIBLE = 1e-2
"""What a fault must make of the error: a thousand times the tolerance."""

# Prompts are longer than the models' windows. Responses of one token, of equal and of unequal
# lengths; the last group's responses are longer than its prompt.
PAIRS = features([9, 7, 3], [(5, 3), (1, 4), (6, 6)])
FOURS = features([8, 5], [(3, 1, 4, 2), (2, 6, 1, 3)])
GROUPS = {"pairs": PAIRS, "fours": FOURS}


@functools.cache
def naive_step_of(name, groups):
    return naive_step(reference_model(name), GROUPS[groups])


def reference_model(name):
    """Never touched by plad_fast; eager attention honours all that a model may ask for."""
    model = make_model(name)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model


def ready(name, **options):
    model = make_model(name)
    model.set_attn_implementation("eager")  # transformers' sdpa may leave a softcap out
    assert prepare(model, **options) == options.get("layout", "shared")
    return model


def our_step(model, batch, group_size):
    found = causal_lm_logprobs(model, batch)
    return step_of(model, found.token_logprobs, found.sums, group_size)


def collate(groups, layout):
    return PreferenceCollator(0, len(groups[0]["response_ids"]), layout=layout)(groups)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("groups", GROUPS)
def test_log_probs_loss_and_gradients_equal_the_naive_forward(name, groups):
    expected = naive_step_of(name, groups)
    assert all(gradient.norm() > 0 for gradient in expected.gradients.values())
    model = ready(name, check=False)
    for layout in ("packed", "shared"):
        batch = collate(GROUPS[groups], layout)
        found = our_step(model, batch, len(GROUPS[groups][0]["response_ids"]))
        assert largest_error(found, expected) < LOOSER.get(name, TOLERANCE), layout


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])  # softcap and windows; sinks and experts
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = ready(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    found = our_step(model, collate(PAIRS, "shared"), 2)
    assert largest_error(found, naive_step_of(name, "pairs")) < LOOSER.get(name, TOLERANCE)


@pytest.mark.parametrize("name", SHARED)
def test_hidden_states_after_every_layer(name):
    """An error that a later layer hides, or a norm, would show here."""
    expected, found = reference_model(name), ready(name)
    with torch.no_grad():
        layers = [hidden_after_layers(expected, torch.tensor([p + r])) for p, r in sequences(FOURS)]
        for layout in ("packed", "shared"):
            with after_layers(found) as ours:
                batch_hidden(found, collate(FOURS, layout))
            assert len(ours) == found.config.num_hidden_layers
            for (row, tokens), sequence in zip(places(FOURS, layout), layers, strict=True):
                for mine, naive in zip(ours, sequence, strict=True):
                    assert relative(mine[row, tokens], naive[0]) < TOLERANCE, layout


class after_layers:  # noqa: N801
    """Collects the hidden states that leave the decoder layers."""

    def __init__(self, model):
        depth = model.config.num_hidden_layers
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        self.layers, self.states = lists[0], []

    def __enter__(self):
        def keep(_module, _inputs, output):
            self.states.append(output[0] if isinstance(output, tuple) else output)

        self.hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        return self.states

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def hidden_after_layers(model, input_ids):
    with after_layers(model) as states:
        model(input_ids=input_ids, use_cache=False)
    return states


@pytest.mark.parametrize("name", PADDED)
def test_other_models_are_padded_and_say_so_once(name, caplog):
    model = make_model(name)
    before = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, logger="plad_fast"):
        assert prepare(model) == "padded"
    assert [r.levelname for r in caplog.records if r.name.startswith("plad_fast")] == ["WARNING"]
    assert "rows are padded" in caplog.text
    assert model.config._attn_implementation == before
    for layout in ("shared", "packed"):
        with pytest.raises(UsageError, match="not possible"):
            prepare(model, layout)
    assert not is_enabled(model)


@pytest.mark.parametrize("name", ["gpt_neo", "mamba", "recurrent_gemma"])
def test_the_unshared_path_is_right(name):
    model = make_model(name)
    found = our_step(model, collate(PAIRS, prepare(model)), 2)
    assert largest_error(found, naive_step_of(name, "pairs")) < TOLERANCE


def test_layouts_by_name():
    model = make_model("llama")
    assert prepare(model, "padded") == "padded"
    assert not is_enabled(model)
    assert prepare(model, "packed") == "packed"
    assert is_enabled(model)
    with pytest.raises(UsageError, match="unknown layout 'row'"):
        prepare(model, "row")
    with pytest.raises(UsageError, match="unknown attention 'quick'"):
        prepare(model, "padded", attention="quick")
    with pytest.raises(UsageError, match="unknown attention 'xformers'"):
        prepare(model, attention="xformers")


def test_training_mode_survives():
    model = make_model("llama")
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    prepare(model)
    assert [module.training for module in model.modules()] == modes


def test_a_packed_batch_needs_preparation():
    with pytest.raises(UsageError, match=r"sharing\.prepare"):
        causal_lm_logprobs(make_model("llama"), collate(PAIRS, "shared"))


def with_layout(batch, groups):
    """Attends by other groups; which rows predict is left as it was."""
    wrong = RowLayout(groups)
    object.__setattr__(wrong, "predicting", batch["row_layout"].predicting)
    return {**batch, "row_layout": wrong}


def predicting_from_in_front(layout):
    """As if the first token of a response were predicted by the token in front of it."""
    wrong = RowLayout(layout.groups)
    rows = layout.predicting(torch.arange(layout.num_tokens)[None, :, None])[:, 0]
    rows[5:8] = torch.tensor([13, 14, 15])
    object.__setattr__(wrong, "predicting", lambda hidden: hidden[0, rows])
    return wrong


# Each keeps all shapes: only numbers tell.
FAULTS = {
    "responses see each other": lambda b: with_layout(b, ((14, 3), (8, 4), (9, 6))),
    "a group sees the one before it": lambda b: with_layout(b, ((9, 5, 3 + 7 + 1 + 4), (3, 6, 6))),
    "the second response does not see the prompt": lambda b: with_layout(
        b, ((9, 5), (3,), (7, 1, 4), (3, 6, 6))
    ),
    "the layout of the batch before": lambda b: with_layout(b, ((3, 6, 6), (9, 5, 3), (7, 1, 4))),
    "positions run on": lambda b: {
        **b, "position_ids": torch.arange(b["input_ids"].shape[1])[None]
    },
    "first response tokens predicted by the token in front of them": lambda b: {
        **b, "row_layout": predicting_from_in_front(b["row_layout"])
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_planted_faults_in_the_batch_are_seen(name, fault):
    batch = collate(PAIRS, "shared")
    assert batch["row_layout"].groups == ((9, 5, 3), (7, 1, 4), (3, 6, 6))
    found = our_step(ready(name), FAULTS[fault](batch), 2)
    assert largest_error(found, naive_step_of(name, "pairs")) > VISIBLE


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("mistral", "sliding_window"),
        ("qwen2_window", "sliding_window"),
        ("gemma3", "sliding_window"),
        ("gemma2", "softcap"),
        ("gemma2", "scaling"),
        ("gpt_oss", "s_aux"),
    ],
)
def test_planted_faults_in_the_attention_are_seen(name, argument, monkeypatch):
    model = ready(name)
    whole = plad_fast.models.attention.register.packed_attention

    def without(*args, **kwargs):
        return whole(*args, **{**kwargs, argument: None})

    monkeypatch.setattr(plad_fast.models.attention.register, "packed_attention", without)
    found = our_step(model, collate(PAIRS, "shared"), 2)
    assert largest_error(found, naive_step_of(name, "pairs")) > VISIBLE


def hide_window(model):
    """The mask of the unpacked forward still has it."""
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None


def one_layer_keeps_to_itself(model):
    """As a layer whose forward does not pass its further arguments on."""
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, row_layout=None, **kwargs: forward(*args, **kwargs)


def ask_for_a_bias(model):
    """As a model with relative positions that are added to the scores."""
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(
        *args, position_bias=torch.zeros(1), **kwargs
    )


@pytest.mark.parametrize(
    ("name", "plant", "reason"),
    [
        ("llama", ask_for_a_bias, "position_bias"),
        ("qwen2_window", hide_window, "keeps the width of its sliding window"),
        ("qwen2", one_layer_keeps_to_itself, "2 of the 3 layers"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(name, plant, reason, caplog):
    """Whether or not numbers are compared: the window of a real model is longer than the check."""
    model = make_model(name)
    plant(model)
    assert prepare(model, check=False) == "padded"
    assert reason in caplog.text
    with pytest.raises(UsageError, match=reason):
        prepare(model, "packed", check=False)


def places_as_positions(model):
    """The position of a token is its place in the row, whatever the caller says."""
    if hasattr(model.base_model, "wpe"):
        table = model.base_model.wpe
        of_ids = table.forward
        table.forward = lambda ids: of_ids(torch.arange(ids.shape[-1])[None])
    else:
        rotary = model.base_model.rotary_emb
        of_positions = rotary.forward
        rotary.forward = lambda x, position_ids: of_positions(x, torch.arange(x.shape[1])[None])


@pytest.mark.parametrize(
    ("name", "layout", "chosen"),
    [
        ("llama", "auto", "shared"),
        ("llama", "shared", "shared"),
        ("gpt2", "shared", "shared"),
        # Rotary positions are relative: sequences side by side would pass, and rightly.
        ("gpt2", "packed", "packed"),
    ],
)
def test_self_check_stops_a_model_that_ignores_positions(name, layout, chosen):
    model = make_model(name)
    places_as_positions(model)
    with pytest.raises(UsageError, match=f"other log-probabilities in the {chosen} layout"):
        prepare(model, layout)
    assert prepare(model, layout, check=False) == chosen


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_self_check_allows_for_the_rounding_of_autocast(name):
    """Weights are float32 in mixed precision; numbers are as far apart as in 16 bits."""
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare(make_model(name)) == "shared"


def test_self_check_sees_a_leak(monkeypatch):
    """A mask that lets responses see each other, in whatever layer."""
    whole = plad_fast.models.attention.register.packed_attention

    def leak(module, query, key, value, row_layout, **kwargs):
        if module.layer_idx == 2 and row_layout.trace is None:
            row_layout = replace(row_layout, groups=tuple((sum(g),) for g in row_layout.groups))
        return whole(module, query, key, value, row_layout, **kwargs)

    monkeypatch.setattr(plad_fast.models.attention.register, "packed_attention", leak)
    with pytest.raises(UsageError, match="other log-probabilities"):
        prepare(make_model("llama"))


class Adapter(nn.Module):
    """The part of PEFT's interface that matters: a wrapper that knows its base model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_adapters_around_a_model():
    wrapped = Adapter(make_model("llama"))
    assert prepare(wrapped) == "shared"
    found = causal_lm_logprobs(wrapped, collate(PAIRS, "shared")).token_logprobs
    expected = torch.cat(naive_logprobs(make_model("llama"), PAIRS))
    assert relative(found, expected) < TOLERANCE
