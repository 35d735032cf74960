"""Correctness and speed on a GPU, in as many minutes as there are.

    python -m benchmarks.gpu --minutes 8               # runs/gpu/summary.md and CSV files
    python -m benchmarks.gpu --minutes 3 --section sweep step
    python -m benchmarks.gpu --device cpu --tiny       # a dry run under Triton's interpreter

Every section, and every implementation in one, is a process of its own with a limit of its own: one
that fails or hangs costs nothing but itself; with --tiny one process has all losses. Results are
written as they come, to results.jsonl and after every process to the CSV files and summary.md. What
one wants to know first runs first. Exit status: 0; 1 when something of plad_fast failed or a
process was stopped; 2 where nothing can run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTIONS = ("environment", "correctness", "loss", "tests", "sweep", "parts", "step")
LEAST_SECONDS = 10.0  # left, for a process to be started


@dataclass(frozen=True)
class Job:
    section: str
    limit: float  # seconds
    impl: str = ""

    @property
    def name(self) -> str:
        return f"{self.section} {self.impl}".strip()

    @property
    def module(self) -> str:
        return "gpu_tests" if self.section == "tests" else self.section


@dataclass
class Running:
    job: Job
    process: subprocess.Popen[bytes]
    limit: float
    log: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def status(self) -> str | None:
        """None while it runs."""
        code = self.process.poll()
        if code is None:
            if self.seconds < self.limit:
                return None
            self.kill()
            return f"stopped after {self.limit:.0f} s"
        lines = self.log.read_text(errors="replace").strip().splitlines() or [""]
        return "ok" if code == 0 else f"exit status {code}: {lines[-1][:200]}"

    def kill(self) -> None:
        """With its compilers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all (default 8)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="default: runs/gpu")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("plad_fast.kernels") is None:
        parser.error("plad_fast is not installed with its kernels: pip install -e .")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here, or torch is built without CUDA")
    elif not args.tiny:
        parser.error("--device cpu takes hours without --tiny")
    return args


def plan(wanted: Sequence[str], tiny: bool) -> tuple[list[Job], list[dict[str, Any]]]:
    """Processes in order, and rows that name what is not installed."""
    from benchmarks import step_impls
    from benchmarks.gpu.loss import all_implementations

    losses = all_implementations()
    limits = {"one-pass": 75.0, "op": 75.0, "liger": 75.0, "naive compiled": 75.0}
    of_losses = [Job("loss", limits.get(name, 45.0), name) for name in losses]
    jobs = [
        Job("environment", 40.0),
        Job("correctness", 80.0),
        *of_losses[:4],
        Job("tests", 80.0),
        Job("sweep", 90.0),
        Job("step", 75.0, "plad_fast"),
        Job("step", 75.0, "trl batched"),
        Job("parts", 45.0),
        *of_losses[4:],
    ]
    implementations = {"loss": losses, "step": step_impls.IMPLS}
    present, missing = [], []
    for job in jobs:
        why = implementations[job.section][job.impl].missing() if job.impl else None
        if job.section not in wanted:
            continue
        if why is None:
            present.append(job)
        else:
            # How to install it is for another machine.
            status = f"missing: {why.partition(';')[0]}"
            missing.append({"section": job.section, "impl": job.impl, "status": status})
    if tiny:  # all implementations of the loss in one process: their times say nothing
        one = Job("loss", 75.0)
        present = list(dict.fromkeys(one if job.section == "loss" else job for job in present))
    return present, missing


def start(job: Job, args: argparse.Namespace, truths: Path, limit: float) -> Running:
    from benchmarks.common import ROOT

    command = [sys.executable, "-m", f"benchmarks.gpu.{job.module}", f"--device={args.device}"]
    command += [f"--out={args.out.resolve()}", f"--truths={truths}"]
    command += ["--tiny"] if args.tiny else []
    command += [f"--impl={job.impl}"] if job.impl else []
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PLAD_FAST_AUTOTUNE", None)  # what is frozen is what is measured
    if args.device == "cpu":
        env["TRITON_INTERPRET"] = "1"
    log = args.out / "logs" / f"{job.name}.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
    return Running(job, process, limit, log)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    deadline = time.monotonic() + 60 * args.minutes

    from benchmarks.gpu import summary, worker

    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    kept = [
        row for row in worker.read(args.out) if row["section"] not in (*args.section, "sections")
    ]
    (args.out / worker.RESULTS).unlink(missing_ok=True)
    waiting, missing = plan(args.section, args.tiny)
    for row in kept + missing:
        worker.append(args.out, row)

    def note(job: Job, status: str, seconds: float = 0.0) -> None:
        print(f"{job.name}: {status} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        row = {"section": "sections", "name": job.name, "status": status, "seconds": seconds}
        worker.append(args.out, row)
        summary.write(args.out)

    # Times of a dry run say nothing, so that two processes may disturb one another.
    slots = 2 if args.tiny else 1
    running: list[Running] = []
    failed = False
    with tempfile.TemporaryDirectory() as truths:
        try:
            while waiting or running:
                while waiting and len(running) < slots:
                    job = waiting.pop(0)
                    left = deadline - time.monotonic()
                    if left < LEAST_SECONDS:
                        note(job, "no time left")
                    else:
                        # A section's own limit is a GPU's.
                        limit = left if args.device == "cpu" else min(job.limit, left)
                        running.append(start(job, args, Path(truths), limit))
                time.sleep(0.05)
                for one in list(running):
                    status = one.status()
                    if status is not None:
                        running.remove(one)
                        note(one.job, status, one.seconds)
                        failed |= status != "ok"
        finally:
            for one in running:
                one.kill()
    print(summary.write(args.out))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
