"""Time and memory of the PLaD ranking loss, forward and backward, against other libraries.

    python -m benchmarks.loss                    # the default cases, about a quarter of an hour
    python -m benchmarks.loss --quick            # one small case, seconds instead of minutes
    python -m benchmarks.loss --shape 2048 896 151936 --dtype bfloat16 --active 0.25 --impl op trl

Every number comes from a fresh process (benchmarks/measure.py). The processes of a case are
interleaved in rounds, so that a slow minute of a shared machine falls on all of them, and ratios
are taken within rounds. Exit status: 0; 1 when a loss or gradient is wrong or one of our
implementations fails; 2 for bad arguments or a named implementation that is not installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.common import (
    DTYPES,
    MIB,
    RESULTS,
    Record,
    environment,
    format_table,
    quartiles,
    run_worker,
    write_csv,
)
from benchmarks.data import check_shape
from benchmarks.measure import Case, spec_of
from benchmarks.peers import IMPLS

Shape = tuple[int, int, int]

BASELINE = "one-pass"
# The heads of SmolLM2-135M and of Qwen2.5-0.5B.
SHAPES: list[Shape] = [(1024, 576, 49152), (512, 896, 151936)]
QUICK_SHAPE: Shape = (256, 64, 2048)
# Implementations whose work depends on the active share; the others do the same work at any.
SHARE_DEPENDENT = ("one-pass", "op", "1+2a products")
ERRORS = ("loss_error", "d_hidden_error", "d_weight_error")
HEADER = (
    "implementation", "ms", "quartiles", "x one-pass", "products",
    "extra MiB", "over gradients", "error", "compile s",
)  # fmt: skip


@dataclass
class Tally:
    """What the rounds of one case have brought for one implementation."""

    rounds: list[Record] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        return [seconds for record in self.rounds for seconds in record["seconds"]]

    def ratios(self, baseline: Tally) -> list[float]:
        """Median time over the baseline's, of each round that both finished."""
        return [
            statistics.median(mine["seconds"]) / statistics.median(other["seconds"])
            for mine, other in zip(self.rounds, baseline.rounds, strict=False)
        ]


