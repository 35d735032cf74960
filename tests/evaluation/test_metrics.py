"""Metrics by hand; bootstrap intervals and the sign test by textbooks and by what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_fast.errors import UsageError
from plad_fast.evaluation import metrics


def test_ranking_by_hand():
    chosen, rejected = [-1.0, -2.0, -3.0, -4.0], [-2.0, -2.0, -1.0, -5.0]
    margins = metrics.margins(chosen, rejected)
    assert margins.tolist() == [1.0, 0.0, -2.0, 1.0]
    assert metrics.won(margins).tolist() == [1.0, 0.5, 0.0, 1.0]


def test_all_ties_and_a_single_example_are_defined():
    assert metrics.paired_bootstrap([0.5, 0.5]) == metrics.Interval(0.5, 0.5, 0.5, 0.0)
    assert metrics.paired_bootstrap([2.0]) == metrics.Interval(2.0, 2.0, 2.0, 0.0)


vectors = st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=30)


def test_a_standard_error_is_that_of_a_sample():
    """Of two resampled means m and M it is (M - m) / sqrt(2); the interval is 95 % of M - m."""
    found = metrics.paired_bootstrap(np.arange(10.0), n_resamples=2)
    assert found.low < found.mean < found.high
    between = (found.high - found.low) / 0.95
    assert found.standard_error == pytest.approx(between / math.sqrt(2))


def test_bootstrap_has_the_textbook_standard_error():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    result = metrics.paired_bootstrap(values, n_resamples=4000)
    expected = values.std() / np.sqrt(len(values))
    assert result.mean == pytest.approx(values.mean())
    assert result.standard_error == pytest.approx(expected, rel=0.05)
    assert result.low == pytest.approx(values.mean() - 1.96 * expected, abs=0.1 * expected)
    assert result.high == pytest.approx(values.mean() + 1.96 * expected, abs=0.1 * expected)


def test_bootstrap_draws_groups_whole():
    """Three copies of every example say no more than one; unequal groups weigh by their size."""
    values = np.random.default_rng(3).normal(size=50)
    alone = metrics.paired_bootstrap(values)
    assert metrics.paired_bootstrap(values, groups=range(50)) == alone
    copies = metrics.paired_bootstrap(np.tile(values, 3), groups=list(range(50)) * 3)
    for name, value in vars(alone).items():
        assert getattr(copies, name) == pytest.approx(value, rel=1e-12)
    assert metrics.paired_bootstrap(np.tile(values, 3)).standard_error < 0.7 * alone.standard_error
    unequal = metrics.paired_bootstrap([1.0, 0.0, 0.0, 0.0], groups=["a", "b", "b", "b"])
    assert (unequal.mean, unequal.low, unequal.high) == (0.25, 0.0, 1.0)


def test_bootstrap_in_several_blocks(monkeypatch):
    values = np.arange(40.0)
    monkeypatch.setattr(metrics, "_BOOTSTRAP_BLOCK", 1000)  # 25 resamples at once
    result = metrics.paired_bootstrap(values, n_resamples=2001)
    assert result.standard_error == pytest.approx(values.std() / np.sqrt(40), rel=0.1)


@settings(max_examples=50, deadline=None)
@given(vectors, st.integers(2, 50), st.integers(0, 5))
def test_bootstrap_contains_the_mean_and_is_deterministic(values, n_resamples, seed):
    first = metrics.paired_bootstrap(values, n_resamples=n_resamples, seed=seed)
    assert first == metrics.paired_bootstrap(values, n_resamples=n_resamples, seed=seed)
    assert first.low <= first.mean <= first.high
    # Rounding of a mean may leave the hull of equal values by a last bit.
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= first.low
    assert first.high <= max(values) + slack


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 1), (5, 0), (3, 3), (4, 9), (60, 40), (520, 480), (4000, 1000)]
)
def test_sign_test_is_the_exact_binomial_test(wins, losses):
    outcomes = [1.0] * wins + [0.5] * 7 + [0.0] * losses
    result = metrics.sign_test(outcomes)
    assert (result.wins, result.ties, result.losses) == (wins, 7, losses)
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))  # whole numbers: no rounding
    expected = min(1.0, 2 * tail / 2**n)
    assert result.p_value == pytest.approx(expected, rel=1e-9)
    assert metrics.sign_test([1 - x for x in outcomes]).p_value == result.p_value


def test_nothing_but_ties_is_no_evidence():
    assert metrics.sign_test([0.5, 0.5]) == metrics.SignTest(0, 2, 0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.margins([1.0, float("nan")], [1.0, 1.0]), "first at index 1"),
        (lambda: metrics.margins([float("-inf")], [0.0]), "chosen_logps holds 1 value"),
        (lambda: metrics.paired_bootstrap([]), "one value for each example"),
        (lambda: metrics.paired_bootstrap([[1.0]]), r"shape \(1, 1\)"),
        (lambda: metrics.margins([1.0], [1.0, 2.0]), r"rejected_logps has shape \(2,\)"),
        (lambda: metrics.paired_bootstrap([1.0], n_resamples=1), "take 2 or more"),
        (lambda: metrics.paired_bootstrap([1.0, 2.0], seed=1.5), "seed is 1.5"),
        (lambda: metrics.margins(np.array([1j]), [1.0]), "chosen_logps must hold one real number"),
        (lambda: metrics.paired_bootstrap([1.0], groups="ab"), "1 examples and 2 groups"),
        (lambda: metrics.sign_test([1.0, 0.75]), "an outcome is 0.75"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(UsageError, match=message):
        call()
