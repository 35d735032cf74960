"""The call of PyTorch's varlen_attn: its indices and options against a stand-in, on a CPU; and the
function itself on tensors without values."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import plad_fast.models.attention.packed
import plad_fast.models.attention.register
import plad_fast.models.attention.varlen
from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.row_layout import RowLayout
from plad_fast.errors import UsageError
from plad_fast.models.attention.packed import packed_attention
from plad_fast.models.attention.register import enable
from plad_fast.models.attention.varlen import load_varlen
from plad_fast.models.head import causal_lm_logprobs
from plad_fast.models.sharing import prepare
from tests.support.naive import attention_by_definition, features, naive_logprobs, relative
from tests.support.tiny_models import SHARED, WINDOW, make_model
from tests.support.varlen import exact_and_gradients, varlen_attention

ROW = RowLayout(((9, 5, 3), (7,), (3, 6, 0, 6), (1, 1, 1)))
GROUPS = features([9, 7, 3], [(5, 3), (1, 4), (6, 6)])


class Fake:
    """`varlen_attn` of PyTorch 2.13; keeps count of its calls.

    Args:
        exact: return float64, so that indices can be told from rounding.
    """

    def __init__(self, *, exact=False):
        self.calls, self.exact = [], exact

    def function(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert return_aux is seqused_k is block_table is num_splits is None
        # By equality with this tuple PyTorch knows the causal mask.
        assert type(window_size) is tuple
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert query.shape[2] % 8 == 0
        assert query.shape[2] <= 256
        self.calls.append(window_size)
        causal = window_size == (-1, 0)
        out = varlen_attention(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal, window_size
        )
        return out if self.exact else out.to(query.dtype)


@pytest.fixture
def install(monkeypatch):
    def put(**options):
        fake = Fake(**options)
        for module in (plad_fast.models.attention.varlen, plad_fast.models.attention.register):
            monkeypatch.setattr(module, "load_varlen", lambda: fake.function)
        return fake

    return put


@pytest.fixture
def on_cuda(monkeypatch):
    """PyTorch's own function, as if there were a GPU."""
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    load_varlen.cache_clear()
    if load_varlen() is None:
        pytest.skip(f"varlen_attn of PyTorch {torch.__version__} takes other options")
    yield monkeypatch
    load_varlen.cache_clear()


