"""The kernels on hidden states and LM head, run by Triton's interpreter with small blocks.

Their launchers are called here as the backend calls them, so that a test chooses the tile, the
number of vocabulary splits and how operands lie in memory; the op on top of them is tested in
`test_triton_backend`. All that a launcher allocates is full of NaN beforehand.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_fast.ops.reference import reference_logits

pytest.importorskip("triton")

from tests.support import interpreter
from tests.support.linear_cases import (
    DTYPES,
    Case,
    cases,
    count_products,
    expected_gradient,
    expected_statistics,
)
from tests.support.problems import INF, NAN, assert_within_budget, make_problem, normal

pytestmark = interpreter.MARKS

DRAWN = settings(max_examples=40)


@DRAWN
@given(case=cases(), alpha=st.sampled_from([0.0, 0.6, 1.0]), order=st.sampled_from([0, 1, 2]))
def test_forward_meets_the_budget(case, alpha, order):
    """Any shape, option, layout, tile and number of splits; N = 0 and S = 0 too."""
    problem = case.problem
    ours = case.forward(alpha, order)
    truth = expected_statistics(problem.to(torch.float64), case.ignore_index, alpha, order)
    same = expected_statistics(problem, case.ignore_index, alpha, order)
    for name, exact in truth.items():
        mine = getattr(ours, name)
        if name == "entropy" and not order:
            assert mine is None
            continue
        assert mine.dtype == torch.float32
        assert mine.shape == exact.shape
        assert_within_budget(mine, same[name], exact, name, roundings=16)
    keep = problem.targets != case.ignore_index
    bounds = problem.cu_seqlens.tolist()
    counts = [int(keep[a:b].sum()) for a, b in pairwise(bounds)]
    assert ours.counts.dtype == torch.int64
    assert ours.counts.tolist() == counts
    for values in (ours.token_logprobs, ours.lse, ours.tail, ours.miss):
        assert not values[~keep].any()


@DRAWN
@given(
    case=cases(),
    with_grad_lse=st.booleans(),
    scale=st.sampled_from([None, 3.0, 0.02]),
    in_float32=st.booleans(),
    sparse=st.sampled_from([INF, 0.5, 0.0]),
)
def test_gradient_meets_the_budget(case, with_grad_lse, scale, in_float32, sparse):
    """Any upstream gradient, also negative, also 0; its result in the operands' dtype or float32,
    between columns that belong to somebody else.
    """
    problem = case.problem
    num_tokens, vocab = len(problem.hidden), len(problem.weight)
    grad = normal(num_tokens, seed=1) * (normal(num_tokens, seed=3).abs() < sparse)
    grad_lse = normal(num_tokens, seed=2) * (sparse > 0) if with_grad_lse else None
    dtype = torch.float32 if in_float32 else problem.hidden.dtype
    room = torch.full((num_tokens, vocab + 5), 7.0, dtype=dtype)
    out = room[:, 2 : 2 + vocab].fill_(NAN)
    divisor = None if scale is None else torch.tensor(scale)
    ours = case.backward(case.forward(), grad, grad_lse, scale=divisor, out=out)
    assert ours is out
    assert (room[:, :2] == 7).all()
    assert (room[:, 2 + vocab :] == 7).all()
    truth, same = (
        expected_gradient(p, grad, grad_lse, case.ignore_index).double() / (scale or 1.0)
        for p in (problem.to(torch.float64), problem)
    )
    assert_within_budget(ours, same, truth, "d logits", roundings=16)
    silent = problem.targets == case.ignore_index
    silent |= (grad == 0) & (True if grad_lse is None else grad_lse == 0)
    assert not ours[silent].any()


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("vocab", [37, 48])
def test_a_target_in_every_column(vocab, splits):
    """On the borders of tiles and of splits, first and last of the vocabulary, in a ragged tile."""
    problem = make_problem([vocab], vocab=vocab, dtype=torch.float32)
    problem.targets = torch.arange(vocab)
    case = Case(problem, splits=splits)
    ours = case.forward()
    truth = expected_statistics(problem.to(torch.float64))
    for name, exact in truth.items():
        torch.testing.assert_close(getattr(ours, name).double(), exact, rtol=2e-5, atol=2e-6)
    grad = normal(vocab, seed=1)
    want = expected_gradient(problem.to(torch.float64), grad, None)
    torch.testing.assert_close(case.backward(ours, grad).double(), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_long_sequences(alpha):
    """By one token longer than what is combined at once, and of one token; beginning anywhere."""
    problem = make_problem([5, 129, 0, 64, 1], ignored=0.2, dtype=torch.float32, seed=1)
    problem.targets[[133, -1]] = 0  # the last of the longest counts, and the only one
    ours = Case(problem, splits=2).forward(alpha)
    exact = expected_statistics(problem.to(torch.float64), length_normalization=alpha)
    same = expected_statistics(problem, length_normalization=alpha)
    for name in exact:
        assert_within_budget(getattr(ours, name), same[name], exact[name], name, roundings=16)
    assert ours.counts.sum() == (problem.targets != -100).sum()


def test_order_of_programs_does_not_matter(programs_backwards):
    """A GPU runs them in any: none reads or overwrites what another has written."""
    problem = make_problem([20, 0, 30], vocab=50, bias=True, dtype=torch.float32)
    problem.targets = torch.arange(50)  # also on the borders of splits
    problem.targets[3] = -100
    case, grad = Case(problem, splits=3), normal(50, seed=1)
    statistics = case.forward()
    forward = [*statistics, case.backward(statistics, grad)]
    programs_backwards()
    reversed_order = [*case.forward(), case.backward(statistics, grad)]
    for x, y in zip(forward, reversed_order, strict=True):
        assert torch.equal(x, y)


MASKS = {
    "a tile": range(16),
    "a split": range(32),
    "the last tile": range(32, 37),
    "all but the target": [v for v in range(37) if v != 20],
    "the target": [20],
    "the target's neighbours": [19, 21],
}


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_tokens(mask, splits):
    """A bias of -inf takes a token out of the vocabulary; what is left is a distribution."""
    problem = make_problem([5], bias=True, dtype=torch.float32)
    problem.targets.fill_(20)
    problem.bias.data[list(mask)] = -INF
    case = Case(problem, splits=splits)
    ours = case.forward()
    truth = expected_statistics(problem.to(torch.float64))
    for name, exact in truth.items():
        torch.testing.assert_close(getattr(ours, name).double(), exact, rtol=2e-5, atol=2e-6)
    grad, grad_lse = normal(5, seed=1), normal(5, seed=2)
    want = expected_gradient(problem.to(torch.float64), grad, grad_lse)
    if 20 not in mask:
        got = case.backward(ours, grad, grad_lse)
        assert not got[:, list(mask)].any()
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)
    else:  # autograd has 0 * inf in what d log p / d z is
        got = case.backward(ours, grad)
        assert torch.equal(got[:, 20], grad)
        assert got.isfinite().all()


def test_a_row_of_masked_tokens_alone_is_nan():
    problem = make_problem([3], bias=True, dtype=torch.float32)
    problem.bias.data.fill_(-INF)
    ours = Case(problem, splits=2).forward()
    assert ours.token_logprobs.isnan().all()
    assert ours.lse.isnan().all()
    assert ours.sums.isnan().all()
    assert ours.counts.tolist() == [3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nan_stays_in_its_row(softcap, dtype):
    """A NaN in a hidden state is a NaN of that token and its sequence, and of nothing else."""
    problem = make_problem([4, 3, 5], softcap=softcap, dtype=dtype)
    problem.targets[8] = -100
    clean = Case(problem, splits=3)
    want, grad = clean.forward(), normal(12, seed=1)
    gradient = clean.backward(want, grad)
    problem.hidden.data[5] = NAN
    problem.hidden.data[8, 0] = NAN  # ignored
    ours = clean.forward()
    others = torch.arange(12) != 5
    for name in ("token_logprobs", "lse", "miss", "entropy"):
        mine = getattr(ours, name)
        assert mine[5].isnan()
        assert torch.equal(mine[others], getattr(want, name)[others])
    assert ours.sums[1].isnan()
    assert torch.equal(ours.sums[[0, 2]], want.sums[[0, 2]])
    got = clean.backward(ours, grad)
    assert got[5].isnan().all()
    assert torch.equal(got[others], gradient[others])
    assert not got[8].any()
    grad[5] = 0.0
    assert not clean.backward(ours, grad)[5].any()


@pytest.mark.parametrize("column", [0, 20, 36])
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_in_the_vocabulary_reaches_every_row(column, splits):
    """Also where it is the target's own logit, which the sum leaves out."""
    problem = make_problem([4], dtype=torch.float32)
    problem.targets = torch.tensor([0, 20, 36, -100])
    problem.weight.data[column] = NAN
    ours = Case(problem, splits=splits).forward()
    for name in ("token_logprobs", "lse", "miss", "entropy"):
        assert getattr(ours, name).isnan().tolist() == [True, True, True, False]


