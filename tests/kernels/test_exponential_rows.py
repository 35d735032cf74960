"""The kernel that leaves a multiple of the logits' gradient in their rows, run by Triton's
interpreter with small blocks.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plad_fast.ops.impl.workspace import compacting_order, moves
from tests.support.problems import assert_within_budget

pytest.importorskip("triton")

from plad_fast.kernels.exponential_rows import (
    ExponentialRows,
    exponential_rows,
    move_rows_,
    scale_rows,
)
from plad_fast.kernels.launch import RowsConfig

from tests.support import interpreter
from tests.support.stored_rows import (
    IGNORED,
    INF,
    NAN,
    Case,
    expected_gradient,
    expected_statistics,
    make_case,
    narrowed,
    normal,
)

pytestmark = interpreter.MARKS


def run(
    case: Case, row_width: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[ExponentialRows, Tensor]:  # (N, V) values
    """In the rows of the logits, of which the case keeps its own copy."""
    within, out = narrowed(case, dtype, row_width)
    found = exponential_rows(
        within.logits,
        within.targets,
        bias=within.bias,
        out=out,
        row_width=row_width,
        config=within.config,
        **within.options,
    )
    return found, out


def gradient(found: ExponentialRows, values: Tensor, grad: Tensor) -> Tensor:  # (N, V) float64
    return (grad * found.factor).double()[:, None] * values.double()


@given(
    rows=st.integers(0, 6),
    vocab=st.sampled_from([1, 15, 16, 17, 37, 64, 129]),
    extra=st.sampled_from([0, 3, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    size=st.sampled_from([0.1, 3.0, 60.0]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 0.7, 200.0]),
    logit_scale=st.sampled_from([1.0, -1.5]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.sampled_from([INF, 1.0, -0.5]),
    config=st.sampled_from([RowsConfig(16, num_warps=4), RowsConfig(64, num_warps=4)]),
    seed=st.integers(0, 2**16),
)
def test_meets_the_budget(
    rows, vocab, extra, dtype, size, bias, softcap, logit_scale, ignored, masked, config, seed
):
    """Of one block and of many, and with logits that leave the reference of the first behind."""
    case = make_case(
        *(rows, vocab), size=size, bias=bias, softcap=softcap, logit_scale=logit_scale,
        temperature=0.7, ignored=ignored, config=config, seed=seed,
    )  # fmt: skip
    if logit_scale > 0:
        without = normal(rows, vocab, seed=seed + 3) > masked
        without &= torch.arange(vocab) != case.targets.where(case.keep, 0)[:, None]
        case.logits.masked_fill_(without, -INF)
    grad = normal(rows, seed=seed + 4)
    found, values = run(case, vocab + extra, dtype)
    truth, same = (
        expected_statistics(case, d)["token_logprobs"] for d in (torch.float64, torch.float32)
    )
    assert_within_budget(found.token_logprobs, same, truth, "logprobs", roundings=16)
    truth, same = (expected_gradient(case, d, grad, None) for d in (torch.float64, torch.float32))
    got = gradient(found, values, grad)
    assert_within_budget(got.to(dtype), same.to(dtype), truth, "d logits", roundings=16)
    assert not values[~case.keep].any()
    assert not found.factor[~case.keep].any()


def test_every_entry_has_the_digits_of_its_dtype():
    """Small probabilities, too: logits that rise from block to block by less and by more than the
    reference allows, or fall; targets in the first, in the last and in the largest block.
    """
    steps = torch.arange(8).repeat_interleave(16)
    of_blocks = torch.stack([steps * x for x in (0, 5, 30, 45, 100, -5, -10)]).float()
    case = make_case(7, 128, size=1.0)
    case.logits += of_blocks
    for target in (0, 70, 127):
        case.targets.fill_(target)
        found, values = run(case, 128)
        truth = expected_gradient(case, torch.float64, torch.ones(7), None)
        got = gradient(found, values, torch.ones(7))
        # What is 127 nats or more below the largest is 0 in bfloat16, as it would be in float32.
        torch.testing.assert_close(got, truth, rtol=2**-8, atol=1e-37)


def test_confident_targets_keep_their_digits():
    """1 - p is small beside 1, and right to its own last digits, as are log p and the gradient."""
    case = make_case(6, 40)
    case.targets.fill_(20)
    case.logits[:, 20] = torch.tensor([16.0, 20.0, 24.0, 30.0, 50.0, 80.0])
    others = case.logits.double().scatter(1, case.targets[:, None], -INF)
    odds = (torch.logsumexp(others, 1) - case.logits[:, 20]).exp()
    found, values = run(case, 64)
    torch.testing.assert_close(-found.token_logprobs.double(), odds.log1p(), rtol=2e-5, atol=0)
    got = gradient(found, values, torch.ones(6))[:, 20]
    torch.testing.assert_close(got, odds / (1 + odds), rtol=2**-8, atol=0)
    wide, values = run(case, 64, torch.float32)
    got = gradient(wide, values, torch.ones(6))[:, 20]
    torch.testing.assert_close(got, odds / (1 + odds), rtol=2e-5, atol=0)


@pytest.mark.parametrize("column", [0, 20, 36])
def test_nan_stays_in_its_row(column):
    """And an ignored row, whatever it holds, is 0 times 0."""
    case = make_case(12, 37)
    case.targets[5], case.targets[8] = 20, IGNORED
    before, clean = run(case, 64)
    case.logits[5, column] = NAN
    case.logits[8] = NAN
    found, values = run(case, 64)
    others = torch.arange(12) != 5
    for mine, want in zip(found, before, strict=True):
        assert mine[5].isnan()
        assert torch.equal(mine[others], want[others])
    assert torch.equal(values[others], clean[others])
    assert not values[8].any()


@pytest.mark.parametrize("vocab", [1, 37])
def test_a_target_whose_others_are_masked_is_certain(vocab):
    """However small its logit is: nothing else of the row tells how large exponentials are."""
    case = make_case(3, vocab)
    case.targets.fill_(vocab // 2)
    case.logits.fill_(-INF)
    case.logits[:, vocab // 2] = torch.tensor([-1000.0, -100.0, 100.0])
    found, values = run(case, 64)
    for zeros in (found.token_logprobs, gradient(found, values, torch.ones(3))):
        assert torch.equal(zeros, torch.zeros_like(zeros))


def test_a_row_of_masked_tokens_alone_is_nan():
    case = make_case(3, 37)
    case.logits[1] = -INF
    for values in run(case, 64)[0]:
        assert values.isnan().tolist() == [False, True, False]


def test_reruns_are_bit_identical():
    case = make_case(3, 100, size=40.0)
    seen = set()
    for _ in range(3):
        found, values = run(case, 128)
        seen.add(b"".join(x.numpy().tobytes() for x in (*found, values.float())))
    assert len(seen) == 1


@given(active=st.lists(st.booleans(), max_size=24))
def test_moved_rows_fill_the_front(active):
    """To the same bits, and what is behind the front is left alone."""
    order = compacting_order(torch.tensor(active, dtype=torch.bool))
    values = normal(len(active), 40, seed=1).to(torch.bfloat16)[:, :37]
    want = values[order]
    before = values.clone()
    move_rows_(values, *moves(order), config=RowsConfig(16, num_warps=4))
    assert torch.equal(values[: len(order)], want)
    assert torch.equal(values[len(order) :], before[len(order) :])


@pytest.mark.parametrize("shape", [(3, 37), (1, 1), (5, 16), (0, 4), (4, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_scaled_rows_are_rounded_once(shape, flip):
    """As PyTorch rounds products of its own, into matrices of any strides."""
    grads, factors = normal(shape[0], seed=1), normal(shape[0], seed=2)
    wide = normal(*shape, seed=3)
    half = normal(*shape, seed=4).to(torch.bfloat16)
    outs = torch.zeros(2, *shape, dtype=torch.bfloat16)
    if flip:
        wide, half, outs = (x.mT.contiguous().mT for x in (wide, half, outs))
    config = RowsConfig(16, num_warps=4)
    scale_rows(grads, factors, (wide, outs[0]), (half, outs[1]), config=config)
    scale = (grads * factors)[:, None]
    assert torch.equal(outs[0], (wide * scale).to(torch.bfloat16))
    assert torch.equal(outs[1], (half.float() * scale).to(torch.bfloat16))
    alone = half.clone()
    scale_rows(grads, factors, (alone, alone), config=config)
    assert torch.equal(alone, outs[1])


def test_scaled_rows_go_where_they_belong():
    """And leave the others alone."""
    grads, factors, values = normal(3, seed=1), normal(3, seed=2), normal(3, 20, seed=3)
    hidden = normal(3, 20, seed=4)
    places = torch.tensor([5, 0, 3])
    out, scaled = torch.full((6, 20), NAN), torch.empty(3, 20)
    scale_rows(grads, factors, (values, out), (hidden, scaled), rows=places)
    scale = (grads * factors)[:, None]
    assert torch.equal(out[places], values * scale)
    assert torch.equal(scaled, hidden * scale)
    assert out[[1, 2, 4]].isnan().all()


def test_scaling_two_matrices_is_one_launch(launched):
    rows, factors = torch.ones(2, 3), torch.ones(2)
    scale_rows(factors, factors, (rows, rows.clone()), (rows, rows.clone()))
    scale_rows(factors[:0], factors[:0], (rows[:0], rows[:0]))
    assert launched == ["_scale_rows_kernel"]