def qkv(dtype=torch.bfloat16, *, heads=(4, 2, 2), widths=(8, 8, 8), device="cpu"):
    draw = None if device != "cpu" else torch.Generator().manual_seed(0)
    shapes = [(1, head, ROW.num_tokens, width) for head, width in zip(heads, widths, strict=True)]
    return [torch.randn(shape, generator=draw, device=device).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize(
    "options",
    [{}, {"scaling": 0.7}, *({"sliding_window": width} for width in (1, WINDOW, 100))],
)
def test_the_call_means_the_definition(install, dtype, heads, options):
    """Exactly, where the stand-in does not round; else no worse than the definition rounded."""
    tensors = [x.requires_grad_() for x in qkv(dtype, heads=heads)]
    names = {"scaling": "scale", "sliding_window": "window"}
    renamed = {names.get(name, name): value for name, value in options.items()}
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = exact_and_gradients(attention_by_definition(*wide, ROW, **renamed), wide)
    yardstick = exact_and_gradients(attention_by_definition(*tensors, ROW, **renamed), tensors)
    for exact in (True, False):
        fake = install(exact=exact)
        out = packed_attention(nn.Module(), *tensors, ROW, implementation="varlen", **options)
        assert len(fake.calls) == 1
        assert out.shape == (1, ROW.num_tokens, heads[0], 8)
        found = exact_and_gradients(out, tensors)
        if exact:
            assert relative(found[0], truth[0]) < 1e-12
        else:
            assert out.dtype == dtype
            rounding = torch.finfo(dtype).eps
            for mine, other, true in zip(found, yardstick, truth, strict=True):
                assert relative(mine, true) <= 2 * relative(other, true) + rounding


@pytest.mark.parametrize("widths", [(8, 8), (12, 8), (8, 12), (5, 5)])
def test_heads_of_any_width(install, widths):
    """The kernels take one width for all, a multiple of 8."""
    of_keys, of_values = widths
    tensors = qkv(widths=(of_keys, of_keys, of_values))
    fake = install(exact=True)
    out = packed_attention(nn.Module(), *tensors, ROW, implementation="varlen")
    assert len(fake.calls) == 1
    assert relative(out, attention_by_definition(*(x.double() for x in tensors), ROW)) < 1e-12


@pytest.mark.parametrize("name", SHARED)
def test_models_have_the_values_and_gradients_of_spans(install, name):
    """Of every architecture that shares prompts: one call a layer, or the feature is refused.

    In bfloat16, and compared with a call of sdpa for every span of the row.
    """
    fake = install()
    batch = PreferenceCollator(0, 2, layout="shared")(GROUPS)
    model = make_model(name).bfloat16()
    if lacking(model):
        with pytest.raises(UsageError, match="attention='varlen' lacks"):
            prepare(model, "shared", attention="varlen")
        return
    exact = make_model(name).bfloat16().float()
    exact.set_attn_implementation("eager")
    truth = logprobs_and_gradients(exact, None)
    found = {}
    for attention, calls in (("varlen", model.config.num_hidden_layers), ("sdpa", 0)):
        model = make_model(name).bfloat16()
        prepare(model, "shared", attention=attention)
        fake.calls.clear()
        found[attention] = logprobs_and_gradients(model, batch)
        assert len(fake.calls) == calls
    for mine, other, true in zip(found["varlen"], found["sdpa"], truth, strict=True):
        assert relative(mine, true) <= 2 * relative(other, true)


def lacking(model):
    """Whether its attention has a softcap or sinks, which varlen_attn has not."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return capped or any("sinks" in name for name, _ in model.named_parameters())


def logprobs_and_gradients(model, batch):
    model.eval()
    if batch is None:
        logprobs = torch.cat(naive_logprobs(model, GROUPS))
    else:
        logprobs = causal_lm_logprobs(model, batch).token_logprobs
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True)
    flat = [g.float().flatten() for g in gradients if g is not None]
    return logprobs.detach().float(), torch.cat(flat)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_autocast(install, name):
    """Weights in float32: queries and keys leave the rotation, or a norm, in float32 as well."""
    fake = install()
    model = make_model(name)
    batch = PreferenceCollator(0, 2, layout="shared")(GROUPS)
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare(model, attention="varlen") == "shared"
        fake.calls.clear()
        found = causal_lm_logprobs(model, batch).sums
    assert len(fake.calls) == 3
    expected = torch.stack([each.sum() for each in naive_logprobs(make_model(name), GROUPS)])
    assert relative(found, expected) < 0.05
    found.sum().backward()


@pytest.mark.parametrize(
    "options", [{"softcap": 1.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}], ids=str
)
def test_what_it_lacks_is_refused_by_name(install, options):
    fake = install()
    with pytest.raises(UsageError, match="attention='varlen' lacks"):
        packed_attention(nn.Module(), *qkv(), ROW, implementation="varlen", **options)
    assert fake.calls == []


def test_float32_is_refused(install):
    fake = install()
    with pytest.raises(UsageError, match=r"bfloat16 and float16, not torch\.float32"):
        packed_attention(nn.Module(), *qkv(torch.float32), ROW, implementation="varlen")
    assert fake.calls == []


def test_the_stand_in_has_the_signature_of_pytorchs(on_cuda):
    ours, theirs = (
        {name: (p.kind, p.default) for name, p in inspect.signature(f).parameters.items()}
        for f in (Fake().function, load_varlen())
    )
    assert {name: theirs.get(name) for name in ours} == ours


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3, "scaling": 0.5}], ids=str)
@pytest.mark.parametrize("width", [8, 12])
def test_pytorchs_own_function_takes_the_call(on_cuda, options, width):
    """Shapes and types, on tensors without values: of the result on CUDA ones, and of gradients on
    those of a CPU, as builds without CUDA have no gradients on it."""
    options |= {"implementation": "varlen"}
    on_cuda.setattr(torch.cuda, "device_count", lambda: 1)  # cuDNN of a build with CUDA asks each
    with FakeTensorMode():
        tensors = qkv(widths=[width] * 3, device="cuda")
        out = packed_attention(nn.Module(), *tensors, RowLayout(ROW.groups), **options)
        assert (out.device.type, out.dtype) == ("cuda", torch.bfloat16)
        assert out.shape == (1, ROW.num_tokens, 4, width)
    on_cuda.setattr(torch.cuda, "is_available", lambda: False)  # or "auto" is taken off CUDA
    with FakeTensorMode():
        tensors = [x.requires_grad_() for x in qkv(widths=[width] * 3)]
        out = packed_attention(nn.Module(), *tensors, RowLayout(ROW.groups), **options)
        gradients = torch.autograd.grad(out, tensors, torch.empty_like(out))
    assert [g.shape for g in gradients] == [x.shape for x in tensors]


@pytest.mark.parametrize(
    ("dtype", "options", "taken"),
    [
        (torch.bfloat16, {}, "varlen"),
        (torch.float16, {"widths": (12, 12, 8)}, "varlen"),
        (torch.float32, {}, "sdpa"),
        (torch.bfloat16, {"dropout": 0.1}, "sdpa"),
        (torch.bfloat16, {"widths": (264, 264, 264)}, "sdpa"),
        (torch.bfloat16, {"softcap": 1.0}, "eager"),
        (torch.bfloat16, {"sinks": True}, "eager"),
    ],
    ids=str,
)
def test_without_flash_attn_it_is_the_default_on_cuda(on_cuda, caplog, dtype, options, taken):
    """And what it lacks goes to an implementation that has it; which one, the log says."""
    on_cuda.setattr(plad_fast.models.attention.packed, "can_flash", lambda *_: False)
    plad_fast.models.attention.packed._told.cache_clear()
    with FakeTensorMode(), caplog.at_level(logging.INFO, logger="plad_fast"):
        query, _, value = qkv(dtype, widths=options.get("widths", (8, 8, 8)), device="cuda")
        sinks = torch.zeros(4, device="cuda") if "sinks" in options else None
        chosen = plad_fast.models.attention.packed._choose(
            query, value, options.get("softcap"), sinks, options.get("dropout", 0.0)
        )
    assert chosen == taken
    assert [record.getMessage() for record in caplog.records] == [
        f"attention over packed rows: {taken}"
    ]


@pytest.mark.parametrize("lack", ["capability", "build", "options"])
def test_where_it_is_missing_it_is_refused_by_name_and_not_the_default(on_cuda, lack):
    if lack == "capability":
        on_cuda.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    elif lack == "build":
        on_cuda.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    else:  # as in PyTorch 2.10
        on_cuda.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, is_causal: None)
    load_varlen.cache_clear()
    assert load_varlen() is None
    model = make_model("llama")
    with pytest.raises(UsageError, match=r"attention='varlen' needs PyTorch 2\.12"):
        enable(model, "varlen")