def test_tiles_without_a_counted_token_multiply_nothing(monkeypatch):
    """Tokens 0 to 15 are a tile that is ignored; 16 to 31 have one that counts."""
    problem = make_problem([16, 16], width=20, vocab=37, dtype=torch.float32)
    problem.targets[torch.arange(32) != 18] = -100
    case = Case(problem)
    products = count_products(monkeypatch)
    ours = case.forward()
    assert products.total() == 3 * 2  # tiles of the vocabulary, steps of the width
    assert ours.token_logprobs.nonzero().tolist() == [[18]]
    assert ours.sums[0] == 0
    assert ours.counts.tolist() == [0, 1]


@pytest.mark.parametrize("with_grad_lse", [False, True])
def test_tiles_without_a_gradient_multiply_nothing(monkeypatch, with_grad_lse):
    problem = make_problem([32], width=20, vocab=37, dtype=torch.float32)
    problem.targets[3] = -100
    case = Case(problem)
    statistics = case.forward()
    grad = torch.zeros(32)
    grad[3] = grad[20] = 1.0  # an ignored token's gradient is none
    products = count_products(monkeypatch)
    zeros = torch.zeros(32) if with_grad_lse else None
    got = case.backward(statistics, grad, zeros)
    assert products.total() == 3 * 2
    assert got.any(1).nonzero().tolist() == [[20]]
    if with_grad_lse:
        products.clear()
        assert case.backward(statistics, torch.zeros(32), grad).any()
        assert products.total() == 3 * 2