@dataclass(frozen=True)
class Failure:
    name: str
    status: str  # "mismatch", "missing" or "failed", as in the worker's record
    reason: str

    def exit_status(self, *, asked_for: bool) -> int:
        """1 for what must not happen, 2 for a named implementation that cannot run here, else 0."""
        if self.status == "mismatch" or self.name not in IMPLS or IMPLS[self.name].ours:
            return 1
        return 2 if asked_for else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("N", "D", "V"))
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES, "float16"])
    parser.add_argument("--active", nargs="+", type=float, metavar="SHARE")
    parser.add_argument("--response", type=int, help="tokens of a response (default 64)")
    parser.add_argument("--ragged", action="store_true", help="responses of unequal lengths")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, metavar="NAME", help=", ".join(IMPLS))
    parser.add_argument("--rounds", type=int, help="processes of each kind (default 2)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs in a process, at most")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="after 2 runs, none starts later"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/loss_<device>.csv")
    parser.add_argument(
        "--quick", action="store_true", help="one small case, one round, nothing that compiles"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here, or torch is built without CUDA")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = (args.shape, args.dtype, args.active, args.response, args.ragged, args.impl)
    args.standard = not (args.quick or any(chosen))
    args.response = args.response or (8 if args.quick else 64)
    args.rounds = args.rounds or (1 if args.quick else 2)
    try:
        args.plan = plan(args)
    except ValueError as error:
        parser.error(str(error))
    missing = [f"{name}: {why}" for name in args.impl or () if (why := IMPLS[name].missing())]
    if missing:
        parser.error("; ".join(missing))
    return args


def plan(args: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """Cases with the implementations to run on each.

    By default both shapes in both dtypes with half of the pairs active, and the first shape also
    with none and all of them, where only implementations that care for the share are run again.
    """
    names = args.impl or [n for n, impl in IMPLS.items() if not (args.quick and impl.compiled)]
    shapes: list[Shape] = args.shape or ([QUICK_SHAPE] if args.quick else SHAPES)
    dtypes = args.dtype or (["float32"] if args.quick else list(DTYPES))
    cases = [
        Case(n, d, v, dtype, share, args.response, args.ragged, args.device)
        for n, d, v in shapes
        for dtype in dtypes
        for share in args.active or [0.5]
    ]
    for case in cases:
        check_shape(case.tokens, case.response, case.active)
    jobs = [(case, names) for case in cases]
    if args.standard:
        extra = [
            (Case(*SHAPES[0], "float32", share, device=args.device), list(SHARE_DEPENDENT))
            for share in (0.0, 1.0)
        ]
        jobs[1:1] = extra
    return jobs


def run_case(
    case: Case, names: Sequence[str], args: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Tally], list[Failure]]:
    """Runs all rounds of a case; an implementation that fails once is not run again."""
    oracle = scratch / "oracle.pt"
    answer = run_worker("benchmarks.measure", spec_of(case, None, oracle), threads=args.threads)
    if answer["status"] != "ok":
        return {}, [Failure("oracle", answer["status"], answer["reason"])]
    tallies = {name: Tally() for name in names}
    failures: dict[str, Failure] = {}
    for turn in range(args.rounds):
        # Every round starts with another one: the first after a pause may meet a cooler processor.
        start = turn % len(names)
        for name in [*names[start:], *names[:start]]:
            if name in failures:
                continue
            spec = spec_of(case, name, oracle, repeats=args.repeats, seconds=args.seconds)
            began = time.perf_counter()
            record = run_worker("benchmarks.measure", spec, threads=args.threads)
            took = time.perf_counter() - began
            if record["status"] == "ok":
                tallies[name].rounds.append(record)
                outcome = f"{statistics.median(record['seconds']) * 1e3:.1f} ms"
            else:
                failures[name] = Failure(name, record["status"], record["reason"])
                outcome = f"{record['status']}: {record['reason']}"
            say(f"  round {turn + 1}/{args.rounds}  {name:18} {outcome}  ({took:.0f} s)")
    done = {name: tally for name, tally in tallies.items() if name not in failures}
    return done, list(failures.values())


def summarise(case: Case, name: str, tallies: dict[str, Tally]) -> Record:
    """One row of the CSV, all measured values over all rounds."""
    tally = tallies[name]
    first_quartile, median, third_quartile = quartiles(tally.times)
    ratios = tally.ratios(tallies[BASELINE]) if BASELINE in tallies else []
    first = tally.rounds[0]
    row: Record = asdict(case) | {
        "impl": name,
        "median_ms": median * 1e3,
        "q1_ms": first_quartile * 1e3,
        "q3_ms": third_quartile * 1e3,
        "min_ms": min(tally.times) * 1e3,
        "runs": len(tally.times),
        "rounds": len(tally.rounds),
        "ratio": statistics.median(ratios) if ratios else "",
        "ratio_min": min(ratios, default=""),
        "ratio_max": max(ratios, default=""),
        "products": first["products"],
        "compile_s": max(record["compile_s"] for record in tally.rounds),
        "gradients_mib": case.gradient_bytes / MIB,
        "extra_mib": "",
        "over_gradients_mib": "",
        "loss": first.get("loss", ""),
    }
    if "extra_bytes" in first:
        row["extra_mib"] = statistics.median(r["extra_bytes"] for r in tally.rounds) / MIB
        row["over_gradients_mib"] = row["extra_mib"] - row["gradients_mib"]
    for error in ERRORS:
        row[error] = max((r[error] for r in tally.rounds if error in r), default="")
    row["worst_error"] = max((row[error] for error in ERRORS if row[error] != ""), default="")
    return row


def table(rows: Sequence[Record]) -> str:
    """The rows of one case as people read them."""

    def number(value: float | str, form: str) -> str:
        return "" if value == "" else format(value, form)

    return format_table(
        HEADER,
        [
            (
                row["impl"],
                f"{row['median_ms']:.1f}",
                f"{row['q1_ms']:.1f}-{row['q3_ms']:.1f}",
                number(row["ratio"], ".2f"),
                number(row["products"], ".2f"),
                number(row["extra_mib"], ".1f"),
                number(row["over_gradients_mib"], "+.1f"),
                number(row["worst_error"], ".0e"),
                number(row["compile_s"] or "", ".1f"),
            )
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    missing = {name: why for name, impl in IMPLS.items() if (why := impl.missing())}
    for name, why in missing.items():
        say(f"without {name}: {why}")
    path = args.csv or (RESULTS / f"loss_{args.device}.csv" if args.standard else None)
    rows: list[Record] = []
    status = 0
    facts = environment(torch.device(args.device), threads=args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        for case, names in args.plan:
            say(str(case))
            present = [name for name in names if name not in missing]
            tallies, failures = run_case(case, present, args, Path(scratch))
            new = [summarise(case, name, tallies) for name in tallies]
            rows += [row | facts for row in new]
            print(f"\n{case}; gradients {case.gradient_bytes / MIB:.1f} MiB", flush=True)
            if new:
                print(table(new), flush=True)
            for failure in failures:
                print(f"{failure.name} {failure.status}: {failure.reason}", flush=True)
                status = max(status, failure.exit_status(asked_for=bool(args.impl)))
            if path and rows:
                write_csv(path, rows)
    if path and rows:
        print(f"\nwrote {path}")
    return status


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
