"""Products of the head: in which dtype each device multiplies, and that all ways agree."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from plad_fast import UsageError, linear_sequence_logprobs
from plad_fast.models.devices import autocast_dtype
from plad_fast.ops import backend as dispatch
from plad_fast.ops.impl import chunked, products, triton_backend
from plad_fast.recipe.doctor import diagnose
from tests.support import wide_products
from tests.support.problems import make_problem

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.skipif(not products.cpu_multiplies_bfloat16(), reason="no bfloat16 instructions here")
def test_an_infinite_logit_of_bfloat16_operands_stays_infinite():
    problem = make_problem([6], vocab=11, dtype=torch.bfloat16)
    with torch.no_grad():
        problem.hidden.abs_()
        problem.weight[3] = -torch.inf
        problem.targets[problem.targets == 3] = 4
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    assert ours.sums.isfinite().all()


def test_the_strategy_of_each_dtype():
    def kind(dtype, device="cpu"):
        return type(products.products_for(torch.zeros(2, 2, dtype=dtype, device=device), 64))

    assert kind(torch.float32) is kind(torch.float64) is products.Products
    assert kind(torch.float16) is products.UpcastProducts
    native = products.cpu_multiplies_bfloat16()
    wanted = products.CpuBfloat16Products if native else products.UpcastProducts
    assert kind(torch.bfloat16) is wanted
    # Another device need not add in float32 what its CPU does.
    assert kind(torch.bfloat16, "meta") is products.UpcastProducts


@pytest.mark.parametrize(
    ("machine", "units", "isa", "fast"),
    [
        ("x86_64", {"_is_avx512_bf16_supported"}, None, True),
        ("AMD64", {"_is_amx_tile_supported"}, None, True),
        ("x86_64", set(), None, False),  # emulated, though oneDNN supports it
        ("x86_64", None, None, False),  # a torch that cannot be asked
        ("x86_64", {"_is_avx512_bf16_supported"}, "avx512_core", False),
        ("x86_64", {"_is_avx512_bf16_supported"}, "AVX512_CORE_BF16", True),
        ("x86_64", {"_is_amx_tile_supported"}, "AVX512_CORE_BF16", False),
        ("x86_64", {"_is_amx_tile_supported"}, "AVX512_CORE_AMX", True),
        ("aarch64", None, None, True),  # torch's own test is right there
    ],
)
def test_one_test_of_the_cpu_decides_on_bfloat16_everywhere(machine, units, isa, fast, monkeypatch):
    """Precision auto, the products of the op, and what doctor says of both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: machine)
    supported = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", supported)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
        if units is not None:
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in units, raising=False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if isa is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    taken = torch.bfloat16 if fast else torch.float32
    strategy = products.CpuBfloat16Products if fast else products.UpcastProducts
    assert autocast_dtype("auto") == taken
    assert type(products.products_for(torch.zeros(2, 2, dtype=torch.bfloat16), 64)) is strategy
    page = diagnose()
    assert f"auto is {str(taken).removeprefix('torch.')}" in page
    assert str(strategy.__doc__).splitlines()[0].rstrip(".") in page
    for name, (test, _) in products._X86_UNITS.items():
        assert (name in page) == (not fast or test in (units or ()))


