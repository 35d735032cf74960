"""The call of flash-attn, on a CPU: its indices and options, against a stand-in in plain torch."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from torch import nn

import plad_fast.models.attention.register
import plad_fast.models.attention.varlen
from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.row_layout import RowLayout
from plad_fast.errors import UsageError
from plad_fast.models.attention.packed import packed_attention
from plad_fast.models.attention.varlen import load_flash
from plad_fast.models.head import causal_lm_logprobs
from plad_fast.models.sharing import prepare
from tests.support.naive import attention_by_definition, features, naive_logprobs, relative
from tests.support.tiny_models import WINDOW, make_model
from tests.support.varlen import exact_and_gradients, varlen_attention

ROW = RowLayout(((9, 5, 3), (7,), (3, 6, 0, 6), (1, 1, 1)))
GROUPS = features([9, 7, 3], [(5, 3), (1, 4), (6, 6)])


class Fake:
    """`flash_attn_varlen_func` of some version; keeps count of its calls.

    Args:
        version: "2"; "2 before softcap"; "3", which returns the log-sum-exp too and knows neither
            dropout nor the deterministic option.
        exact: return float64, so that indices can be told from rounding.
    """

    def __init__(self, version="2", *, exact=False):
        self.calls, self.exact = [], exact
        self.function = getattr(
            self, {"2": "two", "2 before softcap": "old", "3": "three"}[version]
        )

    def two(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert alibi_slopes is None
        assert block_table is None
        assert not return_attn_probs
        return self._run(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale, causal, window_size, softcap,
            dropout_p=dropout_p, deterministic=deterministic,
        )  # fmt: skip

    def old(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, return_attn_probs=False,
    ):  # fmt: skip
        return self._run(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale, causal, (-1, -1), 0.0,
        )  # fmt: skip

    def three(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
    ):  # fmt: skip
        assert qv is None
        assert not attention_chunk
        out = self._run(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale, causal, window_size, softcap,
        )  # fmt: skip
        return out, torch.zeros(q.shape[1], len(q))

    def _run(self, q, *arguments, **options):
        self.calls.append(options)
        out = varlen_attention(q, *arguments)
        return out if self.exact else out.to(q.dtype)


@pytest.fixture
def install(monkeypatch):
    def put(*args, **kwargs):
        fake = Fake(*args, **kwargs)
        for module in (plad_fast.models.attention.varlen, plad_fast.models.attention.register):
            monkeypatch.setattr(module, "load_flash", lambda: fake.function)
        return fake

    return put


def qkv(layout, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    shapes = (4, 2, 2)
    return [
        torch.randn(1, heads, layout.num_tokens, 8, generator=draw).to(dtype).requires_grad_()
        for heads in shapes
    ]


@pytest.mark.parametrize("version", ["2", "3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.7},
        {"sliding_window": 1},
        {"sliding_window": WINDOW},
        {"sliding_window": 100},
        {"softcap": 1.5, "sliding_window": WINDOW},
    ],
)
def test_the_call_means_the_definition(install, version, dtype, options):
    """Exactly, where the stand-in does not round; else no worse than the definition rounded."""
    tensors = qkv(ROW, dtype)
    names = {"scaling": "scale", "sliding_window": "window"}
    renamed = {names.get(name, name): value for name, value in options.items()}
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = exact_and_gradients(attention_by_definition(*wide, ROW, **renamed), wide)
    yardstick = exact_and_gradients(attention_by_definition(*tensors, ROW, **renamed), tensors)
    for exact in (True, False):
        fake = install(version, exact=exact)
        out = packed_attention(nn.Module(), *tensors, ROW, implementation="flash", **options)
        assert len(fake.calls) == 1
        assert out.shape == (1, ROW.num_tokens, 4, 8)
        found = exact_and_gradients(out, tensors)
        if exact:
            assert relative(found[0], truth[0]) < 1e-12
        else:
            assert out.dtype == dtype
            rounding = torch.finfo(dtype).eps
            for mine, other, true in zip(found, yardstick, truth, strict=True):
                assert relative(mine, true) <= 2 * relative(other, true) + rounding


@pytest.mark.parametrize("widths", [(12, 8), (8, 12)])
def test_values_may_be_of_another_width(install, widths):
    """Multi-head latent attention has such; flash-attn takes one width."""
    fake = install(exact=True)
    of_keys, of_values = widths
    query, key, value = (
        torch.randn(1, heads, ROW.num_tokens, width).bfloat16()
        for heads, width in ((4, of_keys), (2, of_keys), (2, of_values))
    )
    out = packed_attention(nn.Module(), query, key, value, ROW, implementation="flash")
    assert len(fake.calls) == 1
    wide = (x.double() for x in (query, key, value))
    assert relative(out, attention_by_definition(*wide, ROW)) < 1e-12


def test_the_call_is_deterministic_where_it_can_be(install):
    fake = install("2")
    packed_attention(nn.Module(), *qkv(ROW), ROW, implementation="flash")
    packed_attention(nn.Module(), *qkv(ROW), ROW, implementation="flash", dropout=0.25)
    assert [call["deterministic"] for call in fake.calls] == [True, True]
    assert [call["dropout_p"] for call in fake.calls] == [0.0, 0.25]


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        ("2 before softcap", {"softcap": 1.0}, "no softcap"),
        ("2 before softcap", {"softcap": 1.0, "sliding_window": 2}, "no softcap, window_size"),
        ("3", {"dropout": 0.1}, "no dropout_p"),
        ("2", {"s_aux": torch.zeros(4)}, "lacks the softcap, sink or dropout"),
    ],
)
def test_what_a_version_lacks_is_refused(install, version, options, message):
    fake = install(version)
    with pytest.raises(UsageError, match=message):
        packed_attention(nn.Module(), *qkv(ROW), ROW, implementation="flash", **options)
    assert fake.calls == []


def test_float32_is_refused(install):
    fake = install()
    tensors = qkv(ROW, torch.float32)
    with pytest.raises(UsageError, match=r"bfloat16 and float16, not torch\.float32"):
        packed_attention(nn.Module(), *tensors, ROW, implementation="flash")
    assert fake.calls == []


@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "packed"), ("mistral", "shared"), ("gemma2", "shared")]
)
def test_whole_models(install, name, layout):
    """In bfloat16: one call a layer, and no further from float32 than eager attention is."""
    fake = install()
    batch = PreferenceCollator(0, 2, layout=layout)(GROUPS)
    exact = make_model(name).bfloat16().float()
    exact.set_attn_implementation("eager")
    with torch.no_grad():
        truth = torch.cat(naive_logprobs(exact, GROUPS))
        found = {}
        for attention in ("flash", "eager"):
            model = make_model(name).bfloat16()
            model.set_attn_implementation("eager")
            assert prepare(model, layout, attention=attention) == layout
            fake.calls.clear()
            found[attention] = causal_lm_logprobs(model, batch).token_logprobs
            assert len(fake.calls) == (3 if attention == "flash" else 0)
    errors = {name: relative(logprobs.float(), truth) for name, logprobs in found.items()}
    assert errors["flash"] <= 2 * errors["eager"]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_autocast(install, name):
    """Weights in float32: queries and keys leave the rotation, or a norm, in float32 as well."""
    fake = install()
    model = make_model(name)
    batch = PreferenceCollator(0, 2, layout="shared")(GROUPS)
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare(model, attention="flash") == "shared"
        fake.calls.clear()
        found = causal_lm_logprobs(model, batch).sums
    assert len(fake.calls) == 3
    expected = torch.stack([each.sum() for each in naive_logprobs(make_model(name), GROUPS)])
    assert relative(found, expected) < 0.05
    found.sum().backward()


def installed(monkeypatch, capability=(9, 0), **packages):
    """Makes modules importable, and all others that might hold flash-attn not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for name in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, packages.get(name))
    load_flash.cache_clear()
    return load_flash()


