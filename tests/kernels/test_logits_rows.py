"""The kernels on stored logits, run by Triton's interpreter.

Their launchers are called here as the backend calls them, with small blocks, so that a row of a
few dozen entries has several; the ops on top of them are tested in `test_triton_backend`. All that
a launcher allocates is full of NaN beforehand.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_fast.ops.impl.workspace import compacting_order
from tests.support.problems import assert_within_budget

pytest.importorskip("triton")

from plad_fast.kernels.logits_rows import RowStatistics

from tests.support import interpreter
from tests.support.stored_rows import (
    DTYPES,
    IGNORED,
    INF,
    LAYOUTS,
    NAN,
    Case,
    cases,
    expected_gradient,
    expected_statistics,
    laid_out,
    make_case,
    narrowed,
    normal,
)

pytestmark = interpreter.MARKS

DRAWN = settings(max_examples=25)
FEWER = settings(max_examples=12)


def assert_statistics_near_truth(case: Case, ours: RowStatistics) -> None:
    """Also of rows whose truth is infinite."""
    for name, exact in expected_statistics(case, torch.float64).items():
        torch.testing.assert_close(getattr(ours, name).double(), exact, rtol=2e-5, atol=2e-6)


@DRAWN
@given(case=cases(), order=st.sampled_from([0, 1, 2]))
def test_forward_meets_the_budget(case, order):
    """Any shape, dtype, option, layout and block; N = 0 too."""
    ours = case.forward(order)
    truth = expected_statistics(case, torch.float64, order)
    same = expected_statistics(case, torch.float32, order)
    for name, exact in truth.items():
        mine = getattr(ours, name)
        if name == "entropy" and not order:
            assert mine is None
            continue
        assert mine.dtype == torch.float32
        assert mine.shape == case.targets.shape
        assert_within_budget(mine, same[name], exact, name, roundings=16)
        assert not mine[~case.keep].any()


@DRAWN
@given(
    case=cases(),
    with_grad_lse=st.booleans(),
    scale=st.sampled_from([None, 3.0, 0.02]),
    out_dtype=st.sampled_from([None, *DTYPES]),
    out_layout=st.sampled_from(LAYOUTS),
    sparse=st.sampled_from([1.0, 0.3, 0.0]),
)
def test_gradient_meets_the_budget(
    case, with_grad_lse, scale, out_dtype, out_layout, sparse
):  # fmt: skip
    """Any upstream gradient, also negative, also 0; into any dtype and layout, or in place."""
    shape = case.targets.shape
    grad = normal(*shape, seed=1) * (normal(*shape, seed=3).sigmoid() < sparse)
    grad_lse = normal(*shape, seed=2) * (sparse > 0) if with_grad_lse else None
    truth = expected_gradient(case, torch.float64, grad, grad_lse) / (scale or 1.0)
    same = expected_gradient(case, torch.float32, grad, grad_lse) / (scale or 1.0)
    statistics = case.forward(False)
    out = case.logits
    if out_dtype is not None:
        out = laid_out(torch.full(case.logits.shape, NAN, dtype=out_dtype), out_layout)
    divisor = None if scale is None else torch.tensor(scale)
    ours = case.backward(grad, grad_lse, statistics=statistics, out=out, scale=divisor)
    assert ours is out
    # The rounding of a 16-bit result is torch's too.
    same = same.to(ours.dtype)
    assert_within_budget(ours, same, truth, "d logits", roundings=16)
    silent = ~case.keep | (grad == 0) & (True if grad_lse is None else grad_lse == 0)
    assert not ours[silent].any()


@pytest.mark.parametrize("layout", ["gaps", "stepped", "but the last"])
def test_nothing_is_written_between_the_entries_of_the_result(layout):
    case = make_case(3, 4, 37)
    storage = laid_out(torch.full((3, 4, 37), NAN), layout)
    whole = storage.as_strided((storage.untyped_storage().nbytes() // 4,), (1,), 0)
    whole.fill_(7.0)
    case.backward(torch.ones(3, 4), out=storage)
    assert (whole != 7.0).sum() == 3 * 4 * 37


@FEWER
@given(
    active=st.lists(st.booleans(), max_size=8),
    dtype=st.sampled_from(DTYPES),
    with_grad_lse=st.booleans(),
    in_place=st.booleans(),
)
def test_compaction_equals_selection(active, dtype, with_grad_lse, in_place):
    """Active rows move to the front, to the same bits as without moving."""
    active = torch.tensor(active, dtype=torch.bool)
    case = make_case(len(active), 37, dtype=dtype, bias=True, ignored=0.2, softcap=5.0)
    grad = normal(len(active), seed=1)
    grad_lse = normal(len(active), seed=2) if with_grad_lse else None
    statistics = case.forward(False)
    want = case.backward(grad, grad_lse, statistics=statistics)
    rows = compacting_order(active)
    before = case.logits.clone()
    out = case.logits[: len(rows)] if in_place else torch.empty(len(rows), 37, dtype=dtype)
    ours = case.backward(grad, grad_lse, statistics=statistics, out=out, rows=rows)
    assert torch.equal(ours, want[rows])
    assert torch.equal(case.logits[len(rows) :], before[len(rows) :])


@FEWER
@given(
    vocab=st.sampled_from([1, 15, 16, 17, 37, 64]),
    extra=st.sampled_from([0, 3, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    softcap=st.sampled_from([None, 5.0]),
    active=st.lists(st.booleans(), max_size=6),
    compacted=st.booleans(),
)
def test_a_narrower_gradient_fits_into_the_rows_of_its_logits(
    vocab, extra, dtype, softcap, active, compacted
):
    """Of one block and of many, compacted or not: to the same bits as elsewhere."""
    flags = torch.tensor(active, dtype=torch.bool)
    case = make_case(len(active), vocab, bias=True, ignored=0.2, softcap=softcap)
    grad = normal(len(active), seed=1)
    statistics = case.forward(False)
    want = case.backward(grad, statistics=statistics, out=torch.empty(len(active), vocab).to(dtype))
    within, out = narrowed(case, dtype, vocab + extra)
    ours = within.forward(0)
    for mine, near in zip(ours[:4], statistics[:4], strict=True):
        assert torch.equal(mine, near)
    rows = compacting_order(flags) if compacted else None
    out = out if rows is None else out[: len(rows)]
    result = within.backward(grad, statistics=ours, out=out, rows=rows)
    assert torch.equal(result, want if rows is None else want[rows])


def test_compaction_does_not_depend_on_the_order_of_programs(programs_backwards):
    """The interpreter runs them in ascending order; here in the reverse of it, too."""
    active = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    results = []
    for change in (lambda: None, programs_backwards):
        case = make_case(10, 37)
        rows = compacting_order(active)
        statistics = case.forward()
        change()
        out = case.logits[: len(rows)]
        results.append(case.backward(normal(10, seed=1), statistics=statistics, out=out, rows=rows))
    assert torch.equal(*results)


@pytest.mark.parametrize(("vocab", "targets"), [(1, [0]), (33, [0, 15, 16, 31, 32])])
def test_targets_on_the_borders_of_blocks(vocab, targets):
    """First and last of the vocabulary, and alone in the last block, too."""
    case = make_case(len(targets), vocab)
    case.targets = torch.tensor(targets)
    assert_statistics_near_truth(case, case.forward())
    grad = normal(len(targets), seed=1)
    want = expected_gradient(case, torch.float64, grad, None)
    torch.testing.assert_close(case.backward(grad).double(), want, rtol=2e-5, atol=1e-6)


MASKS = {
    "the first block": range(16),
    "two blocks": range(32),
    "the last block": range(32, 37),
    "all but the target": [v for v in range(37) if v != 20],
    "the target": [20],
    "the target's neighbours": [19, 21],
}


@pytest.mark.parametrize("by_bias", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_tokens(mask, by_bias):
    """-inf takes a token out of the vocabulary; what is left is a distribution."""
    case = make_case(5, 37, bias=True)
    case.targets.fill_(20)
    (case.bias if by_bias else case.logits)[..., list(mask)] = -INF
    assert_statistics_near_truth(case, case.forward())
    grad, grad_lse = normal(5, seed=1), normal(5, seed=2)
    if 20 in mask:  # autograd has 0 * inf in what d log p / d z is
        got = case.backward(grad)
        assert torch.equal(got[:, 20], grad)
        assert got.isfinite().all()
        return
    got = case.backward(grad, grad_lse)
    assert not got[:, list(mask)].any()
    want = expected_gradient(case, torch.float64, grad, grad_lse)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)


def test_a_row_of_masked_tokens_alone_is_nan():
    case = make_case(3, 37)
    case.logits[1] = -INF
    ours = case.forward()
    for values in ours:
        assert values.isnan().tolist() == [False, True, False]
    assert case.backward(torch.ones(3)).isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("column", "dtype"), list(zip([0, 20, 36], DTYPES, strict=True)))
def test_nan_stays_in_its_row(column, dtype, softcap):
    """Wherever in the row it is, also at the target, which the sum leaves out."""
    case = make_case(4, 37, dtype=dtype, softcap=softcap)
    case.targets[1], case.targets[2] = 20, IGNORED
    want, grad = case.forward(), normal(4, seed=1)
    gradient = case.backward(grad, statistics=want)
    case.logits[1, column] = NAN
    case.logits[2] = NAN
    ours, others = case.forward(), torch.arange(4) != 1
    for mine, clean in zip(ours, want, strict=True):
        assert mine[1].isnan()
        assert torch.equal(mine[others], clean[others])
    got = case.backward(grad, statistics=ours)
    assert got[1].isnan().all()
    assert torch.equal(got[others], gradient[others])
    grad[1] = 0.0
    for grad_lse in (None, torch.zeros(4)):
        assert not case.backward(grad, grad_lse, statistics=ours)[1].any()


def test_all_rows_ignored():
    case = make_case(7, 37, bias=True, ignored=1.0)
    case.logits.fill_(NAN)
    for values in case.forward():
        assert not values.any()
    assert not case.backward(torch.ones(7), torch.ones(7)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_targets_keep_their_digits(dtype):
    """1 - p is small beside 1, and right to its own last digits, as are log p and the gradient."""
    case = make_case(6, 40, dtype=dtype)
    case.targets.fill_(20)
    # p from 0.999 to where 1 - p is far below the last digit of 1
    case.logits[:, 20] = torch.tensor([16.0, 20.0, 24.0, 30.0, 50.0, 80.0])
    ours = case.forward()
    logits = case.logits.double()
    others = logits.scatter(1, case.targets[:, None], -INF)
    odds = (torch.logsumexp(others, 1) - logits[:, 20]).exp()
    assert odds.max() < 1e-3
    assert odds.min() < 1e-20
    torch.testing.assert_close(ours.miss.double(), odds / (1 + odds), rtol=2e-5, atol=0)
    torch.testing.assert_close(-ours.token_logprobs.double(), odds.log1p(), rtol=2e-5, atol=0)
    got = case.backward(torch.ones(6), out=torch.empty(6, 40))[:, 20]
    torch.testing.assert_close(got.double(), odds / (1 + odds), rtol=2e-5, atol=0)


def test_logits_far_beyond_the_softcap():
    """They are all the cap; tanh is flat there, and no exponential overflows."""
    case = make_case(4, 37, size=1e6, softcap=5.0)
    ours = case.forward()
    assert_statistics_near_truth(case, ours)
    assert not case.backward(torch.ones(4)).any()


def test_one_row_of_logits_for_all():
    """An expanded tensor has a stride of 0."""
    case = make_case(9, 37)
    case.logits = case.logits[:1].expand(9, 37)
    assert_statistics_near_truth(case, case.forward())


def test_statistics_and_gradients_of_any_stride():
    """Upstream gradients are often expanded from one number, and slices of something longer."""
    case = make_case(3, 4, 37, bias=True)
    dense = case.backward(torch.full((3, 4), 2.0), torch.full((3, 4), -1.0))
    ours = case.forward()
    case.bias = laid_out(case.bias, "stepped")
    case.targets = case.targets.T.contiguous().T
    of_rows = {name: getattr(ours, name) for name in ("lse", "tail", "miss")}
    strided = ours._replace(**{name: x.T.contiguous().T for name, x in of_rows.items()})
    sparse = case.backward(
        torch.tensor(2.0).expand(3, 4), torch.full((3, 8), -1.0)[:, ::2], statistics=strided
    )
    assert torch.equal(dense, sparse)
    assert torch.equal(case.forward().lse, ours.lse)


def test_a_large_vocabulary():
    """Qwen2.5's, in the blocks that the heuristic chooses."""
    case = make_case(1, 151_936, config=None)
    case.targets[:] = 151_935
    ours = case.forward()
    truth, same = (expected_statistics(case, d) for d in (torch.float64, torch.float32))
    for name, exact in truth.items():
        assert_within_budget(getattr(ours, name), same[name], exact, name, roundings=16)
    grad = torch.tensor([-2.0])
    truth, same = (expected_gradient(case, d, grad, None) for d in (torch.float64, torch.float32))
    assert_within_budget(case.backward(grad), same, truth, "d logits", roundings=16)


