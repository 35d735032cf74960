"""Results of the PLaD study, with intervals over seeds and prompts, and their plot.

S seeds, P prompts, K answers to a prompt. An interval comes from resampling the seeds and the
prompts, the same for an arm and the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import format_table
from benchmarks.plad_study import KINDS
from plad_fast.evaluation.calibration import WITHIN, ScoredSamples, measure_within
from plad_fast.pairs.text_metrics import ROUGE_NAMES
from plad_fast.training.validation import PREFIX, best_check, checks

RESAMPLES = 4000
SHOWN = "rougeL"
Row = dict[str, Any]
Measures = Sequence[Mapping[str, Any]]  # of `Study`, seed by seed


def summarise(
    task: str, arm: str, found: Measures, baseline: Measures, start: Measures
) -> list[Row]:
    """Rows of the CSV, one for each kind of answer: measures with their intervals, and `_more`,
    the difference from the baseline with its own. That of AUROC is from the student before, over
    the prompts of which both have samples of different worth."""
    rows = []
    for kind in KINDS:
        row: Row = {"task": task, "arm": arm, "answers": kind, "seeds": len(found)}
        for name in (*ROUGE_NAMES, "repetition", "words", "cut_off", "likelihood"):
            if name not in found[0][kind]:  # no second model
                row |= dict.fromkeys(f"{name}{e}" for e in ("", "_low", "_high"))
                row |= dict.fromkeys(f"{name}_more{e}" for e in ("", "_low", "_high"))
                continue
            ours, theirs = (
                np.array([m[kind][name] for m in measures]).mean(axis=2)  # (S, P)
                for measures in (found, baseline)
            )
            for label, values in ((name, ours), (f"{name}_more", ours - theirs)):
                row[label] = float(values.mean())
                row[f"{label}_low"], row[f"{label}_high"] = interval(values)
        row |= dict.fromkeys(("auroc", "auroc_more", "auroc_more_low", "auroc_more_high"))
        if KINDS[kind] == 1:
            ours, theirs = (np.stack([_auroc(m) for m in of]) for of in (found, start))
            if np.isfinite(ours).any():
                row["auroc"] = float(np.nanmean(ours))
            if np.isfinite(more := ours - theirs).any():
                row["auroc_more"] = float(np.nanmean(more))
                row["auroc_more_low"], row["auroc_more_high"] = interval(more)
        row["kept"] = ", ".join(kept(m["log"]) for m in found if "log" in m)
        rows.append(row)
    return rows


def kept(log: Sequence[Mapping[str, Any]]) -> str:
    """The checkpoint that validation kept, of the log of a training: "20 of 40" steps, or "0 of 40"
    where none was better than the student before."""
    best = best_check(log)
    assert best is not None
    return f"{best['step']} of {checks(log)[-1]['step']}"


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:  # (S, P)
    """95 % of the means of resampled seeds and prompts; NaN stands for what there is not."""
    generator = np.random.default_rng(seed)
    seeds, prompts = (generator.integers(count, size=(RESAMPLES, count)) for count in values.shape)
    drawn = values[seeds[:, :, None], prompts[:, None, :]]
    there = np.isfinite(drawn)
    with np.errstate(invalid="ignore"):  # none there
        means = drawn.sum(axis=(1, 2), where=there) / there.sum(axis=(1, 2))
    low, high = np.nanquantile(means, [0.025, 0.975])
    return float(low), float(high)


def _auroc(measures: Mapping[str, Any]) -> np.ndarray:
    """(P,) how often the better of two samples of a prompt is the likelier one to the student; NaN
    where all are equally good."""
    logps, quality = (list(map(np.array, measures["at 1"][name])) for name in ("logp", SHOWN))
    samples = ScoredSamples("", measures["ids"], logps, quality)
    return measure_within(samples)[WITHIN.index("auroc_within")]


def table(rows: Sequence[Row]) -> str:
    """A line for each arm of a task: ROUGE-L of every kind with the interval of its difference from
    the baseline, repetition and words of greedy answers, and calibration with the interval of its
    difference from the student before."""
    header = ["task and arm", *(f"R-L {kind}" for kind in KINDS), "rep-4", "words", "AUROC"]
    lines = []
    for start in range(0, len(rows), len(KINDS)):
        of_arm = rows[start : start + len(KINDS)]
        cells = [f"{of_arm[0]['task']} {of_arm[0]['arm']}"]
        for row in of_arm:
            low, high = (100 * row[f"{SHOWN}_more_{end}"] for end in ("low", "high"))
            cells.append(f"{100 * row[SHOWN]:.1f} [{low:+.1f}, {high:+.1f}]")
        cells += [f"{of_arm[0]['repetition']:.3f}", f"{of_arm[0]['words']:.0f}"]
        auroc, low, high = (of_arm[-1][f"auroc{end}"] for end in ("", "_more_low", "_more_high"))
        cells.append("-" if auroc is None else f"{auroc:.3f}")
        cells[-1] += "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        lines.append(cells)
    return format_table(header, lines)


_LOGGED = ("nll", "logps/chosen", "logps/rejected", "margin", "ranking_accuracy", "active_pairs")


def training_rows(task: str, arm: str, seeds: Sequence[int], found: Measures) -> list[Row]:
    """How the trainings of an arm went: a row for each check by validation, with what it found and
    the means of what was logged since the one before. Log-probabilities and margins are as the loss
    sees them, sums or means over tokens."""
    rows = []
    for seed, measures in zip(seeds, found, strict=True):
        log, before = measures.get("log", []), 0
        for number, check in enumerate(checks(log)):
            since = [
                each for each in log if "loss" in each and before < each["step"] <= check["step"]
            ]
            before = check["step"]
            row: Row = {"task": task, "arm": arm, "seed": seed, "check": number, "step": before}
            row |= {name: value for name, value in check.items() if name.startswith(PREFIX)}
            for name in _LOGGED:
                values = [each[name] for each in since if name in each]
                row[name] = float(np.mean(values)) if values else None
            rows.append(row)
    return rows


def training_table(rows: Sequence[Row]) -> str:
    """A line for each arm of a task: means over seeds, check by check from step 0 on, of what
    validation found, and between the checks of the share of pairs that were ranked right."""
    shown = {
        **{"validation/score": ("R-L", 100, 1), "validation/nll": ("NLL", 1, 3)},
        **{"validation/end_logp": ("log P(end)", 1, 2), "validation/words": ("words", 1, 1)},
        **{"validation/repetition": ("rep-4", 1, 3), "ranking_accuracy": ("ranked", 1, 2)},
    }
    lines = []
    for task, arm in dict.fromkeys((row["task"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
        cells = [f"{task} {arm}"]
        for name, (_, factor, digits) in shown.items():
            there = [row for row in own if row[name] is not None]
            means = [
                np.mean([row[name] for row in there if row["check"] == number])
                for number in sorted({row["check"] for row in there})
            ]
            cells.append(", ".join(f"{factor * mean:.{digits}f}" for mean in means) or "-")
        lines.append(cells)
    return format_table(["task and arm", *(label for label, _, _ in shown.values())], lines)


def _label(arm: str, rows: Sequence[Row]) -> str:
    """With the number of seeds, if others have more."""
    seeds = {row["arm"]: int(row["seeds"]) for row in rows}
    return arm if seeds[arm] == max(seeds.values()) else f"{arm}, seeds: {seeds[arm]}"


def draw(rows: Sequence[Row], path: Path, baseline: str) -> None:
    """ROUGE-L beyond that of the baseline, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shown = [row for row in rows if row["arm"] != baseline]
    arms = list(dict.fromkeys(row["arm"] for row in shown))
    size = 1 + 3.5 * len(tasks), 0.5 * len(arms) + 1.3
    figure, axes = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False)
    colours = dict(zip(KINDS, ("#E69F00", "#009E73", "#0072B2"), strict=True))
    for panel, task in zip(axes[0], tasks, strict=True):
        for number, (kind, colour) in enumerate(colours.items()):
            own = [r for r in shown if (r["task"], r["answers"]) == (task, kind)]
            middle, low, high = (
                100 * np.array([r[f"{SHOWN}_more{end}"] for r in own])
                for end in ("", "_low", "_high")
            )
            # Resampling need not put the mean between the ends.
            spread = np.maximum(0, [middle - low, high - middle])
            at = np.array([arms.index(r["arm"]) for r in own]) + 0.2 * (number - 1)
            panel.errorbar(middle, at, xerr=spread, fmt="o", color=colour, label=kind, capsize=2)
        panel.axvline(0, color="#555555", linewidth=1)
        panel.set_title(task, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(arms)), [_label(arm, shown) for arm in arms])
    axes[0][0].invert_yaxis()
    where = {"loc": "lower right", "bbox_to_anchor": (1.05, 0.99), "ncol": len(KINDS)}
    axes[0][-1].legend(frameon=False, fontsize=9, columnspacing=1, handletextpad=0.1, **where)
    figure.supxlabel(f"ROUGE-L more than with {baseline}, in points", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
