"""Metrics of pairs and scores, and what chance alone could make of them.

Letters: n examples, R resamples. Everything is numpy on float64; nothing here runs a model or knows
about texts. A tie counts half wherever two things are compared.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, bootstrap

from plad_fast.errors import UsageError

FloatArray = NDArray[np.float64]

CONFIDENCE = 0.95

# Resampled values held at once; bounds the memory of a bootstrap over many examples (32 MB).
_BOOTSTRAP_BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval, in the unit of the values it was taken over."""

    mean: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True)
class SignTest:
    """How often one side won, and whether chance explains it."""

    wins: int
    ties: int
    losses: int

    p_value: float
    """Probability of so lopsided a result, either way, where each untied comparison is a fair toss
    of a coin; 1 without any."""


def margins(
    chosen_logps: ArrayLike,  # (n,)
    rejected_logps: ArrayLike,  # (n,)
) -> FloatArray:
    """Log-probability of the chosen response minus that of the rejected one, in nats; shape (n,).

    This is the quantity inside the hinge of the ranking loss (SLiC, arXiv 2210.00045).

    Raises:
        UsageError: no pairs, a log-probability that is not finite, or lengths that differ.
    """
    chosen = vector(chosen_logps, "chosen_logps")
    return chosen - vector(rejected_logps, "rejected_logps", len(chosen))


def paired_bootstrap(
    values: ArrayLike,  # (n,)
    *,
    groups: Sequence[Hashable] | None = None,  # (n,)
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of values, such as paired differences, with a percentile bootstrap interval.

    The examples are drawn with replacement `n_resamples` times; the interval holds the middle 95 %
    of the means so obtained, and the standard error is their standard deviation. The interval
    always contains the mean. It is too narrow for a handful of examples, and has no width for a
    single one or for examples that are all alike.

    Examples of one group, such as pairs of one prompt, are no independent evidence: groups are
    drawn, and all examples of a group come with it. Without `groups` each example is its own.

    Source: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation"; Efron
    and Tibshirani 1993, chapter 13 (percentile interval); Field and Welsh 2007, "Bootstrapping
    Clustered Data" (groups).

    Raises:
        UsageError: no examples, a value that is not finite, or fewer than two resamples.
    """
    values = vector(values, "values")
    if not isinstance(n_resamples, Integral) or n_resamples < 2:
        raise UsageError(f"n_resamples is {n_resamples!r}; take 2 or more (2000 is usual)")
    mean = float(values.mean())
    sums, counts = _by_group(values, groups)
    try:
        rng = np.random.default_rng(seed)
    except (TypeError, ValueError):
        raise UsageError(f"seed is {seed!r}; give a whole number of at least 0") from None
    if len(sums) == 1:
        return Interval(mean, mean, mean, 0.0)
    resampled = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, _BOOTSTRAP_BLOCK // len(sums)),
        method="percentile",
        rng=rng,
    )
    means = resampled.bootstrap_distribution
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    # Rounding, or very few resamples, can leave the mean just outside.
    low, high = min(float(low), mean), max(float(high), mean)
    return Interval(mean, low, high, float(means.std(ddof=1)))


def _by_group(
    values: FloatArray, groups: Sequence[Hashable] | None
) -> tuple[FloatArray, FloatArray]:
    """Sums and sizes of the groups, in the order in which they come."""
    if groups is None:
        return values, np.ones_like(values)
    if len(groups) != len(values):
        raise UsageError(
            f"there are {len(values)} examples and {len(groups)} groups; give one for each example"
        )
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    sums = np.bincount(index, weights=values).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)


def sign_test(
    outcomes: ArrayLike,  # (n,)
) -> SignTest:
    """The exact two-sided sign test of wins (1) against losses (0); ties (0.5) are left out.

    It assumes nothing of by how much a comparison is won.

    Source: Dixon and Mood 1946, "The Statistical Sign Test".

    Raises:
        UsageError: no outcomes, or one that is not 0, 0.5 or 1.
    """
    values = vector(outcomes, "outcomes")
    wins, ties, losses = (int((values == value).sum()) for value in (1.0, 0.5, 0.0))
    if wins + ties + losses < len(values):
        odd = values[~np.isin(values, (0.0, 0.5, 1.0))][0]
        raise UsageError(f"an outcome is {odd}; it must be 1 (won), 0.5 (tie) or 0 (lost)")
    decided = wins + losses
    p_value = float(binomtest(wins, decided).pvalue) if decided else 1.0
    return SignTest(wins, ties, losses, p_value)


def won(difference: FloatArray) -> FloatArray:
    """1 for a positive difference, 0.5 for none, 0 for a negative one; NaN stays."""
    return 0.5 * (1.0 + np.sign(difference))


def vector(
    values: ArrayLike, name: str, count: int | None = None, *, may_lack: bool = False
) -> FloatArray:
    """The values as (n,) float64; raises UsageError unless there are `count` of them, or some, and
    all are finite. With `may_lack` NaN stands for a value that there is not."""
    try:
        if np.iscomplexobj(values):  # the cast would drop the imaginary part
            raise TypeError("complex numbers")
        array = np.asarray(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} must hold one real number for each example: {error}") from None
    if array.ndim != 1 or len(array) != (len(array) or 1 if count is None else count):
        examples = "each example" if count is None else f"each of {count} examples"
        raise UsageError(f"{name} has shape {array.shape}; give one value for {examples}")
    bad = np.flatnonzero(np.isinf(array) if may_lack else ~np.isfinite(array))
    if len(bad):
        raise UsageError(
            f"{name} holds {len(bad)} values that are not finite, the first at index {bad[0]} "
            f"({array[bad[0]]}); leave those examples out of every array"
        )
    return array