FAR = {
    "rows": ((6, 20), (2**29 + 8, 1)),
    "the vocabulary": ((6, 20), (1, 2**27 + 8)),
    "sequences": ((3, 2, 20), (2**30 + 8, 20, 1)),
    "tokens": ((2, 3, 20), (20, 2**30 + 8, 1)),
}


@pytest.mark.parametrize(
    ("shape", "stride", "dtype"),
    [*((*far, torch.float32) for far in FAR.values()), (*FAR["rows"], torch.bfloat16)],
    ids=[*FAR, "rows of 16 bits"],
)
def test_offsets_beyond_31_bits(sparse, shape, stride, dtype):
    """What is far apart begins past 2**31 entries; read there, written there, and in place."""
    case = make_case(*shape, dtype=dtype)
    want, grad = case.forward(), normal(*shape[:-1], seed=1)
    gradient = case.backward(grad)
    out = case.backward(grad, statistics=want, out=sparse(shape, stride, dtype))
    assert torch.equal(out, gradient)
    out.copy_(case.logits)
    case = replace(case, logits=out)
    ours = case.forward()
    for mine, near in zip(ours, want, strict=True):
        assert torch.equal(mine, near)
    if len(shape) == 2:
        rows = compacting_order(torch.arange(6) % 3 != 0)
        near = torch.empty(len(rows), 20, dtype=dtype)
        case.backward(grad, statistics=ours, out=near, rows=rows)
        assert torch.equal(near, gradient[rows])
    case.backward(grad, statistics=ours, out=out)
    assert torch.equal(out, gradient)


