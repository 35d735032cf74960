"""Training steps of SmolLM2-135M-Instruct on preference pairs: PLaDTrainer, TRL, plain torch.

    python -m benchmarks.step --dialogsum dialogsum_dev.jsonl   # the standard plan, an hour
    python -m benchmarks.step --quick                           # a tiny random model, a minute
    python -m benchmarks.step --case fixed --steps 20 --impl plad_fast trl --checkpointing on

Every run is a fresh process (benchmarks/step_measure.py). The processes of a case are interleaved
in rounds, and ratios are taken within rounds. Exit status: 0; 1 when a first step's loss or
gradients differ from naive or one of our implementations fails; 2 for bad arguments or a named
implementation that is not installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from benchmarks.common import (
    DTYPES,
    RESULTS,
    Record,
    environment,
    run_worker,
    write_csv,
)
from benchmarks.loss import say
from benchmarks.step_data import DIALOGSUM_PAIRS, KINDS, PAIRS_PER_STEP, StepCase
from benchmarks.step_impls import IMPLS, MAX_TOKENS
from benchmarks.step_measure import run_spec, truth_spec
from benchmarks.step_table import Tallies, summarise, table

ALL = tuple(IMPLS)
FEW = ("plad_fast", "plad_fast one pair", "trl")


@dataclass(frozen=True)
class Job:
    case: StepCase
    impls: Sequence[str]
    steps: int
    rounds: int


# kind, dtype, share of active pairs, checkpointing, implementations, rounds
STANDARD = (
    ("fixed", "float32", 1.0, False, ALL, 2),
    ("fixed", "float32", 0.5, False, FEW, 1),
    ("fixed", "float32", 1.0, True, FEW, 1),
    ("fixed", "bfloat16", 1.0, False, FEW, 1),
    ("dialogsum", "float32", 1.0, False, FEW, 1),
    ("short-prompt", "float32", 1.0, False, FEW, 1),
    ("dialogsum", "float32", 0.5, False, FEW, 1),
    ("dialogsum", "float32", 1.0, True, FEW, 1),
    ("short-prompt", "bfloat16", 1.0, False, FEW, 1),
    ("dialogsum", "bfloat16", 1.0, False, FEW, 1),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", nargs="+", choices=KINDS)
    parser.add_argument("--dialogsum", type=Path, metavar="JSONL", help="`dialogue` and `summary`")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--active", nargs="+", type=float, metavar="SHARE")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"))
    parser.add_argument("--impl", nargs="+", choices=IMPLS, metavar="NAME", help=", ".join(IMPLS))
    parser.add_argument(
        "--steps", type=int, help="timed ones of a run (default 3; dialogsum: once over the pairs)"
    )
    parser.add_argument("--rounds", type=int, help="processes of each kind (default 2)")
    parser.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, help="of a forward of plad_fast"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/step_<device>.csv")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model on short made-up pairs"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here, or torch is built without CUDA")
    for name in ("steps", "rounds", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for share in args.active or ():
        if not 0 < share <= 1 or (share * PAIRS_PER_STEP) % 1:
            parser.error(f"--active {share} is not a whole number of {PAIRS_PER_STEP} pairs")
    if args.dialogsum is not None and not args.dialogsum.is_file():
        parser.error(f"--dialogsum: there is no file {str(args.dialogsum)!r}")
    if args.dialogsum is None and "dialogsum" in (args.case or ()):
        parser.error("the dialogsum case needs --dialogsum, the path of a DialogSum JSONL")
    chosen = (args.case, args.dtype, args.active, args.checkpointing, args.impl, args.steps)
    standard = not (args.quick or any(chosen))
    args.whole = standard
    args.plan = list(standard_plan(args) if standard else asked_plan(args))
    missing = [f"{name}: {why}" for name in args.impl or () if (why := IMPLS[name].missing())]
    if missing:
        parser.error("; ".join(missing))
    if not hasattr(TrainingArguments, "train_sampling_strategy"):
        parser.error("needs transformers 5.2, whose trainers can take their rows in order")
    return args


def standard_plan(args: argparse.Namespace) -> Iterator[Job]:
    for kind, dtype, active, checkpointing, impls, rounds in STANDARD:
        if kind != "dialogsum" or args.dialogsum is not None:
            case = StepCase(kind, dtype, active, checkpointing, args.device)
            yield Job(case, impls, default_steps(kind), args.rounds or rounds)


def asked_plan(args: argparse.Namespace) -> Iterator[Job]:
    kinds = args.case or (["fixed"] if args.quick else KINDS)
    for kind in kinds:
        if kind == "dialogsum" and args.dialogsum is None:
            continue
        for dtype in args.dtype or ["float32"]:
            for active in args.active or [0.5 if args.quick else 1.0]:
                for checkpointing in args.checkpointing or ["off"]:
                    case = StepCase(
                        kind, dtype, active, checkpointing == "on", args.device, args.quick
                    )
                    steps = args.steps or default_steps(kind)
                    rounds = args.rounds or (1 if args.quick else 2)
                    yield Job(case, args.impl or ALL, steps, rounds)


def default_steps(kind: str) -> int:
    return DIALOGSUM_PAIRS // PAIRS_PER_STEP if kind == "dialogsum" else 3


def run_job(
    job: Job, names: Sequence[str], args: argparse.Namespace, scratch: Path
) -> tuple[Tallies, dict[str, Record]]:
    """Records of all rounds, and the record of what failed; that is not run again."""
    pairs, truth = scratch / f"{job.case.kind}.json", scratch / "truth.pt"
    spec = truth_spec(job.case, pairs, truth, args.dialogsum)
    answer = run_worker("benchmarks.step_measure", spec, threads=args.threads)
    if answer["status"] != "ok":
        return {}, {"oracle": answer}
    tallies: Tallies = {name: [] for name in names}
    failures: dict[str, Record] = {}
    for turn in range(job.rounds):
        # Every round starts with another one: the first after a pause may meet a cooler processor.
        start = turn % len(names)
        for name in [*names[start:], *names[:start]]:
            if name in failures:
                continue
            progress = scratch / "progress"
            spec = run_spec(
                job.case, name, pairs, truth,
                steps=job.steps, progress=progress, max_tokens=args.max_tokens,
            )  # fmt: skip
            began = time.perf_counter()
            label = f"  round {turn + 1}/{job.rounds}  {name:16}"
            with counting_steps(progress, label):
                record = run_worker("benchmarks.step_measure", spec, threads=args.threads)
            if record["status"] == "ok":
                tallies[name].append(record)
                outcome = f"{statistics.median(record['seconds']):.2f} s a step"
            else:
                failures[name] = record
                outcome = f"{record['status']}: {record['reason']}"
            say(f"{label}  {outcome}  ({time.perf_counter() - began:.0f} s)")
    return {name: t for name, t in tallies.items() if name not in failures}, failures


@contextmanager
def counting_steps(progress: Path, label: str, *, every: float = 30.0) -> Iterator[None]:
    """Says now and then how many steps a worker has done."""
    progress.unlink(missing_ok=True)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every):
            steps = progress.read_text() if progress.exists() else "0"
            say(f"{label}  ... {steps} steps")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def exit_status(name: str, record: Record, *, asked_for: bool) -> int:
    """1 for what must not happen, 2 for a named implementation that cannot run here, else 0."""
    if record["status"] == "mismatch" or name not in IMPLS or IMPLS[name].ours:
        return 1
    return 2 if asked_for else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.dialogsum is None and not args.quick and not args.case:
        say("without the dialogsum case: it needs --dialogsum, the path of a DialogSum JSONL")
    missing = {name: why for name, impl in IMPLS.items() if (why := impl.missing())}
    for name, why in missing.items():
        say(f"without {name}: {why}")
    path = args.csv or (RESULTS / f"step_{args.device}.csv" if args.whole else None)
    rows: list[Record] = []
    status = 0
    facts = environment(torch.device(args.device), threads=args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        for number, job in enumerate(args.plan, start=1):
            say(f"case {number}/{len(args.plan)}: {job.case}")
            present = [name for name in job.impls if name not in missing]
            tallies, failures = run_job(job, present, args, Path(scratch))
            new = [summarise(job.case, name, tallies, args.max_tokens) for name in tallies]
            rows += [row | facts for row in new]
            print(f"\n{job.case}", flush=True)
            if new:
                print(table(new), flush=True)
            for name, record in failures.items():
                print(f"{name} {record['status']}: {record['reason']}", flush=True)
                status = max(status, exit_status(name, record, asked_for=bool(args.impl)))
            if path and rows:
                write_csv(path, rows)
    if path and rows:
        print(f"\nwrote {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
