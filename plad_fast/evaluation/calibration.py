"""Calibration: how well a student's sequence likelihood tells its good answers from its bad ones.

PLaD (arXiv 2406.02886, section 1) sets out to mend just that. Several samples of a prompt are
each given the student's log-probability and a quality; here the two are compared, without models.

What counts is the order within a prompt, for a student chooses among answers to one question: each
prompt is measured by itself and the results are averaged. Intervals are bootstrapped over prompts,
for samples of one prompt are no independent evidence.

Letters: P prompts, K_p samples of prompt p (they may differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from plad_fast.errors import UsageError
from plad_fast.evaluation.metrics import FloatArray, paired_bootstrap, vector, won
from plad_fast.evaluation.students import couples, require_names

WITHIN = (
    "spearman_within",
    "kendall_within",
    "auroc_within",
    "auroc_teacher",
    "likeliest_gain",
    "mean_quality",
)
_BINS = 8  # of a reliability curve, at most


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
        if {len(self.logps), len(self.quality)} != {count}:
            raise UsageError(
                f"{self.name} has samples of {len(self.logps)} prompts in logps and of "
                f"{len(self.quality)} in quality, but {count} prompt_ids; give a list for each"
            )
        checked: list[tuple[FloatArray, FloatArray]] = []
        for key, logps, quality in zip(self.prompt_ids, self.logps, self.quality, strict=True):
            where = f"of {self.name} to prompt {key}"
            scored = vector(logps, f"logps {where}", len(logps))
            checked.append((scored, vector(quality, f"quality {where}", len(scored))))
        object.__setattr__(self, "logps", [logps for logps, _ in checked])
        object.__setattr__(self, "quality", [quality for _, quality in checked])
        if self.teacher_logps is not None:
            where = f"teacher_logps of {self.name}"
            teacher = vector(self.teacher_logps, where, count, may_lack=True)
            object.__setattr__(self, "teacher_logps", teacher)


def evaluate_calibration(
    students: Sequence[ScoredSamples], *, n_resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Correlation of likelihood with quality, for students given in the order of training.

    Args:
        students: on the same prompts, in the same order.
        n_resamples, seed: of the bootstrap over prompts.

    Returns:
        A dict for `json.dumps`; an interval is `{"mean", "low", "high", "standard_error"}`, and
        None where nothing varies enough to be measured.

        * `students`: one row each: `name`, `n_prompts`, `n_samples`, `n_unfinished`, `n_ranked`
          (prompts behind the correlations: neither log-probability nor quality is the same for all
          samples), intervals `spearman_within`, `kendall_within` (tau-b), `auroc_within` (of two
          samples of a prompt with different quality, how often the better one is likelier; a tie
          counts half), `auroc_teacher` (how often the teacher's answer is likelier than a sample of
          its prompt), `likeliest_gain` (quality of the likeliest sample of a prompt minus the mean
          of its samples: what choosing by likelihood buys), `mean_quality`; and the curve
          `reliability`.
        * `comparisons`: for every two students, last against first before all others: `candidate`,
          `baseline` and the paired intervals of the candidate minus the baseline in each of these
          measures, over the prompts where both have one.

    Raises:
        UsageError: no students, two of one name, no samples, students on other prompts, fewer than
            two resamples.
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

    def intervals(measured: FloatArray) -> dict[str, dict[str, float] | None]:
        found = zip(WITHIN, (values[np.isfinite(values)] for values in measured), strict=True)
        return {
            name: asdict(paired_bootstrap(there, **bootstrap)) if len(there) else None
            for name, there in found
        }

    measured = [measure_within(student) for student in students]
    rows = []
    for student, own in zip(students, measured, strict=True):
        counts = [len(logps) for logps in student.logps]
        rows.append(
            {
                "name": student.name,
                "n_prompts": sum(count > 0 for count in counts),
                "n_samples": sum(counts),
                "n_unfinished": student.n_unfinished,
                "n_ranked": int(np.isfinite(own[WITHIN.index("kendall_within")]).sum()),
                **intervals(own),
                "reliability": reliability(student, **bootstrap),
            }
        )
    comparisons = [
        {
            "candidate": students[j].name,
            "baseline": students[i].name,
            **intervals(measured[j] - measured[i]),
        }
        for j, i in couples(len(students))
    ]
    return {"students": rows, "comparisons": comparisons}


def reliability(
    samples: ScoredSamples, *, n_resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean quality of samples by their place among those of their prompt, from the least likely to
    the likeliest; of a calibrated student it rises.

    Over the prompts with two or more samples. There are at most 8 bins, no more than samples of a
    prompt, and equal log-probabilities share one.

    Returns:
        A dict for each bin that holds samples: `low`, `high` (of the place as a share in [0, 1]),
        `quality` (an interval), `n` (samples).
    """
    chosen = [p for p, logps in enumerate(samples.logps) if len(logps) >= 2]
    if not chosen:
        return []
    logps = [samples.logps[p] for p in chosen]
    quality = np.concatenate([samples.quality[p] for p in chosen])
    prompt = np.repeat(chosen, [len(v) for v in logps])
    edges = np.linspace(0.0, 1.0, min(_BINS, max(map(len, logps))) + 1)
    places = np.concatenate([(rankdata(v) - 0.5) / len(v) for v in logps])
    which = np.searchsorted(edges, places, side="right") - 1
    curve = []
    for b in np.unique(which):
        inside = which == b
        interval = paired_bootstrap(
            quality[inside], groups=prompt[inside].tolist(), n_resamples=n_resamples, seed=seed
        )
        low, high = map(float, edges[b : b + 2])
        found = {"low": low, "high": high, "quality": asdict(interval), "n": int(inside.sum())}
        curve.append(found)
    return curve


def measure_within(samples: ScoredSamples) -> FloatArray:  # (len(WITHIN), P)
    """The measures of every prompt, NaN where it has none."""
    count = len(samples.prompt_ids)
    within = dict(zip(WITHIN, np.full((len(WITHIN), count), np.nan), strict=True))
    for p, (logps, quality) in enumerate(zip(samples.logps, samples.quality, strict=True)):
        if not len(logps):
            continue
        within["mean_quality"][p] = quality.mean()
        if samples.teacher_logps is not None and np.isfinite(samples.teacher_logps[p]):
            within["auroc_teacher"][p] = won(samples.teacher_logps[p] - logps).mean()
        if len(logps) < 2:
            continue
        likeliest = logps == logps.max()
        within["likeliest_gain"][p] = quality[likeliest].mean() - quality.mean()
        # Of every two samples, which is the larger.
        by_logp, by_quality = (np.sign(v[:, None] - v) for v in (logps, quality))
        agreement = (by_logp * by_quality).sum()
        n_logp, n_quality = np.count_nonzero(by_logp), np.count_nonzero(by_quality)
        if n_quality:
            within["auroc_within"][p] = 0.5 * (1 + agreement / n_quality)
        if n_quality and n_logp:
            within["kendall_within"][p] = agreement / np.sqrt(float(n_logp * n_quality))
            ranks = np.corrcoef(rankdata(logps), rankdata(quality))
            within["spearman_within"][p] = ranks[0, 1]
    return np.array([*within.values()])
