"""Calibration: how well a student's sequence likelihood tells its good answers from its bad ones.

PLaD (arXiv 2406.02886, section 1) sets out to mend just that. Several samples of a prompt are
each given the student's log-probability and a quality; here the two are compared, without models.

Letters: P prompts, K_p samples of prompt p (they may differ), N samples in all, R resamples.

*Within* a prompt is what counts, for a student chooses among answers to one question; each prompt
is measured by itself and the results are averaged. *Pooled* over all samples, easy prompts also
have to come out likelier than hard ones. Intervals are bootstrapped over prompts, for samples of
one prompt are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from plad_fast.errors import UsageError
from plad_fast.evaluation.metrics import (
    FloatArray,
    outcomes,
    paired_bootstrap,
    percentile_interval,
    require_resamples,
)
from plad_fast.evaluation.pooled_ranks import PooledRanks, concordance, resampled_prompts
from plad_fast.evaluation.students import couples, require_names

WITHIN = (
    "spearman_within",
    "kendall_within",
    "auroc_within",
    "auroc_teacher",
    "likeliest_gain",
    "mean_quality",
)
POOLED = ("spearman_pooled", "kendall_pooled", "auroc_pooled")
_CURVES = ("rank", "quantile")


@dataclass(frozen=True, eq=False)
class ScoredSamples:
    """One student's samples; arrays become float64.

    Raises:
        UsageError: lists of different lengths, or a value that is not finite.
    """

    name: str
    prompt_ids: Sequence[str]
    """(P,)"""
    logps: Sequence[FloatArray]
    """P vectors (K_p,): log-probability of each sample, in nats, normalised by length. A prompt may
    have one sample or none."""
    quality: Sequence[FloatArray]
    """P vectors (K_p,), larger is better."""
    teacher_logps: FloatArray | None = None
    """(P,) the student's log-probability of the teacher's answer; NaN where there is none."""
    n_unfinished: int = 0
    """Samples that were left out, since they are empty or were cut off."""

    def __post_init__(self) -> None:
        count = len(self.prompt_ids)
        for field in ("logps", "quality"):
            vectors = [np.asarray(v, dtype=np.float64).reshape(-1) for v in getattr(self, field)]
            if len(vectors) != count:
                raise UsageError(
                    f"{field} of {self.name} has {len(vectors)} entries for {count} prompt_ids; "
                    "give one list of samples for each prompt"
                )
            object.__setattr__(self, field, vectors)
        for key, logps, quality in zip(self.prompt_ids, self.logps, self.quality, strict=True):
            if len(logps) != len(quality):
                raise UsageError(
                    f"prompt {key} of {self.name} has {len(logps)} log-probabilities and "
                    f"{len(quality)} qualities; give one of each for every sample"
                )
            if not (np.isfinite(logps).all() and np.isfinite(quality).all()):
                raise UsageError(
                    f"a sample of {self.name} to prompt {key} has a log-probability or quality "
                    "that is not finite; leave it out"
                )
        if self.teacher_logps is not None:
            teacher = np.asarray(self.teacher_logps, dtype=np.float64)
            if teacher.shape != (count,):
                raise UsageError(
                    f"teacher_logps of {self.name} has shape {teacher.shape}, but there are "
                    f"{count} prompt_ids; give one for each, NaN where there is none"
                )
            object.__setattr__(self, "teacher_logps", teacher)


def evaluate_calibration(
    students: Sequence[ScoredSamples], *, bins: int = 8, n_resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Correlation of likelihood with quality, for students given in the order of training.

    Args:
        students: on the same prompts, in the same order.
        bins: of the reliability curves, at most.
        n_resamples, seed: of the bootstrap over prompts.

    Returns:
        A dict for `json.dumps`; an interval is `{"mean", "low", "high", "standard_error"}`, and
        None where nothing varies enough to be measured.

        * `students`: one row each: `name`, `n_prompts`, `n_samples`, `n_unfinished`, `n_ranked`
          (prompts behind the correlations within: neither log-probability nor quality is the same
          for all samples),
          intervals `spearman_within`, `kendall_within` (tau-b),
          `auroc_within` (of two samples of a prompt with different quality, how often the better
          one is likelier; a tie counts half), `spearman_pooled`, `kendall_pooled`, `auroc_pooled`
          (the same over all samples), `auroc_teacher` (how often the teacher's answer is likelier
          than a sample of its prompt), `likeliest_gain` (quality of the likeliest sample of a
          prompt minus the mean of its samples: what choosing by likelihood buys),
          `mean_quality`; and `reliability` with the curves "rank" and "quantile" of `reliability`.
        * `comparisons`: for every two students, last against first before all others: `candidate`,
          `baseline` and the paired intervals of the candidate minus the baseline in each of these
          measures; those within prompts over the prompts where both have one.

    Raises:
        UsageError: no students, two of one name, no samples, students on other prompts, fewer than
            two bins or resamples.
    """
    require_names([student.name for student in students])
    for student in students:
        if not any(map(len, student.logps)):
            raise UsageError(f"{student.name} has no samples; draw some for each prompt")
        if list(student.prompt_ids) != list(students[0].prompt_ids):
            raise UsageError(
                f"{student.name} was sampled on other prompts than {students[0].name}; sample "
                "every student on the same prompts, in the same order"
            )
    bootstrap: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    require_resamples(n_resamples)
    measured = [_measured(student, **bootstrap) for student in students]
    rows = []
    for student, own in zip(students, measured, strict=True):
        counts = [len(logps) for logps in student.logps]
        curves = {by: reliability(student, by=by, bins=bins, **bootstrap) for by in _CURVES}
        rows.append(
            {
                "name": student.name,
                "n_prompts": sum(count > 0 for count in counts),
                "n_samples": sum(counts),
                "n_unfinished": student.n_unfinished,
                "n_ranked": int(np.isfinite(own.within[WITHIN.index("kendall_within")]).sum()),
                **own.intervals(**bootstrap),
                "reliability": curves,
            }
        )
    comparisons = []
    for j, i in couples(len(students)):
        change = _Measured(*(a - b for a, b in zip(measured[j], measured[i], strict=True)))
        names = {"candidate": students[j].name, "baseline": students[i].name}
        comparisons.append({**names, **change.intervals(**bootstrap)})
    return {"students": rows, "comparisons": comparisons}


