"""Thousands of random public calls, valid and hostile: the right answer, or a refusal by name.

They run in a process of their own: a crash or a hang there is a failure here. To see one case
again: `python -m tests.support.fuzzing 1234`.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from plad_fast import (
    UsageError,
    fused_linear_preference_loss,
    linear_sequence_logprobs,
    sequence_logprobs,
)
from tests.support import fuzzing
from tests.support.fuzzing import Case, verdict
from tests.support.launched import Started
from tests.support.problems import make_problem


def run(numbers: str, folder: Path) -> None:
    started = Started(1, [numbers], folder, program=fuzzing.main)
    assert started.statuses(3600) == [0], started.said()[-6000:]  # the last case is the last number


def test_a_thousand_calls(tmp_path):
    run("0:1000", tmp_path)


@pytest.mark.slow
def test_ten_thousand_calls(tmp_path):
    run("0:10000", tmp_path)


def test_the_verdict_finds_what_it_looks_for():
    """What else would a run without a failure mean?"""

    def raising(error: Exception):
        def call():
            raise error

        return call

    def wrong(result):
        raise AssertionError("off by one")

    assert verdict(Case("", lambda: 1)) is None
    assert verdict(Case("", raising(UsageError("beta is 0")), names=("beta",))) is None
    assert "refused" in verdict(Case("", raising(UsageError("beta is 0"))))
    assert "without naming" in verdict(Case("", raising(UsageError("no")), names=("beta",)))
    assert "TypeError" in verdict(Case("", raising(TypeError("beta")), names=("beta",)))
    assert "accepted" in verdict(Case("", lambda: 1, names=("beta",)))
    assert "off by one" in verdict(Case("", lambda: 1, wrong))
    assert "off by one" in verdict(Case("", lambda: 1, wrong, ("beta",), may_pass=True))


def linear(hidden, problem):
    _, weight, targets, cu_seqlens = problem.inputs
    return linear_sequence_logprobs(hidden, weight, targets, cu_seqlens).sums.sum()


def fused(hidden, problem):
    _, weight, targets, cu_seqlens = problem.inputs
    return fused_linear_preference_loss(hidden, weight, targets, cu_seqlens, beta=99.0).loss


def stored(hidden, problem):
    _, weight, targets, cu_seqlens = problem.inputs
    return sequence_logprobs(hidden @ weight.T, targets, cu_seqlens).sums.sum()


@pytest.mark.parametrize("loss", [linear, fused, stored])
class TestDerivativesThatDoNotExist:
    """Each of these gave 0, or lost a term, without a word."""

    def test_a_penalty_on_the_gradient_is_refused(self, loss):
        problem = make_problem([3, 2])
        hidden = problem.hidden
        (grad,) = torch.autograd.grad(loss(hidden, problem), hidden, create_graph=True)
        penalty = grad.pow(2).sum() + hidden.pow(2).sum()
        with pytest.raises(UsageError, match="no second derivative"):
            torch.autograd.grad(penalty, hidden)

    def test_a_graph_of_the_gradient_alone_changes_nothing(self, loss):
        problem = make_problem([3, 2])
        first, again = (
            torch.autograd.grad(loss(problem.hidden, problem), problem.leaves, create_graph=create)
            for create in (False, True)
        )
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)

    def test_transforms_are_refused(self, loss):
        problem = make_problem([3, 2])
        hidden = problem.hidden.detach()
        with pytest.raises(UsageError, match=r"torch\.func"):
            torch.func.jvp(lambda h: loss(h, problem), (hidden,), (hidden,))
        with pytest.raises(UsageError, match=r"torch\.func"):
            torch.func.vmap(lambda h: loss(h, problem))(hidden[None])

    def test_forward_mode_is_refused(self, loss):
        problem = make_problem([3, 2])
        hidden = problem.hidden.detach()
        problem.weight.requires_grad_(False)
        with forward_ad.dual_level(), pytest.raises(UsageError, match="forward-mode"):
            loss(forward_ad.make_dual(hidden, hidden), problem)


def test_nan_stays_in_its_sequence():
    """NaN in a hidden state is NaN in the sums of that sequence, its loss, and no other's."""
    problem = make_problem([3, 2, 4, 1])
    with torch.no_grad():
        problem.hidden[6, 2] = math.nan
    ours = fused_linear_preference_loss(*problem.inputs, beta=99.0)
    assert ours.sums.isnan().tolist() == [False, False, True, False]
    assert ours.group_losses.isnan().tolist() == [False, True]
    assert ours.loss.isnan()
    (grad,) = torch.autograd.grad(ours.loss, problem.hidden)
    assert grad[:5].isfinite().all()
    assert grad[6].isnan().all()