def test_the_units_named_are_those_that_onednn_may_use(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    supported = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", supported)
    for test, _ in products._X86_UNITS.values():
        monkeypatch.setattr(torch.cpu, test, lambda: True, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")  # as if it were not set, which the older name is
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX512_CORE_FP16")
    assert products.cpu_bfloat16_units() == ("AVX512-BF16",)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert products.cpu_bfloat16_units() == ("AVX512-BF16", "AMX")
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.cpu_bfloat16_units()


def test_a_gpu_that_emulates_bfloat16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert autocast_dtype("auto") == torch.float32
    assert autocast_dtype("bfloat16") == torch.bfloat16


STRATEGIES = [products.UpcastProducts, products.CpuBfloat16Products, products.CudaHalfProducts]


@pytest.mark.parametrize("adds_to_wide", [False, True], ids=["torch 2.8", "torch 2.10"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_of_products(strategy, dtype, adds_to_wide, monkeypatch):
    """Also the GPU's, with the product that hands out its accumulators put in place on the CPU."""
    wide_products.install(monkeypatch, adds_to_wide=adds_to_wide)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 12, generator=draw).to(dtype) for n in (9, 50))
    # Float16 cannot hold these without the strategy's own scale; bfloat16 can.
    d_logits = 1e-9 * torch.randn(9, 50, generator=draw)
    if dtype == torch.float16 and strategy is products.CpuBfloat16Products:
        d_logits *= 1e9
    made = strategy(weight, block_bytes=700)
    out = torch.empty(9, 50)
    made.logits(hidden, out)
    truth = hidden.double() @ weight.double().T
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2**-15 * truth.abs().max().item())
    first = torch.full((50, 12), torch.nan)
    operand = made.operand(d_logits.clone())
    made.add_grad_weight(operand, hidden, first, overwrite=True)
    twice = first.clone()
    made.add_grad_weight(operand, hidden, twice, overwrite=False)
    assert torch.equal(twice, 2 * first)
    of_hidden = torch.full((9, 12), torch.nan)
    made.add_grad_hidden(operand, of_hidden, overwrite=True)
    made.add_grad_hidden(operand, of_hidden, overwrite=False)
    want_weight = d_logits.double().T @ hidden.double()
    want_hidden = d_logits.double() @ weight.double()
    for got, want in (
        (first, want_weight),
        (made.grad_hidden(operand), want_hidden),
        (of_hidden, 2 * want_hidden),
    ):
        assert (got.double() - want).norm() / want.norm() < 2 * torch.finfo(dtype).eps
    d_logits = torch.randn(9, 50, generator=draw)
    want = d_logits.double().T @ hidden.double()
    for never_cut in (1, 2**24):
        monkeypatch.setattr(products, "_NEVER_CUT", never_cut)
        rounded = torch.full_like(weight, torch.nan)
        made.write_grad_weight(made.operand(d_logits.clone()), hidden, rounded)
        assert (rounded.double() - want).norm() / want.norm() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_shard_without_rows_has_products_too(strategy, dtype, monkeypatch):
    """Of tensor parallelism over more ranks than the vocabulary has blocks."""
    wide_products.install(monkeypatch)
    hidden, weight = torch.randn(3, 12).to(dtype), torch.empty(0, 12, dtype=dtype)
    made = strategy(weight, block_bytes=700)
    d_logits = torch.empty(3, 0)
    made.logits(hidden, d_logits)
    operand = made.operand(d_logits)
    made.add_grad_weight(operand, hidden, torch.empty(0, 12), overwrite=True)
    assert torch.equal(made.grad_hidden(operand).float(), torch.zeros(3, 12))


def test_what_lies_behind_a_row_of_an_operand_reaches_no_product():
    """With AMX oneDNN reads rows to a multiple of 32 entries. Behind these is the second half of
    float32 numbers whose lower halves are NaN in bfloat16."""
    vocab = 33
    weight = torch.ones(vocab, 64, dtype=torch.bfloat16)
    d_logits = torch.full((128, vocab), 0x3F807FC0, dtype=torch.int32).view(torch.float32)
    made = products.CpuBfloat16Products(weight, block_bytes=2**20)
    found = made.grad_hidden(made.operand(d_logits))
    assert torch.equal(found, torch.full_like(found, vocab))


@pytest.mark.parametrize(("columns", "widened"), [(4096, False), (2048, True)])
def test_a_product_that_a_gpu_may_sum_in_parts_leaves_it_in_float32(columns, widened):
    """Of many tokens a slice of the vocabulary may be narrow: few tiles, and long sums."""
    pytest.importorskip("triton")
    from benchmarks.cuda_recorder import counting

    with counting() as recorder:
        hidden, weight = recorder.empty(2**18, 4096), recorder.empty(columns, 4096)
        made = products.CudaHalfProducts(weight, block_bytes=2**26)
        operand = made.operand(recorder.empty(2**18, columns))
        recorder.start(weight)
        made.write_grad_weight(operand, hidden, torch.empty_like(weight))
        written = sum(x.written for x in recorder.launches if x.kind == "product")
    assert written == columns * 4096 * (4 if widened else 2)


@pytest.mark.parametrize(("gib", "mib"), [(2, 64), (24, 384), (80, 1024)])
def test_default_scratch_depends_on_the_gpu_alone(gib, mib, monkeypatch):
    """Chunks decide the order of sums: with what happens to be free, bits would change."""
    properties = mock.Mock(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert dispatch.default_scratch_bytes(torch.device("cuda", 0)) == mib * 2**20
    assert dispatch.default_scratch_bytes(torch.device("cpu")) == 64 * 2**20


def test_a_named_backend_is_refused_not_replaced(monkeypatch):
    """The rule a new backend inherits: it is taken by auto if it can, refused by name if not."""
    import types

    backend = types.SimpleNamespace(unavailable=lambda tensor: "it is only a test")
    monkeypatch.setitem(dispatch.BACKENDS, "fake", "fake_module")
    real = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda n: backend if n == "fake" else real(n))
    problem = make_problem([3])
    with pytest.raises(UsageError, match="impl='fake' cannot be used here: it is only a test"):
        linear_sequence_logprobs(*problem.inputs, impl="fake")
    assert linear_sequence_logprobs(*problem.inputs, impl="auto").sums.isfinite().all()


def test_auto_says_once_what_it_took(caplog):
    dispatch._announce.cache_clear()
    problem = make_problem([3])
    with caplog.at_level(logging.INFO, logger="plad_fast"):
        for _ in range(3):
            linear_sequence_logprobs(*problem.inputs)
    assert [r.message for r in caplog.records] == ["impl='auto' on cpu: using the torch backend"]


@pytest.mark.parametrize(
    ("dtype", "missing", "level"),
    [
        (torch.bfloat16, "triton is 3.3.0; the kernels need 3.4 or newer", logging.WARNING),
        (torch.float64, "triton is 3.3.0; the kernels need 3.4 or newer", logging.INFO),
        (torch.float64, None, logging.INFO),  # float64 is the torch backend's
    ],
)
def test_auto_says_once_why_a_gpu_goes_without_kernels(monkeypatch, caplog, dtype, missing, level):
    monkeypatch.setattr(triton_backend, "_missing", lambda: missing)
    dispatch._announce.cache_clear()
    on_gpu = mock.Mock(is_cuda=True, device=torch.device("cuda"), dtype=dtype)
    with caplog.at_level(logging.INFO, logger="plad_fast"):
        taken = [dispatch.get_backend("auto", on_gpu) for _ in range(3)]
    assert taken == [chunked] * 3
    (record,) = caplog.records
    assert record.levelno == level
    assert record.message == (
        "impl='auto' on cuda: using the torch backend; impl='triton' cannot be used here: "
        + (missing or "the kernels compute in float32; float64 is the torch backend's")
    )
