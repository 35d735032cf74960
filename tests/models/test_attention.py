"""The registered attention: every implementation against its definition, and the model's own kept.

What it makes of whole models is tested in `test_sharing`.
"""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.row_layout import RowLayout
from plad_fast.errors import UsageError
from plad_fast.models.attention.packed import enable, is_enabled, packed_attention
from plad_fast.models.head import causal_lm_logprobs
from plad_fast.models.sharing import prepare
from tests.support.naive import attention_by_definition, features, naive_logprobs, relative
from tests.support.tiny_models import SHARED, VOCAB, WINDOW, make_model

ROW = RowLayout(((9, 5, 3), (7,), (3, 6, 0, 6), (1, 1, 1)))
# Of every feature alone and of all that go together; what an implementation lacks it refuses.
OPTIONS = {
    "plain": {},
    "scaling": {"scaling": 0.7},
    "window": {"sliding_window": WINDOW},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.linspace(-1, 2, 4, dtype=torch.float64)},
    "softcap and window": {"softcap": 1.5, "sliding_window": WINDOW},
    "sinks and window": {"s_aux": torch.ones(4, dtype=torch.float64), "sliding_window": WINDOW},
}
LACKING = {"sdpa": {"softcap", "s_aux"}, "flex": {"s_aux"}, "eager": set(), "auto": set()}


def qkv(layout, *, heads=4, key_heads=2, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(heads, 8), (key_heads, 8), (key_heads, 8)]
    return [torch.randn(1, h, layout.num_tokens, c, generator=draw, dtype=dtype) for h, c in shapes]


def by_definition(tensors, layout, *, scaling=None, sliding_window=None, softcap=None, s_aux=None):
    return attention_by_definition(
        *tensors, layout, window=sliding_window, softcap=softcap, sinks=s_aux, scale=scaling
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "auto", "flex"])
def test_implementations_equal_the_definition(implementation, options):
    options = OPTIONS[options]
    tensors = qkv(ROW)
    if LACKING[implementation] & options.keys():
        with pytest.raises(UsageError, match=f"attention='{implementation}' lacks"):
            packed_attention(nn.Module(), *tensors, ROW, implementation=implementation, **options)
        return
    if implementation == "flex":
        tensors = [x.float() for x in tensors]  # it has no float64, and no backward, on CPUs
    else:
        for x in tensors:
            x.requires_grad_()
    found = packed_attention(nn.Module(), *tensors, ROW, implementation=implementation, **options)
    expected = by_definition(tensors, ROW, **options)
    # Weights are float32, as in the models that need eager products.
    tolerance = 1e-12 if implementation == "sdpa" else 1e-6
    assert found.shape == (1, ROW.num_tokens, 4, 8)
    assert relative(found, expected) < tolerance
    if implementation != "flex":
        upstream = torch.randn(found.shape, dtype=found.dtype)
        ours = torch.cat(torch.autograd.grad(found, tensors, upstream), 1)
        theirs = torch.cat(torch.autograd.grad(expected, tensors, upstream), 1)
        assert relative(ours, theirs) < tolerance


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(st.integers(0, 4), min_size=1, max_size=6).map(tuple).filter(sum),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.none() | st.integers(1, 9),
    st.sampled_from(["sdpa", "eager"]),
)
def test_any_row(groups, heads, window, implementation):
    layout = RowLayout(tuple(groups))
    tensors = qkv(layout, heads=heads[0], key_heads=heads[1])
    found = packed_attention(
        nn.Module(), *tensors, layout, implementation=implementation, sliding_window=window
    )
    assert relative(found, by_definition(tensors, layout, sliding_window=window)) < 1e-6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_sixteen_bits_are_no_worse_than_the_whole_row_in_sixteen_bits(implementation):
    tensors = [x.bfloat16() for x in qkv(ROW)]
    exact = by_definition([x.double() for x in tensors], ROW)
    found = packed_attention(nn.Module(), *tensors, ROW, implementation=implementation)
    assert found.dtype == torch.bfloat16
    yardstick = by_definition(tensors, ROW)
    assert relative(found.double(), exact) <= 2 * relative(yardstick.double(), exact)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_drops(implementation):
    tensors = qkv(ROW)
    options = {"implementation": implementation, "dropout": 0.5}
    first, second = (packed_attention(nn.Module(), *tensors, ROW, **options) for _ in range(2))
    assert not torch.equal(first, second)


def test_flex_on_a_cpu_does_not_train():
    tensors = [x.float().requires_grad_() for x in qkv(ROW)]
    with pytest.raises(UsageError, match="flex"):
        packed_attention(nn.Module(), *tensors, ROW, implementation="flex")


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex"])
@pytest.mark.parametrize("name", ["llama", "qwen2_window"])
def test_whole_models_on_an_implementation_by_name(name, implementation):
    groups = features([9, 7, 3], [(5, 3), (1, 4), (6, 6)])
    model = make_model(name)
    assert prepare(model, attention=implementation) == "shared"
    with torch.no_grad():
        batch = PreferenceCollator(0, 2, layout="shared")(groups)
        found = causal_lm_logprobs(model, batch).token_logprobs
        expected = torch.cat(naive_logprobs(make_model(name), groups))
    assert relative(found, expected) < 1e-5


# All of them are arguments that attention functions of transformers know.
@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices", "sinks"])
def test_what_changes_the_result_and_is_not_known_is_refused(name):
    with pytest.raises(UsageError, match=f"asks for {name}"):
        packed_attention(nn.Module(), *qkv(ROW), ROW, **{name: torch.zeros(1)})


@pytest.mark.parametrize("where", ["layer", "call"])
def test_attention_that_looks_ahead_is_refused(where):
    module = nn.Module()
    if where == "layer":
        module.is_causal = False
    with pytest.raises(UsageError, match="not causal"):
        packed_attention(module, *qkv(ROW), ROW, is_causal=None if where == "layer" else False)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_layout_of_another_batch_is_refused(rows):
    short = RowLayout(((4, 2, 1),))
    tensors = [x.expand(rows, -1, -1, -1) for x in qkv(ROW)]
    with pytest.raises(UsageError, match=f"1 row of 7 tokens, and the model runs {rows} of 42"):
        packed_attention(nn.Module(), *tensors, short)


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
@pytest.mark.parametrize("name", SHARED)
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
    ([13], [(3, 13)]),
    ([17], [(3, 17)]),
]


def test_a_compiled_model_takes_rows_of_any_length():
    """The attention is left to run as it is; the graphs between do not grow in number."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, plain = make_model("llama"), make_model("llama")
    for each in (model, plain):
        prepare(each)
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
    assert graphs == [graphs[0], 2 * graphs[0]] + [2 * graphs[0] + again] * 4
    # Padded rows in between have their mask, packed ones have none.
    for layout in ("padded", "shared"):
        found, expected = (logprobs(each, SIZES[0], layout) for each in (model, plain))
        torch.testing.assert_close(found, expected)


def logprobs(model, size, layout):
    batch = PreferenceCollator(0, 2, layout=layout)(features(*size))
    return causal_lm_logprobs(model, batch).token_logprobs
