"""The kernels on hidden states and LM head, run by Triton's interpreter with small blocks.

Their launchers are called here as the backend calls them, so that a test chooses the tile, the
number of vocabulary splits and how operands lie in memory; the op on top of them is tested in
`test_triton_backend`. All that a launcher allocates is full of NaN beforehand.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plad_fast.ops.reference import (
    reference_logits,
    reference_token_logprobs,
    transform_logits,
)
from tests.support.problems import Problem, assert_within_budget, make_problem

pytest.importorskip("triton")

import triton
import triton.language as tl
from plad_fast.kernels import launch
from plad_fast.kernels.launch import Device, LinearConfig
from plad_fast.kernels.linear_backward import logits_gradient
from plad_fast.kernels.linear_forward import linear_forward
from plad_fast.kernels.logits_rows import RowStatistics
from plad_fast.kernels.primitives import grouped_tile
from triton.runtime import interpreter

from tests.support.interpreter import gpu_minimum, poisoned_memory  # noqa: F401

pytestmark = [
    pytest.mark.skipif(not launch.interpreted(), reason="the kernels are compiled, for a GPU"),
    # numpy computes in the interpreter: exp and differences that overflow would say so.
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    # Of its own reduction, which leaves NaN out as a GPU does.
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

INF = float("inf")
NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = LinearConfig(16, 16, 16, num_warps=4, num_stages=2)
CONFIGS = [
    SMALL,
    LinearConfig(32, 16, 32, num_warps=4, num_stages=2),
    LinearConfig(16, 64, 16, num_warps=4, num_stages=2),
]
LAYOUTS = ["contiguous", "transposed", "gaps", "stepped", "shifted"]
DRAWN = settings(max_examples=80)


@dataclass
class Case:
    """A problem, and the ways of computing it that must not matter."""

    problem: Problem
    ignore_index: int = -100
    config: LinearConfig | None = SMALL
    splits: int | None = None
    """Parts of the vocabulary; None for what the heuristic says."""
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    """Of hidden and weight."""
    group: int = 2
    """Tiles of tokens that take all parts of the vocabulary before the next."""

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        hidden, weight = (
            laid_out(x.detach(), layout)
            for x, layout in zip(
                (self.problem.hidden, self.problem.weight), self.layouts, strict=True
            )
        )
        bias = self.problem.bias
        return hidden, weight, None if bias is None else bias.detach(), self.problem.targets

    @property
    def options(self) -> dict[str, Any]:
        plain = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0}
        return {**plain, **self.problem.spec, "ignore_index": self.ignore_index}

    def forward(self, entropy_order: int = 1) -> RowStatistics:
        heuristic = launch.vocab_splits
        with (
            mock.patch.object(launch, "TOKEN_GROUP", self.group),
            mock.patch.object(
                launch, "vocab_splits", lambda *args: self.splits or heuristic(*args)
            ),
        ):
            return linear_forward(
                *self.operands, **self.options, entropy_order=entropy_order, config=self.config
            )

    def backward(
        self,
        statistics: RowStatistics,
        grad: Tensor,  # (N,)
        grad_lse: Tensor | None = None,  # (N,)
        *,
        scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        shape = len(self.problem.hidden), len(self.problem.weight)
        with mock.patch.object(launch, "TOKEN_GROUP", self.group):
            return logits_gradient(
                *self.operands,
                statistics.lse,
                *(statistics.tail, statistics.miss, grad, grad_lse),
                **self.options,
                out=torch.empty(shape, dtype=self.problem.hidden.dtype) if out is None else out,
                scale=scale,
                config=self.config,
            )


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers at other strides or addresses; NaN lies between them."""
    rows, columns = matrix.shape
    if layout == "contiguous":
        return matrix.contiguous()
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "gaps":
        view = matrix.new_full((rows, columns + 8), NAN)[:, :columns]
    elif layout == "stepped":
        view = matrix.new_full((rows, 2 * columns), NAN)[:, ::2]
    else:
        view = matrix.new_full((rows * columns + 1,), NAN)[1:].view(rows, columns)
    return view.copy_(matrix)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to three tiles of tokens, seven of the vocabulary, three steps of the width."""
    # Rows of a multiple of 8 are what tensor descriptors can read, in 16 bits.
    width = draw(st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 32, 40])))
    vocab = draw(st.one_of(st.integers(1, 100), st.sampled_from([16, 32, 64])))
    config = draw(st.sampled_from(CONFIGS))
    problem = make_problem(
        draw(st.lists(st.integers(0, 17), max_size=4)),
        width=width,
        vocab=vocab,
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([0.1, 1.0, 5.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        softcap=draw(st.sampled_from([None, 0.7, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.0625, -1.5])),
        temperature=draw(st.sampled_from([1.0, 0.7])),
    )
    ignore_index = draw(st.sampled_from([-100, 0, 1]))
    problem.targets[problem.targets == -100] = ignore_index
    return Case(
        problem,
        ignore_index,
        config,
        splits=draw(st.integers(1, -(-vocab // config.BLOCK_V))),
        layouts=draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))),
        group=draw(st.sampled_from([1, 2, 16])),
    )


def expected_statistics(
    problem: Problem, ignore_index: int = -100, entropy_order: int = 1
) -> dict[str, Tensor]:
    """By the naive computation; in 16 bits logits are rounded and the softmax is in float32."""
    logits = reference_logits(problem.hidden, problem.weight, problem.bias, **problem.spec)
    logits = logits.detach()
    if logits.dtype != torch.float64:
        logits = logits.float()
    keep = problem.targets != ignore_index
    tokens = reference_token_logprobs(logits, problem.targets, ignore_index)
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -torch.where(logprobs == -INF, 0.0, logprobs.exp() * logprobs).sum(-1)
    if entropy_order == 2:
        entropy = -torch.logsumexp(2 * logprobs, dim=-1)
    return {
        "token_logprobs": tokens,
        "lse": torch.logsumexp(logits, dim=-1).where(keep, 0.0),
        "miss": -torch.expm1(tokens),
        "entropy": entropy.where(keep, 0.0),
    }


def expected_gradient(
    problem: Problem, grad: Tensor, grad_lse: Tensor | None, ignore_index: int = -100
) -> Tensor:  # (N, V)
    """Of the raw products, by autograd."""
    raw = reference_logits(problem.hidden, problem.weight, problem.bias).detach().requires_grad_()
    logits = transform_logits(raw, **problem.spec)
    if logits.dtype != torch.float64:
        logits = logits.float()
    tokens = reference_token_logprobs(logits, problem.targets, ignore_index)
    loss = (tokens * grad).sum()
    if grad_lse is not None:
        keep = problem.targets != ignore_index
        loss = loss + (torch.logsumexp(logits, dim=-1).where(keep, 0.0) * grad_lse).sum()
    return torch.autograd.grad(loss, raw)[0]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@DRAWN
@given(case=cases(), order=st.sampled_from([0, 1, 2]))
def test_forward_meets_the_budget(case, order):
    """Any shape, option, layout, tile and number of splits; N = 0 too."""
    problem = case.problem
    ours = case.forward(order)
    truth = expected_statistics(problem.to(torch.float64), case.ignore_index, order)
    same = expected_statistics(problem, case.ignore_index, order)
    for name, exact in truth.items():
        mine = getattr(ours, name)
        if name == "entropy" and not order:
            assert mine is None
            continue
        assert mine.dtype == torch.float32
        assert mine.shape == exact.shape
        assert_within_budget(mine, same[name], exact, name, roundings=16)
    keep = problem.targets != case.ignore_index
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


def test_order_of_programs_does_not_matter(monkeypatch):
    """A GPU runs them in any: none reads or overwrites what another has written."""
    problem = make_problem([20, 0, 30], vocab=50, bias=True, dtype=torch.float32)
    problem.targets = torch.arange(50)  # also on the borders of splits
    problem.targets[3] = -100
    case, grad = Case(problem, splits=3), normal(50, seed=1)
    statistics = case.forward()
    forward = [*statistics, case.backward(statistics, grad)]
    builder = interpreter.InterpreterBuilder
    set_index = builder.set_grid_idx

    def from_the_end(self: Any, x: int, y: int, z: int) -> None:
        set_index(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", from_the_end)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nan_stays_in_its_row(softcap, dtype):
    """A NaN in a hidden state is a NaN of that token, and of nothing else."""
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


def count_products(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often the interpreter multiplies two tiles, at which precision."""
    counter: Counter = Counter()
    multiply = interpreter.InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        counter[precision] += 1
        return multiply(self, a, b, d, precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    return counter


def test_tiles_without_a_counted_token_multiply_nothing(monkeypatch):
    """Tokens 0 to 15 are a tile that is ignored; 16 to 31 have one that counts."""
    problem = make_problem([16, 16], width=20, vocab=37, dtype=torch.float32)
    problem.targets[torch.arange(32) != 18] = -100
    case = Case(problem)
    products = count_products(monkeypatch)
    ours = case.forward()
    assert products.total() == 3 * 2  # tiles of the vocabulary, steps of the width
    assert ours.token_logprobs.nonzero().tolist() == [[18]]


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
    ours = case.forward()
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


def test_strided_vectors():
    """Bias, targets, statistics and gradients need not be contiguous."""

    def strided(vector: Tensor) -> Tensor:
        return torch.stack([vector, torch.zeros_like(vector)], 1)[:, 0]

    problem = make_problem([5, 4], bias=True, ignored=0.2, dtype=torch.float32)
    case = Case(problem)
    grad, grad_lse = normal(9, seed=1), normal(9, seed=2)
    want = case.forward(), case.backward(case.forward(), grad, grad_lse)
    problem.bias.data = strided(problem.bias.data)
    problem.targets = strided(problem.targets)
    ours = case.forward()
    for mine, other in zip(ours, want[0], strict=True):
        assert torch.equal(mine, other)
    of_tokens = {name: getattr(ours, name) for name in ("lse", "tail", "miss")}
    ours = ours._replace(**{name: strided(x) for name, x in of_tokens.items()})
    got = case.backward(ours, strided(grad), strided(grad_lse))
    assert torch.equal(got, want[1])


def test_rows_that_are_one_row():
    """Expanded: a stride of 0."""
    problem = make_problem([5], dtype=torch.bfloat16, width=16)
    one_row = problem.hidden.detach()[:1].expand(5, 16)
    options = {**Case(problem).options, "entropy_order": 1}
    expanded, copied = (
        linear_forward(hidden, problem.weight.detach(), None, problem.targets, **options)
        for hidden in (one_row, one_row.contiguous())
    )
    for mine, other in zip(expanded, copied, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lean", [True, False])
def test_the_heuristic_s_own_tiles(lean, dtype):
    """What is launched without a configuration, on operands of every kind."""
    problem = make_problem([9, 8], width=72, vocab=176, bias=not lean, dtype=dtype)
    want = None
    for layouts in (("contiguous",) * 2, ("shifted", "gaps"), ("gaps", "transposed")):
        case = Case(problem, config=None, layouts=layouts)
        ours = case.forward()
        got = [*ours, case.backward(ours, normal(17, seed=1), normal(17, seed=2))]
        want = want or got
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("width", [8, 32, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_descriptors_and_pointers_agree(monkeypatch, dtype, width):
    """To the last bit; edges that the hardware fills with zeros are those that a mask fills."""
    problem = make_problem([19], width=width, vocab=37, bias=True, dtype=dtype)
    case = Case(problem)
    results = []
    for loads in ("tma", "vector", "scalar"):
        monkeypatch.setattr(launch, "load_kind", lambda *_, kind=loads: kind)
        ours = case.forward()
        results.append([*ours, case.backward(ours, normal(19, seed=1))])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.fixture
def sparse(tmp_path):
    """Tensors of gigabytes, of which only what is written takes memory: files with holes."""
    paths = []

    def make(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        paths.append(tmp_path / str(len(paths)))
        storage = torch.from_file(str(paths[-1]), shared=True, size=size, dtype=dtype)
        return storage.as_strided(shape, stride)

    yield make
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("argument", ["hidden", "weight", "out"])
def test_offsets_beyond_31_bits(sparse, argument, dtype):
    """Rows so far apart that the last begin past 2**31 entries."""
    problem = make_problem([40], vocab=40, dtype=dtype)
    case = Case(problem, config=LinearConfig(16, 16, 16, num_warps=4, num_stages=2))
    grad = normal(40, seed=1)
    want = case.forward()
    gradient = case.backward(want, grad)
    operands = list(case.operands)
    shape = {"hidden": (40, 8), "weight": (40, 8), "out": (40, 40)}[argument]
    far = sparse(shape, (2**26 + 8, 1), dtype)
    assert far.stride(0) * 39 > 2**31
    out = far if argument == "out" else torch.empty(40, 40, dtype=dtype)
    if argument != "out":
        place = ("hidden", "weight").index(argument)
        operands[place] = far.copy_(operands[place])
    ours = linear_forward(*operands, **case.options, entropy_order=0, config=case.config)
    assert torch.equal(ours.token_logprobs, want.token_logprobs)
    logits_gradient(
        *operands,
        ours.lse,
        *(ours.tail, ours.miss, grad, None),
        **case.options,
        out=out,
        config=case.config,
    )
    assert torch.equal(out, gradient)


@pytest.mark.parametrize("argument", ["hidden", "weight"])
def test_columns_beyond_31_bits(sparse, argument):
    """Columns so far apart that a step of the width is past 2**31 entries."""
    problem = make_problem([3], width=20, vocab=5, dtype=torch.float32)
    case = Case(problem)
    want = case.forward().token_logprobs
    operands = list(case.operands)
    place = ("hidden", "weight").index(argument)
    rows = len(operands[place])
    operands[place] = sparse((rows, 20), (1, 2**28), torch.float32).copy_(operands[place])
    ours = linear_forward(*operands, **case.options, entropy_order=0, config=case.config)
    assert torch.equal(ours.token_logprobs, want)


def test_a_large_vocabulary():
    """Qwen2.5's."""
    problem = make_problem([1, 1], width=8, vocab=151_936, dtype=torch.float32)
    problem.targets[1] = 151_935
    case = Case(problem, config=LinearConfig(16, 8192, 16, num_warps=4, num_stages=2))
    ours = case.forward()
    exact, same = (expected_statistics(p) for p in (problem.to(torch.float64), problem))
    for name in exact:
        assert_within_budget(getattr(ours, name), same[name], exact[name], name, roundings=16)
    grad = torch.tensor([1.0, -2.0])
    truth = expected_gradient(problem.to(torch.float64), grad, None)
    torch.testing.assert_close(case.backward(ours, grad).double(), truth, rtol=5e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_are_bit_identical(dtype):
    problem = make_problem([9, 0, 12], width=24, vocab=50, bias=True, ignored=0.2, dtype=dtype)
    case, grad = Case(problem), normal(21, seed=1)
    seen = set()
    for _ in range(3):
        ours = case.forward()
        results = [*ours, case.backward(ours, grad).float()]
        seen.add(b"".join(x.numpy().tobytes() for x in results))
    assert len(seen) == 1


def test_number_of_launches(monkeypatch):
    """Two forward, one backward, whatever the size; none for nothing."""
    launched = []
    run = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    for lengths, forward, backward in (
        ([55], ["_linear_forward_kernel", "_combine_kernel"], ["_logits_gradient_kernel"]),
        ([], [], []),
    ):
        case = Case(make_problem(lengths, vocab=70, dtype=torch.float32))
        ours = case.forward()
        assert launched == forward
        launched.clear()
        case.backward(ours, torch.ones(sum(lengths)))
        assert launched == backward
        launched.clear()


@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", "IEEE"), ("high", "TF32x3"), ("medium", "TF32")]
)
def test_float32_is_multiplied_as_torch_is_told(monkeypatch, setting, precision):
    """The interpreter rounds nothing; the precision that it is asked for is what is seen."""
    before = torch.get_float32_matmul_precision()
    problem = make_problem([3], dtype=torch.float32)
    products = count_products(monkeypatch)
    torch.set_float32_matmul_precision(setting)
    try:
        case = Case(problem)
        case.backward(case.forward(), torch.ones(3))
        assert {p.name for p in products} == {precision}
    finally:
        torch.set_float32_matmul_precision(before)


HOPPER, AMPERE = Device((9, 0), 132), Device((8, 0), 108)


@pytest.mark.parametrize(
    ("dtype", "width", "layout", "device", "loads"),
    [
        (torch.bfloat16, 64, "contiguous", HOPPER, "tma"),
        (torch.bfloat16, 72, "gaps", HOPPER, "tma"),  # rows of 8 entries are enough
        (torch.bfloat16, 68, "contiguous", HOPPER, "scalar"),
        (torch.bfloat16, 64, "shifted", HOPPER, "scalar"),
        (torch.bfloat16, 64, "transposed", HOPPER, "scalar"),
        (torch.bfloat16, 64, "stepped", HOPPER, "scalar"),
        (torch.float32, 64, "contiguous", HOPPER, "vector"),
        (torch.bfloat16, 64, "contiguous", AMPERE, "vector"),
        (torch.bfloat16, 72, "contiguous", AMPERE, "scalar"),
        (torch.bfloat16, 64, "gaps", AMPERE, "scalar"),  # a stride of 72
        (torch.bfloat16, 72, "gaps", AMPERE, "scalar"),  # a stride of 80, a width of 72
    ],
)
def test_how_operands_are_read(dtype, width, layout, device, loads):
    good = torch.zeros(32, 64, dtype=dtype)
    matrix = laid_out(torch.zeros(32, width, dtype=dtype), layout)
    assert launch.load_kind(device, matrix, good) == loads
    assert launch.load_kind(device, good, matrix) == loads


def test_few_tokens_fill_the_gpu():
    """4 tiles of tokens on 132 multiprocessors; the vocabulary is split until they are busy."""
    tile = launch.linear_config(torch.bfloat16, 512, HOPPER, loads="tma", lean=True)
    splits = launch.vocab_splits(512, 151_936, tile, HOPPER)
    programs = 512 // tile.BLOCK_N * splits
    waves = -(-programs // HOPPER.num_sms)
    assert programs / (waves * HOPPER.num_sms) > 0.9


@given(
    num_tokens=st.integers(1, 10_000),
    vocab=st.integers(1, 300_000),
    config=st.sampled_from([SMALL, LinearConfig(128, 256, 64, num_warps=8, num_stages=4)]),
    num_sms=st.integers(1, 200),
)
def test_number_of_splits(num_tokens, vocab, config, num_sms):
    """At least one, none without a tile, and hardly worse than not splitting."""
    device = Device((9, 0), num_sms)
    splits = launch.vocab_splits(num_tokens, vocab, config, device)
    token_tiles, tiles = -(-num_tokens // config.BLOCK_N), -(-vocab // config.BLOCK_V)
    assert 1 <= splits <= tiles
    waves = -(-token_tiles * splits // num_sms)
    unsplit = -(-token_tiles // num_sms) * tiles
    assert waves * -(-tiles // splits) <= unsplit * (1 if token_tiles <= 16 else 1.25)


def test_groups_of_token_tiles_fill_the_gpu():
    """What runs together then reads the hidden states of one group, not of all tokens."""
    tile = LinearConfig(128, 256, 64, num_warps=8, num_stages=4)
    for num_tokens, vocab in ((8192, 128_256), (16_384, 248_320), (65_536, 151_936)):
        splits = launch.vocab_splits(num_tokens, vocab, tile, HOPPER)
        assert launch.TOKEN_GROUP * splits >= 0.95 * HOPPER.num_sms


@pytest.mark.parametrize(("tiles", "parts", "group"), [(1, 1, 16), (5, 3, 2), (7, 4, 3), (4, 2, 4)])
def test_every_tile_and_part_once(tiles, parts, group):
    """A group of tiles takes all parts before the next one does."""
    seen = torch.full((tiles * parts, 2), -1)
    _order_kernel[(tiles * parts,)](seen, tiles, parts, GROUP=group)
    assert len({tuple(pair) for pair in seen.tolist()}) == tiles * parts
    assert (seen[:, 0].diff() >= -group).all()
    groups = seen[:, 0] // group
    assert (groups.diff() >= 0).all()
    assert seen[:, 1].max() == parts - 1


@triton.jit
def _order_kernel(out_ptr, tiles, parts, GROUP: tl.constexpr):  # noqa: N803
    tile, part = grouped_tile(tiles, parts, GROUP)
    tl.store(out_ptr + 2 * tl.program_id(0), tile)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, part)