def reliability(
    samples: ScoredSamples, *, by: str, bins: int = 8, n_resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean quality of samples of like log-probability, from the least likely to the likeliest; of a
    calibrated student it rises.

    By "rank" it is the place of a sample among those of its prompt, which leaves out how hard the
    prompt is, over the prompts with two or more; by "quantile" its log-probability among all
    samples. There are at most `bins`, no more than samples of a prompt ("rank"), and equal
    log-probabilities share one.

    Returns:
        A dict for each bin that holds samples: `low`, `high` (of the place as a share in [0, 1], or
        of the log-probability), `logp` (their mean), `quality` (an interval), `n` (samples).
    """
    if bins < 2:
        raise UsageError(f"bins is {bins}; take 2 or more")
    fewest = 2 if by == "rank" else 1
    chosen = [p for p, logps in enumerate(samples.logps) if len(logps) >= fewest]
    if not chosen:
        return []
    logps = [samples.logps[p] for p in chosen]
    flat = np.concatenate(logps)
    quality = np.concatenate([samples.quality[p] for p in chosen])
    prompt = np.repeat(np.arange(len(chosen)), [len(v) for v in logps])
    if by == "rank":
        edges = np.linspace(0.0, 1.0, min(bins, max(map(len, logps))) + 1)
        places = np.concatenate([(rankdata(v) - 0.5) / len(v) for v in logps])
    else:
        edges = np.unique(np.quantile(flat, np.linspace(0.0, 1.0, bins + 1)))
        places = flat
    which = np.clip(np.searchsorted(edges, places, side="right") - 1, 0, max(len(edges) - 2, 0))
    shape = (len(chosen), max(len(edges) - 1, 1))
    counts, sums = np.zeros(shape), np.zeros(shape)
    np.add.at(counts, (prompt, which), 1.0)
    np.add.at(sums, (prompt, which), quality)
    weights = resampled_prompts(len(chosen), n_resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ sums) / (weights @ counts)  # (R, bins)
    return [
        {
            "low": float(edges[b]),
            "high": float(edges[min(b + 1, len(edges) - 1)]),
            "logp": float(flat[which == b].mean()),
            "quality": _interval(float(quality[which == b].mean()), means[:, b]),
            "n": int((which == b).sum()),
        }
        for b in range(shape[1])
        if (which == b).any()
    ]


class _Measured(NamedTuple):
    """The measures of one student, or their differences between two."""

    within: FloatArray
    """(len(WITHIN), P), NaN where a prompt has none."""
    pooled: FloatArray
    """(len(POOLED),)"""
    resampled: FloatArray
    """(len(POOLED), R)"""

    def intervals(self, *, n_resamples: int, seed: int) -> dict[str, dict[str, float] | None]:
        found: dict[str, dict[str, float] | None] = {}
        for name, values in zip(WITHIN, self.within, strict=True):
            there = values[np.isfinite(values)]
            found[name] = None
            if len(there):
                interval = paired_bootstrap(there, n_resamples=n_resamples, seed=seed)
                found[name] = asdict(interval)
        for name, estimate, values in zip(POOLED, self.pooled, self.resampled, strict=True):
            found[name] = _interval(float(estimate), values)
        return found


def _measured(samples: ScoredSamples, n_resamples: int, seed: int) -> _Measured:
    count = len(samples.prompt_ids)
    within = dict(zip(WITHIN, np.full((len(WITHIN), count), np.nan), strict=True))
    for p, (logps, quality) in enumerate(zip(samples.logps, samples.quality, strict=True)):
        if not len(logps):
            continue
        within["mean_quality"][p] = quality.mean()
        if samples.teacher_logps is not None and np.isfinite(samples.teacher_logps[p]):
            teacher = np.full(len(logps), samples.teacher_logps[p])
            within["auroc_teacher"][p] = outcomes(teacher, logps).mean()
        if len(logps) < 2:
            continue
        likeliest = logps == logps.max()
        within["likeliest_gain"][p] = quality[likeliest].mean() - quality.mean()
        agreement, by_logp, by_quality = (float(m.sum()) for m in concordance(logps, quality))
        if by_quality:
            within["auroc_within"][p] = 0.5 * (1 + agreement / by_quality)
        if by_quality and by_logp:
            within["kendall_within"][p] = agreement / np.sqrt(by_logp * by_quality)
            ranks = np.corrcoef(rankdata(logps), rankdata(quality))
            within["spearman_within"][p] = ranks[0, 1]
    ranks = PooledRanks(samples.logps, samples.quality)
    # The same prompts are drawn for every student, which makes differences paired.
    weights = resampled_prompts(count, n_resamples, seed)
    pooled, resampled = (
        np.array([getattr(ranks, name)(drawn) for name in POOLED])
        for drawn in (np.ones((1, count)), weights)
    )
    return _Measured(np.array([*within.values()]), pooled[:, 0], resampled)


def _interval(estimate: float, resampled: NDArray[np.float64]) -> dict[str, float] | None:
    """A resample in which nothing varied has no value, and is left out."""
    there = resampled[np.isfinite(resampled)]
    if not np.isfinite(estimate) or len(there) < 2:
        return None
    return asdict(percentile_interval(estimate, there))