def test_all_tokens_ignored():
    problem = make_problem([3, 0, 4], bias=True, ignored=1.0, dtype=torch.float32)
    problem.hidden.data.fill_(NAN)
    case = Case(problem)
    ours = case.forward(length_normalization=1.0)
    for values in ours:
        assert not values.any()
    assert not case.backward(ours, torch.ones(7), torch.ones(7)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_targets_keep_their_digits(dtype):
    """1 - p from a half to nothing, right to its own last digits, as are log p and the gradient."""
    problem = make_problem([20], width=1, vocab=40, dtype=dtype)
    problem.hidden.data[:, 0] = torch.arange(1, 21)
    problem.weight.data.sigmoid_()[20] = 4.0
    problem.targets.fill_(20)
    case = Case(problem, splits=3)
    ours = case.forward()
    logits = reference_logits(problem.hidden.double(), problem.weight.double()).detach()
    others = logits.scatter(1, problem.targets[:, None], -INF)
    odds = (torch.logsumexp(others, 1) - logits[:, 20]).exp()
    assert odds.min() < 1e-24
    assert odds.max() > 0.5
    torch.testing.assert_close(ours.miss.double(), odds / (1 + odds), rtol=2e-5, atol=0)
    torch.testing.assert_close(-ours.token_logprobs.double(), odds.log1p(), rtol=2e-5, atol=0)
    gradient = case.backward(ours, torch.ones(20), out=torch.empty(20, 40))
    torch.testing.assert_close(gradient[:, 20].double(), odds / (1 + odds), rtol=2e-5, atol=0)


def test_logits_far_within_the_softcap():
    """They are as without it: tanh of little keeps its digits."""
    problem = make_problem([6], softcap=1e4, dtype=torch.float32)
    case = Case(problem, splits=2)
    truth = expected_statistics(problem.to(torch.float64))
    for name, exact in truth.items():
        mine = getattr(case.forward(), name).double()
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)


def test_logits_far_beyond_the_softcap():
    """They are all the cap; tanh is flat there, and nothing overflows on the way."""
    problem = make_problem([4], scale=1e6, softcap=5.0, dtype=torch.float32)
    case = Case(problem, splits=2)
    ours = case.forward()
    truth = expected_statistics(problem.to(torch.float64))
    torch.testing.assert_close(ours.lse.double(), truth["lse"], rtol=1e-6, atol=0)
    assert not case.backward(ours, torch.ones(4)).any()


def test_logits_of_any_size():
    """Only differences of logits reach an exponential."""
    for scale in (1e-30, 1e4, 1e30):
        problem = make_problem([4], scale=scale, dtype=torch.float32)
        case = Case(problem, splits=2)
        ours = case.forward()
        truth = expected_statistics(problem.to(torch.float64))
        for name, exact in truth.items():
            mine = getattr(ours, name).double()
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)
        want = expected_gradient(problem.to(torch.float64), torch.ones(4), None)
        got = case.backward(ours, torch.ones(4))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
