"""What `plad-fast quickstart` costs and gains, over seeds and precisions.

    python -m benchmarks.quickstart --seeds 0 1 2 --precisions float32 bfloat16

Each run is a process of its own; a run that has ended is not done again. Results go to
results/quickstart.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Record, environment, format_table, write_csv
from plad_fast.training.trained_folders import log_history
from plad_fast.training.validation import best_check

_DIFFERENCES = ("rougeL_teacher", "ranking_accuracy", "margin", "mean_words", "repetition_4")


def measure(folder: Path, seed: int, precision: str, threads: int) -> Record:
    """The record of a run, which is done first unless it was before."""
    cost = folder / "cost.json"
    if not cost.is_file():
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "plad_fast", "quickstart", "--output-dir", str(folder)]
        before, start = _children(), time.monotonic()
        subprocess.run(
            [*command, "--seed", str(seed), "--precision", precision], check=True, env=environ
        )
        seconds = {"wall_s": time.monotonic() - start, "cpu_s": _children() - before}
        cost.write_text(
            json.dumps({**seconds, **environment(torch.device("cpu"), threads=threads)})
        )
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "precision": precision,
        **_results(metrics),
        "kept_step": (best_check(log_history(folder / "plad")) or {}).get("step", ""),
        **json.loads(cost.read_text()),
    }


def _results(metrics: dict[str, Any]) -> Record:
    sft, plad = metrics["students"]
    change = metrics["comparisons"][0]
    found: Record = {"prompts": metrics["n_prompts"], "pairs": metrics["n_pairs"]}
    for name in _DIFFERENCES:
        for student, row in (("sft", sft), ("plad", plad)):
            value = row[name]
            found[f"{student}_{name}"] = value["mean"] if isinstance(value, dict) else value
        found |= {f"change_{name}_{end}": change[name][end] for end in ("mean", "low", "high")}
    found |= {f"win_rate_{end}": change["win_rate"][end] for end in ("mean", "low", "high")}
    return found | {name: change["wins"][name] for name in ("wins", "ties", "losses", "p_value")}


def _children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(records: Sequence[Record]) -> str:
    """The answers of the PLaD student against those of the SFT student, a run a line."""

    def interval(record: Record, name: str, sign: str = "") -> str:
        mean, low, high = (
            f"{record[f'{name}_{end}']:{sign}.3f}" for end in ("mean", "low", "high")
        )
        return f"{mean} [{low}, {high}]"

    rows = [
        [
            f"{r['precision']} {r['seed']}",
            interval(r, "change_rougeL_teacher", "+"),
            f"{interval(r, 'win_rate')} p = {r['p_value']:.3f}",
            interval(r, "change_ranking_accuracy", "+"),
            interval(r, "change_margin", "+"),
            interval(r, "change_mean_words", "+"),
            interval(r, "change_repetition_4", "+"),
            str(r["kept_step"]),
            f"{r['cpu_s']:.0f}",
            f"{r['wall_s']:.0f}",
        ]
        for r in records
    ]
    header = ["run", "ROUGE-L", "win rate", "ranking", "margin", "words", "repetition"]
    return format_table([*header, "kept step", "CPU s", "wall s"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstarts"))
    parser.add_argument("--csv", type=Path, default=RESULTS / "quickstart.csv")
    args = parser.parse_args(argv)
    records: list[Record] = []
    for precision in args.precisions:
        for seed in args.seeds:
            folder = args.output_dir / f"{precision}-{seed}"
            records.append(measure(folder, seed, precision, args.threads))
            write_csv(args.csv, records)
    print(table(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
