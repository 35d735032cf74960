"""Likelihood against quality: by hand, against scipy, and against statistics over real copies."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from plad_fast.errors import UsageError
from plad_fast.evaluation.calibration import ScoredSamples, evaluate_calibration, reliability


def samples(logps, quality, name="s", teacher=None):
    ids = [f"p{p}" for p in range(len(logps))]
    return ScoredSamples(name, ids, logps, quality, teacher)


def random_samples(seed, n_prompts=12, name="s", signal=0.0):
    """Ragged, with ties in both, prompts of one sample, and a prompt without any."""
    rng = np.random.default_rng(seed)
    sizes = [0, 1, *rng.integers(2, 7, n_prompts - 2)]
    quality = [rng.integers(0, 4, k).astype(float) for k in sizes]
    logps = [np.round(rng.normal(signal * q, 1.0), 1) for q in quality]
    return samples(logps, quality, name)


def measure(one):
    return evaluate_calibration([one], n_resamples=50)["students"][0]


def test_by_hand():
    row = measure(
        samples(
            [[-3.0, -2.0, -1.0], [-1.0, -2.0], [-5.0, -5.0], [-4.0]],
            [[0.0, 0.5, 1.0], [0.0, 1.0], [0.0, 1.0], [0.5]],
            teacher=[-2.0, 0.0, np.nan, -1.0],
        )
    )
    assert (row["n_prompts"], row["n_samples"], row["n_ranked"]) == (4, 8, 2)
    # The first prompt is in order, the second the wrong way round; the third has equal logps,
    # which is a tie for the AUROC and no order at all for the correlations.
    assert row["spearman_within"]["mean"] == pytest.approx(0.0)
    assert row["kendall_within"]["mean"] == pytest.approx(0.0)
    assert row["auroc_within"]["mean"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    # The teacher's answer against each sample: win, tie, loss; two wins; one win.
    assert row["auroc_teacher"]["mean"] == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    # The likeliest sample minus the mean: 1 - 0.5, 0 - 0.5, and with both likeliest 0.
    assert row["likeliest_gain"]["mean"] == pytest.approx(0.0)
    assert row["mean_quality"]["mean"] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(4))
def test_correlations_are_those_of_scipy(seed):
    one = random_samples(seed, signal=0.5)
    row = measure(one)
    varied = [
        (a, b)
        for a, b in zip(one.logps, one.quality, strict=True)
        if len(set(a)) > 1 and len(set(b)) > 1
    ]
    assert row["n_ranked"] == len(varied) > 5
    for name, function in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        expected = np.mean([function(a, b).statistic for a, b in varied])
        assert row[f"{name}_within"]["mean"] == pytest.approx(expected)


def test_auroc_is_the_share_of_pairs_in_order():
    one = random_samples(5, signal=1.0)

    def brute(x, y):
        couples = [(i, j) for i in range(len(x)) for j in range(len(x)) if y[i] > y[j]]
        return np.mean([(x[i] > x[j]) + 0.5 * (x[i] == x[j]) for i, j in couples])

    row = measure(one)
    within = [brute(x, y) for x, y in zip(one.logps, one.quality, strict=True) if len(set(y)) > 1]
    assert row["auroc_within"]["mean"] == pytest.approx(np.mean(within))
    # With two classes it is the textbook area under the ROC curve, U / (n m).
    two = samples([[0.1, 0.4, 0.35, 0.8, 0.4]], [[0, 0, 1, 1, 1]])
    u = stats.mannwhitneyu([0.35, 0.8, 0.4], [0.1, 0.4]).statistic
    assert measure(two)["auroc_within"]["mean"] == pytest.approx(u / 6)


@pytest.mark.parametrize(
    ("logps", "quality"),
    [
        ([[-1.0, -1.0]] * 3, [[0.0, 1.0]] * 3),
        ([[-1.0, -2.0]] * 3, [[1.0, 1.0]] * 3),
        ([[-1.0]], [[1.0]]),
    ],
    ids=["same likelihood", "same quality", "one sample"],
)
def test_what_does_not_vary_has_no_correlation(logps, quality):
    row = measure(samples(logps, quality))
    for name in ("spearman_within", "kendall_within"):
        assert row[name] is None, name
    assert row["n_ranked"] == 0
    json.dumps(row, allow_nan=False)


def test_intervals_are_over_prompts_not_over_samples():
    """Copies of a sample are no new evidence: eight of each leave the interval as wide."""
    one = random_samples(3, n_prompts=40, signal=0.5)
    copied = samples([np.repeat(v, 8) for v in one.logps], [np.repeat(v, 8) for v in one.quality])
    single, several = measure(one), measure(copied)
    for name in ("kendall_within", "auroc_within", "mean_quality"):
        assert several[name] == pytest.approx(single[name]), name


def test_comparison_is_paired_and_last_against_first():
    before = random_samples(1, n_prompts=40, name="before", signal=0.0)
    after = samples(
        [2.0 * q + 0.1 * x for q, x in zip(before.quality, before.logps, strict=True)],
        before.quality,
        "after",
    )
    again = ScoredSamples("again", after.prompt_ids, after.logps, after.quality)
    result = evaluate_calibration([before, after, again], n_resamples=300)
    couples = [(c["candidate"], c["baseline"]) for c in result["comparisons"]]
    assert couples == [("again", "before"), ("again", "after"), ("after", "before")]
    gain, none = result["comparisons"][:2]
    for name in ("spearman_within", "kendall_within", "auroc_within"):
        assert gain[name]["low"] > 0, name
        assert (none[name]["low"], none[name]["mean"], none[name]["high"]) == (0, 0, 0), name
    rows = result["students"]
    difference = rows[1]["mean_quality"]["mean"] - rows[0]["mean_quality"]["mean"]
    assert gain["mean_quality"]["mean"] == pytest.approx(difference)
    assert gain["auroc_teacher"] is None
    json.dumps(result, allow_nan=False)


def test_reliability_by_rank_leaves_out_how_hard_a_prompt_is():
    """Hard prompts are likelier here, and still the likelier sample of each is the better one."""
    easy, hard = [-9.0, -8.0, -7.0, -6.0], [-4.0, -3.0, -2.0, -1.0]
    one = samples([easy, hard, [-5.0]], [[0.6, 0.7, 0.8, 0.9], [0.0, 0.1, 0.2, 0.3], [0.5]])
    curve = reliability(one, n_resamples=50)
    assert [b["quality"]["mean"] for b in curve] == pytest.approx([0.3, 0.4, 0.5, 0.6])
    assert [(b["low"], b["high"]) for b in curve] == [(i / 4, (i + 1) / 4) for i in range(4)]
    assert [b["n"] for b in curve] == [2, 2, 2, 2]


def test_reliability_of_equal_log_probabilities_is_one_bin():
    one = samples([[-1.0, -1.0, -1.0]], [[0.0, 0.5, 1.0]])
    (only,) = reliability(one, n_resamples=10)
    assert (only["quality"]["mean"], only["n"]) == (0.5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: samples([[1.0], [2.0]], [[1.0]]), "s has .* 2 prompts in logps and of 1 in qual"),
        (lambda: samples([[1.0, 2.0]], [[1.0]]), r"quality of s to prompt p0 has shape \(1,\)"),
        (lambda: samples([[np.nan]], [[1.0]]), "logps of s to prompt p0 holds 1 values .*finite"),
        (lambda: samples([[1.0]], [[1.0]], teacher=[1.0, 2.0]), "teacher_logps of s has shape"),
        (lambda: evaluate_calibration([]), "no student"),
        (lambda: measure(samples([[]], [[]])), "s has no samples"),
        (
            lambda: evaluate_calibration([random_samples(1), random_samples(1)]),
            "different names",
        ),
        (
            lambda: evaluate_calibration([random_samples(1, 12), random_samples(1, 13, "t")]),
            "t was sampled on other prompts than s",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(UsageError, match=message):
        call()
