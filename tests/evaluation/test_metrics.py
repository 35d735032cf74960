"""Ranking, margins and win rates against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_fast.errors import UsageError
from plad_fast.evaluation import intervals, metrics

finite = st.floats(-1e6, 1e6, allow_nan=False)
paired = st.lists(st.tuples(finite, finite), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(paired)
def test_win_rates_of_both_sides_sum_to_one(pairs):
    a, b = (list(side) for side in zip(*pairs, strict=True))
    ours, theirs = (metrics.win_rate(*sides, n_resamples=50) for sides in ((a, b), (b, a)))
    assert ours.mean + theirs.mean == pytest.approx(1.0)
    assert ours.low + theirs.high == pytest.approx(1.0)
    assert metrics.ranking_accuracy(a, b) == ours.mean


def test_ranking_by_hand():
    chosen, rejected = [-1.0, -2.0, -3.0, -4.0], [-2.0, -2.0, -1.0, -5.0]
    assert intervals.outcomes(chosen, rejected).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert metrics.ranking_accuracy(chosen, rejected) == 0.625
    assert metrics.margins(chosen, rejected).tolist() == [1.0, 0.0, -2.0, 1.0]
    assert metrics.mean_margin(chosen, rejected) == 0.0


def test_all_ties_and_a_single_example_are_defined():
    assert metrics.win_rate([1.0, 2.0], [1.0, 2.0]) == intervals.Interval(0.5, 0.5, 0.5, 0.0)
    assert intervals.paired_bootstrap([2.0]) == intervals.Interval(2.0, 2.0, 2.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.win_rate([1.0, float("nan")], [1.0, 1.0]), "first at index 1"),
        (lambda: metrics.margins([float("-inf")], [0.0]), "chosen_logps holds 1 value"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(UsageError, match=message):
        call()