def test_a_gradient_in_bfloat16_is_the_one_in_float32_rounded():
    case, grad = make_case(2, 100), normal(2, seed=1)
    wide = case.backward(grad, out=torch.empty(2, 100))
    narrow = case.backward(grad, out=torch.empty(2, 100, dtype=torch.bfloat16))
    assert torch.equal(narrow, wide.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reruns_are_bit_identical(dtype):
    case = make_case(3, 50, dtype=dtype, bias=True)
    seen = set()
    for _ in range(3):
        ours = case.forward()
        gradient = case.backward(normal(3, seed=1), statistics=ours)
        results = [*ours, gradient.float()]
        seen.add(b"".join(x.numpy().tobytes() for x in results))
    assert len(seen) == 1


def test_number_of_launches(launched):
    """One each, whatever the size; none for nothing."""
    for shape in [(3, 40), (2, 2, 40), (0, 40), (0, 4, 40), (4, 0, 40)]:
        case = make_case(*shape)
        once = int(math.prod(shape) > 0)
        statistics = case.forward()
        assert launched == ["_logits_rows_forward_kernel"] * once
        launched.clear()
        case.backward(torch.ones(shape[:-1]), statistics=statistics)
        assert launched == ["_logits_rows_backward_kernel"] * once
        launched.clear()
    case = make_case(3, 40)
    none = compacting_order(torch.zeros(3, dtype=torch.bool))
    case.backward(torch.ones(9), statistics=case.forward(), out=case.logits[:0], rows=none)
    assert launched == ["_logits_rows_forward_kernel"]
