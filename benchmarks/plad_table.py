"""Results of the small PLaD experiment, with intervals over seeds and prompts, and their plot.

S seeds, P prompts, K samples to a prompt. An interval comes from resampling the seeds and, in each,
the prompts (the same for an arm and its baseline).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import format_table
from plad_fast.evaluation.calibration import ScoredSamples, evaluate_calibration
from plad_fast.pairs import text_metrics

RESAMPLES = 4000
Values = np.ndarray
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcomes:
    """An arm beside the baseline, seed by seed."""

    name: str
    arm: Sequence[Mapping[str, Any]]  # of `Study.measure`
    baseline: Sequence[Mapping[str, Any]]
    held_out_scorer: str
    training_scorer: str

    def wins(self, scorer: str, kind: str) -> list[Values]:  # S vectors (P,)
        """1 where the arm's answer scores higher, 0.5 for a tie; the mean over samples."""
        won = []
        for arm, baseline in zip(self.arm, self.baseline, strict=True):
            ours, theirs = (np.array(m["scores"][scorer][kind]) for m in (arm, baseline))
            outcome = (ours > theirs) + 0.5 * (ours == theirs)
            won.append(outcome.reshape(len(outcome), -1).mean(axis=1))
        return won

    def scores(self, scorer: str, kind: str) -> list[Values]:
        of_seed = (np.array(m["scores"][scorer][kind], dtype=float) for m in self.arm)
        return [values.reshape(len(values), -1).mean(axis=1) for values in of_seed]

    def repetition(self, kind: str, measures: Sequence[Mapping[str, Any]]) -> list[Values]:
        return [
            _per_prompt(m[kind], lambda t: text_metrics.repetition_shares(t, 4)) for m in measures
        ]

    def spearman(self) -> float | None:
        """Rank correlation of a sample's likelihood and its ROUGE-L, within prompts."""
        values = []
        for number, m in enumerate(self.arm):
            quality = m["scores"][self.training_scorer]["samples"]
            samples = ScoredSamples(str(number), m["ids"], _arrays(m["logps"]), _arrays(quality))
            found = evaluate_calibration([samples], n_resamples=10)["students"][0]
            if found["spearman_within"] is not None:
                values.append(found["spearman_within"]["mean"])
        return float(np.mean(values)) if values else None


def summarise(outcomes: Outcomes) -> Row:
    """A row of the table and of the CSV."""
    row: Row = {"arm": outcomes.name, "seeds": len(outcomes.arm)}
    for label, scorer in (
        ("likelihood", outcomes.held_out_scorer),
        ("rougeL", outcomes.training_scorer),
    ):
        for kind in ("samples", "greedy"):
            won = outcomes.wins(scorer, kind)
            row[f"win_{label}_{kind}"] = float(np.mean([w.mean() for w in won]))
            row[f"win_{label}_{kind}_low"], row[f"win_{label}_{kind}_high"] = interval(won)
            row[f"win_{label}_{kind}_seeds"] = " ".join(f"{w.mean():.3f}" for w in won)
            row[f"{label}_{kind}"] = float(np.mean(outcomes.scores(scorer, kind)))
    for kind in ("samples", "greedy"):
        ours = outcomes.repetition(kind, outcomes.arm)
        theirs = outcomes.repetition(kind, outcomes.baseline)
        more = [a - b for a, b in zip(ours, theirs, strict=True)]
        row[f"repetition_{kind}"] = float(np.mean(ours))
        row[f"repetition_{kind}_more_low"], row[f"repetition_{kind}_more_high"] = interval(more)
    row["words"] = float(
        np.mean([_per_prompt(m["samples"], text_metrics.word_counts).mean() for m in outcomes.arm])
    )
    row["cut"] = float(np.mean([m["cut"] for m in outcomes.arm]))
    row["spearman"] = outcomes.spearman()
    return row


def interval(of_seeds: Sequence[Values], seed: int = 0) -> tuple[float, float]:
    """95 % of the means of resampled seeds and prompts."""
    generator = np.random.default_rng(seed)
    values = np.stack(of_seeds)  # (S, P)
    seeds, prompts = values.shape
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        chosen = generator.integers(seeds, size=seeds)
        columns = generator.integers(prompts, size=prompts)
        means[index] = values[np.ix_(chosen, columns)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        cells = {"arm": row["arm"]}
        for label in ("likelihood", "rougeL"):
            for kind in ("samples", "greedy"):
                key = f"win_{label}_{kind}"
                low, high = row[f"{key}_low"], row[f"{key}_high"]
                cells[f"{label} {kind}"] = f"{row[key]:.1%} [{low:.1%}, {high:.1%}]"
        cells["log p"] = f"{row['likelihood_samples']:.2f}"
        cells["R-L"] = f"{row['rougeL_samples']:.3f}"
        cells["rep-4"] = f"{row['repetition_samples']:.3f} / {row['repetition_greedy']:.3f}"
        cells["words"] = f"{row['words']:.0f}"
        cells["rho"] = "-" if row["spearman"] is None else f"{row['spearman']:.2f}"
        lines.append(cells)
    header = list(lines[0])
    return format_table(header, [[line[name] for name in header] for line in lines])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Win rates against more fine-tuning, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["arm"] != "SFT longer"]
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 0.5 * len(shown) + 1.3), sharey=True)
    titles = {"likelihood": "scored by the teacher's likelihood", "rougeL": "by ROUGE-L"}
    for panel, (label, title) in zip(axes, titles.items(), strict=True):
        for kind, shift, colour in (("samples", -0.14, "#0072B2"), ("greedy", 0.14, "#E69F00")):
            key = f"win_{label}_{kind}"
            middle = np.array([row[key] for row in shown])
            ends = np.array([[row[f"{key}_low"], row[f"{key}_high"]] for row in shown]).T
            spread = np.abs(ends - middle)
            at = np.arange(len(shown)) + shift
            panel.errorbar(middle, at, xerr=spread, fmt="o", color=colour, label=kind, capsize=3)
        panel.axvline(0.5, color="#555555", linewidth=1)
        panel.set_title(title, fontsize=10, loc="left")
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(shown)), [row["arm"] for row in shown])
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("wins against more fine-tuning of equal compute", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _per_prompt(texts: Sequence[Any], measure: Callable[[Sequence[str]], Values]) -> Values:
    """(P,): of one text each, or the mean over its samples."""
    return np.array([np.mean(measure([t] if isinstance(t, str) else t)) for t in texts])


def _arrays(values: Sequence[Sequence[float]]) -> list[Values]:
    return [np.array(row) for row in values]
