"""Attention over packed rows equals its definition, or is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.row_layout import RowLayout
from plad_fast.errors import UsageError
from plad_fast.models.attention.packed import packed_attention
from plad_fast.models.head import causal_lm_logprobs
from plad_fast.models.sharing import prepare
from tests.support.naive import attention_by_definition, features, naive_logprobs, relative
from tests.support.tiny_models import WINDOW, make_model

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
def test_whole_models_on_an_implementation_by_name(implementation):
    groups = features([9, 7, 3], [(5, 3), (1, 4), (6, 6)])
    model = make_model("qwen2_window")
    assert prepare(model, attention=implementation) == "shared"
    with torch.no_grad():
        batch = PreferenceCollator(0, 2, layout="shared")(groups)
        found = causal_lm_logprobs(model, batch).token_logprobs
        expected = torch.cat(naive_logprobs(make_model("qwen2_window"), groups))
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
