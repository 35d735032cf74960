"""Rows and table of the step benchmark, from what its processes measured.

python -m benchmarks.step_table    # results/step_cpu.csv as the table of the README
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.common import MIB, RESULTS, Record, format_table, quartiles
from benchmarks.step_data import KINDS, PAIRS_PER_STEP, StepCase

BASELINES = ("trl", "trl batched")
HEADER = (
    "implementation", "s/step", "quartiles", "pairs/s", "x trl", "tokens/s",
    "peak MiB", "of trl", "growth MiB", "loss error", "gradient error", "skipped",
)  # fmt: skip

Tallies = dict[str, list[Record]]  # implementation -> its record of each round


def rate(record: Record, of: str = "pairs") -> float:
    """Pairs or distinct tokens a second over all timed steps of a run."""
    return record[of] / sum(record["seconds"])


def summarise(case: StepCase, name: str, tallies: Tallies, max_tokens: int) -> Record:
    """One row of the CSV; medians over rounds, times also over steps.

    Ratios are to TRL's faster setting of those that ran.
    """
    settings = [setting for setting in BASELINES if setting in tallies]
    faster = max(settings, key=lambda s: statistics.median(map(rate, tallies[s])), default="")
    rounds, baseline = tallies[name], tallies.get(faster, [])
    first_quartile, median, third_quartile = quartiles([s for r in rounds for s in r["seconds"]])
    ratios = [rate(mine) / rate(other) for mine, other in zip(rounds, baseline, strict=False)]

    def middle(key: str) -> float:
        return statistics.median(record[key] for record in rounds)

    def at_most(key: str) -> float:
        return max(record[key] for record in rounds)

    worst = max(rounds, key=lambda record: record["worst_error"])
    last = rounds[-1]
    peak = middle("process_bytes")
    trl_peak = statistics.median(r["process_bytes"] for r in baseline) if baseline else None
    return asdict(case) | {
        "impl": name,
        "steps": len(last["seconds"]),
        "rounds": len(rounds),
        "pairs_per_step": PAIRS_PER_STEP,
        "max_tokens": max_tokens if name == "plad_fast" else "",
        "median_s": median,
        "q1_s": first_quartile,
        "q3_s": third_quartile,
        "pairs_per_s": statistics.median(map(rate, rounds)),
        "tokens_per_s": statistics.median(rate(r, "distinct_tokens") for r in rounds),
        "baseline": faster,
        "ratio": statistics.median(ratios) if ratios else "",
        "ratio_min": min(ratios, default=""),
        "ratio_max": max(ratios, default=""),
        "process_mib": peak / MIB,
        "growth_mib": middle("growth_bytes") / MIB,
        "memory_ratio": "" if trl_peak is None else peak / trl_peak,
        "loss": last["loss"],
        "loss_error": at_most("loss_error"),
        "gradient_error": at_most("gradient_error"),
        "worst_error": worst["worst_error"],
        "worst_parameter": worst["worst_parameter"],
        **{key: _or_blank(last[key]) for key in ("active_pairs", "skipped_backwards")},
        "saved_tokens": _or_blank(last["saved_tokens"]),
    }


def _or_blank(value: float | None) -> float | str:
    return "" if value is None else value


def table(rows: Sequence[Record]) -> str:
    """The rows of one case as people read them."""

    def number(value: float | str, form: str) -> str:
        return "" if value == "" else format(value, form)

    return format_table(
        HEADER,
        [
            (
                row["impl"],
                f"{row['median_s']:.3g}",
                f"{row['q1_s']:.3g}-{row['q3_s']:.3g}",
                f"{row['pairs_per_s']:.3g}",
                number(row["ratio"], ".2f"),
                f"{row['tokens_per_s']:.0f}",
                f"{row['process_mib']:.0f}",
                number(row["memory_ratio"], ".2f"),
                f"{row['growth_mib']:.0f}",
                f"{row['loss_error']:.0e}",
                f"{row['gradient_error']:.0e}",
                number(row["skipped_backwards"], ".0%"),
            )
            for row in rows
        ],
    )


def markdown(rows: Sequence[Record]) -> str:
    """The rows of a CSV as the table of the README: every case beside TRL's faster setting."""
    lines = [
        "| case | TRL | plad_fast | | plad_fast, one pair at a time | |",
        "|---|---|---|---|---|---|",
    ]
    cases: dict[tuple[str, ...], dict[str, Record]] = {}
    for row in rows:
        key = (row["kind"], row["dtype"], row["active"], row["checkpointing"])
        cases.setdefault(key, {})[row["impl"]] = row
    for key in sorted(cases, key=lambda case: KINDS.index(case[0])):
        (kind, dtype, active, checkpointing), found = key, cases[key]
        name = f"{kind}, {dtype}"
        name += "" if float(active) == 1 else f", {float(active):.0%} active"
        name += ", checkpointing" if checkpointing == "True" else ""
        base = next(row for row in found.values() if row["impl"] == row["baseline"])
        cells = [f"{_seconds(base)}, {_memory(base)}"]
        for ours in ("plad_fast", "plad_fast one pair"):
            row = found[ours]
            cells += [f"{_seconds(row)}, {_memory(row)}", f"**{float(row['ratio']):.1f}x**"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(row: Record) -> str:
    return f"{float(row['median_s']):.1f} s"


def _memory(row: Record) -> str:
    return f"{float(row['process_mib']) / 1024:.1f} GiB"


if __name__ == "__main__":
    with (RESULTS / "step_cpu.csv").open(newline="") as file:
        print(markdown(list(csv.DictReader(file))))