@pytest.fixture
def forget():
    yield
    load_flash.cache_clear()


def module(**entries):
    return types.SimpleNamespace(**entries)


@pytest.mark.usefixtures("forget")
def test_the_newest_version_is_taken(monkeypatch):
    three, two = module(flash_attn_varlen_func=3), module(flash_attn_varlen_func=2)
    assert installed(monkeypatch, flash_attn_interface=three, flash_attn=two) == 3
    assert installed(monkeypatch, flash_attn=two) == 2
    assert installed(monkeypatch, flash_attn=module()) is None
    assert installed(monkeypatch) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
@pytest.mark.usefixtures("forget")
def test_version_3_is_of_hopper_alone(monkeypatch, capability):
    """Its requirements say so; on a B200 it ends with "no kernel image is available"."""
    three, two = module(flash_attn_varlen_func=3), module(flash_attn_varlen_func=2)
    packages = {"flash_attn_interface": three, "flash_attn": two}
    assert installed(monkeypatch, capability, **packages) == 2
    assert installed(monkeypatch, capability, flash_attn_interface=three) is None


@pytest.mark.usefixtures("forget")
def test_a_broken_build_is_named(monkeypatch, caplog):
    def fail(name):
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(plad_fast.models.attention.varlen.importlib, "import_module", fail)
    with caplog.at_level(logging.WARNING, logger="plad_fast"):
        assert installed(monkeypatch) is None
    assert "flash_attn is installed and does not load: undefined symbol" in caplog.text


@pytest.mark.usefixtures("forget")
def test_no_gpu_no_flash():
    load_flash.cache_clear()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert load_flash() is None
