"""Gradients made slice by slice of the vocabulary: how they are cut, and that it does not show."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_fast import linear_sequence_logprobs
from plad_fast.ops.impl import products, scaling, two_phase
from plad_fast.ops.impl.sliced_gradients import Tiling
from tests.support import wide_products
from tests.support.problems import assert_within_budget, make_problem, oracle

pytest.importorskip("triton")

from plad_fast.kernels import launch

LENGTHS, WIDTH, VOCAB = [9, 4, 0, 7], 24, 600


@given(
    budget=st.integers(0, 2**31),
    num_rows=st.integers(0, 20_000),
    vocab=st.integers(1, 300_000),
    bytes_per_row=st.integers(6, 60_000),
    bytes_per_logit=st.sampled_from([2, 4, 6]),
)
def test_a_tiling_covers_all_within_its_budget(
    budget, num_rows, vocab, bytes_per_row, bytes_per_logit
):
    tiling = Tiling.within(
        budget, num_rows, vocab, bytes_per_row=bytes_per_row, bytes_per_logit=bytes_per_logit
    )
    for parts, total, size in (
        (list(tiling.blocks()), num_rows, tiling.rows),
        (list(tiling.slices()), vocab, tiling.columns),
    ):
        lengths = [part.stop - part.start for part in parts]
        assert sum(lengths) == total
        assert all(0 < n <= size for n in lengths)
        assert not lengths or lengths[0] - lengths[-1] < 256 * len(lengths)
    assert tiling.columns % 256 == 0
    if tiling.rows > 1 or tiling.columns > 256:
        assert tiling.rows * (bytes_per_row + tiling.columns * bytes_per_logit) <= budget


@pytest.mark.parametrize(
    ("num_rows", "width", "vocab", "slices"),
    [(8192, 4096, 128_256, 3), (2048, 896, 151_936, 1), (16_384, 2048, 248_320, 11)],
)
def test_every_row_at_once_on_a_large_gpu(num_rows, width, vocab, slices):
    """So that every row of d_weight is written once, from 15/16 GiB."""
    tiling = Tiling.within(15 * 2**26, num_rows, vocab, bytes_per_row=6 * width, bytes_per_logit=2)
    assert tiling.rows == num_rows
    assert len(list(tiling.slices())) == slices


def backward(problem, grad, **options):
    ours = linear_sequence_logprobs(*problem.inputs, impl="triton", **problem.options, **options)
    return torch.autograd.grad((ours.sums * grad).sum(), problem.leaves, allow_unused=True)


@pytest.mark.parametrize("by_library", [False, True], ids=["kernel", "library"])
@pytest.mark.parametrize("skip_inactive", [True, False])
@pytest.mark.parametrize("rows", [20, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_meet_the_budget(dtype, rows, skip_inactive, by_library, monkeypatch):
    """One block of rows and several, by the GPU's products, with ignored and inactive tokens."""
    if by_library and dtype == torch.float32:
        pytest.skip("float32 stays in registers")
    wide_products.install(monkeypatch)
    least = launch.LibraryFrom(*(2 * [WIDTH if by_library else WIDTH + 1]))
    monkeypatch.setitem(launch.LIBRARY_FROM, (9, 0), least)
    if dtype != torch.float32:
        monkeypatch.setattr(two_phase, "products_for", products.CudaHalfProducts)
    cut = mock.Mock(side_effect=lambda _, n, vocab, **__: Tiling(n, vocab, rows, 256))
    monkeypatch.setattr(Tiling, "within", cut)
    problem = make_problem(
        LENGTHS, width=WIDTH, vocab=VOCAB, bias=True, ignored=0.2, dtype=dtype, scale=0.5
    )
    # 100 columns before the second slice begins, where ignored tokens are.
    problem.targets[0] = 156
    grad = torch.tensor([1.0, 0.0, 3.0, -2.0])
    ours = backward(problem, grad, skip_inactive=skip_inactive)
    truth, same = (
        torch.autograd.grad((oracle(p)[0] * grad).sum(), p.leaves)
        for p in (problem.to(torch.float64), problem)
    )
    for what, mine, torchs, exact in zip(
        ("hidden", "weight", "bias"), ours, same, truth, strict=True
    ):
        assert mine.dtype == dtype
        assert_within_budget(mine, torchs, exact, what)
    again = backward(problem, grad, skip_inactive=skip_inactive)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    assert cut.call_count == 2
    assert cut.call_args.args[1] == (12 if skip_inactive else 20)


def test_no_gradient_at_all():
    problem = make_problem(LENGTHS, vocab=VOCAB, bias=True, dtype=torch.float32)
    for gradient in backward(problem, torch.zeros(4)):
        assert not gradient.any()


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [1.001, -3e4, 0.0])
def test_a_scaled_gradient_is_rounded_once(monkeypatch, source, target, factor):
    """1.001 is 1 in bfloat16: a factor that was rounded first would change nothing."""
    monkeypatch.setattr(scaling, "_SCALED_AT_ONCE", 40)  # several blocks
    grad = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).to(source)
    found = scaling.scaled_gradient(grad, torch.tensor(factor), target)
    assert torch.equal(found, (grad.float() * factor).to(target))
    assert scaling.scaled_gradient(grad, None, source) is grad
