"""A model on packed attention is as before in all calls but those of packed rows."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.attention.register import enable, is_enabled
from plad_fast.models.head import causal_lm_logprobs
from plad_fast.models.sharing import prepare
from tests.support.naive import features, relative
from tests.support.tiny_models import VOCAB, make_model


def outputs(model):
    """Logits with padding on either side, with a cache, and greedy tokens."""
    model.eval()
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCAB, (2, 11), generator=draw)
    right = torch.ones_like(input_ids)
    right[1, 7:] = 0
    with torch.no_grad():
        return [
            model(input_ids=input_ids).logits,
            model(input_ids=input_ids, attention_mask=right, use_cache=False).logits,
            model(input_ids=input_ids, attention_mask=right.flip(1)).logits,
            model.generate(
                input_ids,
                attention_mask=right.flip(1),
                max_new_tokens=6,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            ).sequences,
        ]


@pytest.mark.parametrize("original", ["eager", "sdpa"])
# Softcap, windows with masks of two kinds, a dialect of its own, and sinks.
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "gpt_oss"])
def test_calls_without_a_layout_are_the_model_s_own(name, original):
    model = make_model(name)
    if original == "sdpa" and not model._supports_sdpa:
        pytest.skip("the model has no sdpa")
    # Without its softcap, as transformers 4 runs Gemma 2 with sdpa, a model is another.
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    model.set_attn_implementation("eager" if softcap else original)
    before = outputs(model)
    model.set_attn_implementation(original)
    for implementation in ("auto", "eager"):
        enable(model, implementation)
        assert is_enabled(model)
        assert all(map(torch.equal, outputs(model), before))


def test_eager_models_still_give_their_attention_weights():
    model = make_model("llama").eval()
    model.set_attn_implementation("eager")
    tokens = torch.arange(3, 12)[None]
    before = model(tokens, output_attentions=True).attentions
    enable(model)
    after = model(tokens, output_attentions=True).attentions
    assert len(after) == len(before) == 3
    assert all(map(torch.equal, after, before))


def test_no_mask_is_made_for_a_packed_row():
    """It would be of the row's length squared."""
    model = make_model("gemma3")
    model.set_attn_implementation("eager")  # whose masks are never None
    prepare(model)
    masks = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    for layout in ("padded", "shared", "padded"):
        logprobs(model, SIZES[0], layout)
    assert [mask is None for mask in masks] == [False] * 3 + [True] * 3 + [False] * 3


def test_the_implementation_can_be_changed():
    """And the original stays the original: our own attention is never taken for it."""
    model = make_model("llama")
    original = model.config._attn_implementation
    before = outputs(model)
    names = []
    for implementation in ("sdpa", "eager", "sdpa", "auto"):
        enable(model, implementation)
        names.append(model.config._attn_implementation)
    assert names[0] == names[2]
    assert len(set(names)) == 3
    assert all(map(torch.equal, outputs(model), before))
    model.set_attn_implementation(original)
    assert not is_enabled(model)
    assert all(map(torch.equal, outputs(model), before))


def test_two_models_keep_their_originals():
    """Names are registered for the process; a model's own function is not."""
    models = [make_model(name) for name in ("llama", "gpt2", "llama")]
    for model, original in zip(models, ("eager", "eager", "sdpa"), strict=True):
        model.set_attn_implementation(original)
    before = [outputs(model) for model in models]
    for model in models:
        enable(model)
    for model, expected in zip(models, before, strict=True):
        assert all(map(torch.equal, outputs(model), expected))


def test_a_subclass_from_elsewhere_finds_the_eager_function():
    model = make_model("llama")
    model.set_attn_implementation("eager")
    before = outputs(model)
    for layer in model.model.layers:
        own = type("OwnAttention", (type(layer.self_attn),), {"__module__": __name__})
        layer.self_attn.__class__ = own
    enable(model)
    assert all(map(torch.equal, outputs(model), before))


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    model = make_model("llama")
    before = outputs(model)
    enable(model)
    model.save_pretrained(tmp_path)
    assert "plad_fast" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_enabled(again)
    assert all(map(torch.equal, outputs(again), before))


def test_copies_are_models_of_their_own():
    model = make_model("llama")
    prepare(model)
    twin = copy.deepcopy(model)
    assert is_enabled(twin)
    enable(twin, "eager")
    assert model.config._attn_implementation != twin.config._attn_implementation
    batch = PreferenceCollator(0, 2, layout="shared")(features([5, 3], [(2, 4), (3, 1)]))
    found = [causal_lm_logprobs(each, batch).token_logprobs for each in (model, twin)]
    torch.testing.assert_close(*found)


def test_a_model_on_flash_attention_keeps_its_padded_calls(monkeypatch):
    """transformers loads flash-attn by the implementation that the config names."""
    from transformers import modeling_flash_attention_utils as utils

    loaded = []

    def load(implementation, *_args, **_kwargs):
        loaded.append(implementation)
        raise Loaded

    monkeypatch.setattr(utils, "lazy_import_flash_attention", load)
    model = make_model("llama").eval()
    model.config._attn_implementation_internal = "flash_attention_2"  # as loaded on a GPU
    enable(model)
    with contextlib.suppress(Loaded):
        model(torch.arange(3, 12)[None])
    assert loaded
    assert set(loaded) <= {"flash_attention_2", None}  # None: whichever there is


class Loaded(Exception):  # noqa: N818
    """As far as this goes without a GPU."""


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_sdpa_by_name_is_refused_where_it_lacks_something(name):
    model = make_model(name)
    model.set_attn_implementation("eager")
    with pytest.raises(UsageError, match="attention='sdpa' lacks"):
        prepare(model, attention="sdpa")


def test_flash_needs_flash_attn():
    model = make_model("llama")
    with pytest.raises(UsageError, match="pip install flash-attn"):
        enable(model, "flash")
    assert not is_enabled(model)


SIZES = [
    ([9, 7], [(5, 3), (1, 4)]),
    ([4], [(2, 2)]),
    ([11, 3, 8], [(2, 6), (3, 3), (1, 1)]),
    ([6], [(3, 6)]),
]


def test_a_compiled_model_takes_rows_of_any_length():
    """The attention is left to run as it is; the graphs between do not grow in number."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, plain = make_model("llama"), make_model("llama")
    for each in (model, plain):
        prepare(each)
        each.model.layers = each.model.layers[:1]  # the others compile to the same
    model.base_model.compile(backend=counter)
    graphs = []
    for size in SIZES:
        found, expected = (logprobs(each, size, "shared") for each in (model, plain))
        torch.testing.assert_close(found, expected)
        for each, result in ((model, found), (plain, expected)):
            each.zero_grad()
            result.sum().backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert relative(mine.grad, theirs.grad) < 1e-5
        graphs.append(counter.frame_count)
    # All graphs once for the first length, and once more for any other length; torch 2.8 compiles
    # a part of them again when it sees the third.
    again = graphs[2] - graphs[1] if torch.__version__.startswith("2.8.") else 0
    assert again < graphs[0]
    assert graphs == [graphs[0], 2 * graphs[0]] + [2 * graphs[0] + again] * 2
    # Padded rows in between have their mask, packed ones have none.
    for layout in ("padded", "shared"):
        found, expected = (logprobs(each, SIZES[0], layout) for each in (model, plain))
        torch.testing.assert_close(found, expected)


def logprobs(model, size, layout):
    batch = PreferenceCollator(0, 2, layout=layout)(features(*size))
    return causal_lm_logprobs(model, batch).token_logprobs
