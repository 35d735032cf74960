"""Numbers about texts and log-probabilities: numpy arrays in, numpy arrays and floats out.

Nothing here runs a model or reads a file. Every mean that is reported comes with a bootstrap
interval (`paired_bootstrap`), and a tie counts half wherever two things are compared.
"""

from __future__ import annotations

from numpy.typing import ArrayLike

from plad_fast.evaluation.intervals import (
    FloatArray,
    Interval,
    aligned,
    outcomes,
    paired_bootstrap,
    vector,
)


def ranking_accuracy(
    chosen_logps: ArrayLike,  # (n,)
    rejected_logps: ArrayLike,  # (n,)
) -> float:
    """Share of pairs whose chosen response has the larger log-probability; a tie counts half.

    With an interval: `win_rate(chosen_logps, rejected_logps)`. It is what the ranking loss of PLaD
    (arXiv 2406.02886) trains for, and the "reward accuracy" of preference learning without a
    reference model (Rafailov et al. 2023, arXiv 2305.18290).

    Raises:
        UsageError: no pairs, a log-probability that is not finite, or lengths that differ.
    """
    return float(outcomes(chosen_logps, rejected_logps).mean())


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
    return chosen - aligned(rejected_logps, chosen, "rejected_logps", "chosen_logps")


def mean_margin(
    chosen_logps: ArrayLike,  # (n,)
    rejected_logps: ArrayLike,  # (n,)
) -> float:
    """Mean of `margins`, in nats."""
    return float(margins(chosen_logps, rejected_logps).mean())


def win_rate(
    scores_a: ArrayLike,  # (n,)
    scores_b: ArrayLike,  # (n,)
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """How often `a` scores higher than `b` on the same example, a tie counting half.

    The rates of `a` over `b` and of `b` over `a` sum to 1. The interval is that of
    `paired_bootstrap` (Koehn 2004) over the per-example `outcomes`.

    Raises:
        UsageError: no examples, a score that is not finite, or lengths that differ.
    """
    return paired_bootstrap(outcomes(scores_a, scores_b), n_resamples=n_resamples, seed=seed)
