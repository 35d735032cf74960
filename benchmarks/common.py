"""Fresh processes, time and memory, facts of the machine and tables, shared by all benchmarks.

A measurement is taken in a process of its own: allocator pools, compiled code and library buffers
of one implementation must not help or hurt the next one.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB = 1024**2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers")
RECORD_MARK = "benchmark-record: "

Record = dict[str, Any]


def run_worker(module: str, spec: Mapping[str, Any], *, threads: int | None = None) -> Record:
    """Runs `python -m <module> --worker <spec>` from the repository root and returns its record.

    The worker prints its record with `print_record`. A process that dies without one gives
    `{"status": "failed", "reason": <last line of its stderr>}`.
    """
    env = dict(os.environ)
    if threads is not None:
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", module, "--worker", json.dumps(spec)]
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(RECORD_MARK):
            return json.loads(line[len(RECORD_MARK) :])
    lines = done.stderr.strip().splitlines() or ["no output"]
    return {"status": "failed", "reason": f"exit status {done.returncode}: {lines[-1].strip()}"}


def print_record(record: Record) -> None:
    """Hands a worker's record to `run_worker`."""
    print(RECORD_MARK + json.dumps(record), flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_runs(
    run: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    seconds: float,
    at_least: int = 2,
) -> list[float]:
    """Seconds of each of `repeats` runs; of fewer, but `at_least`, once `seconds` have passed.

    On CUDA between two events, with the device idle before the first: host work that the device
    has to wait for counts.
    """
    times: list[float] = []
    while len(times) < repeats and (len(times) < at_least or sum(times) < seconds):
        synchronize(device)
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return times


@dataclass
class Peak:
    """Bytes beyond what was held before; NaN until known, and where it cannot be."""

    extra_bytes: float = math.nan


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak memory over a `with` block beyond what was held on entry, known when the block ends.

    On CUDA this is the caching allocator's peak of allocated bytes. On the CPU it is the growth of
    the resident set: on Linux the kernel's high-water mark, reset on entry through
    `/proc/self/clear_refs`; elsewhere, or where that file is not writable, psutil samples it every
    2 ms. Free heap pages go back to the system first (`malloc_trim`), so that memory left over from
    earlier calls does not hide a peak.
    """
    peak = Peak()
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.extra_bytes = float(torch.cuda.max_memory_allocated(device) - before)
    elif _reset_high_water():
        resident = _status_bytes("VmRSS")
        yield peak
        peak.extra_bytes = _status_bytes("VmHWM") - resident
    else:
        sampler = _Sampler()
        resident = sampler.peak
        sampler.start()
        yield peak
        peak.extra_bytes = sampler.stop() - resident


def resident_bytes() -> float:
    """Of this process, NaN where /proc does not say."""
    return _status_bytes("VmRSS") if Path("/proc/self/status").exists() else math.nan


def release_memory(device: torch.device) -> None:
    """Collects garbage and gives free memory back to the system (glibc) or the driver (CUDA)."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; musl has none
        if trim is not None:
            trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    return math.nan


class _Sampler(threading.Thread):
    """Highest resident set that psutil sees; NaN without psutil."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        try:
            import psutil
        except ImportError:
            self._rss: Callable[[], float] = lambda: math.nan
        else:
            process = psutil.Process()
            self._rss = lambda: float(process.memory_info().rss)
        self.peak = self._rss()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._rss())

    def stop(self) -> float:
        self._done.set()
        self.join()
        return self.peak


def environment(device: torch.device, *, threads: int | None = None) -> Record:
    """Versions, commit and machine: the columns that make a row of numbers worth keeping."""
    facts: Record = {
        "device_model": device_model(device),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": git_commit(),
    }
    for package in PACKAGES:
        facts[package] = version_of(package)
    return facts


def version_of(package: str) -> str:
    """Installed version of a distribution, or the empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def git_commit() -> str:
    """Short hash of HEAD, `-dirty` where tracked files differ; empty outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            check=False,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def device_model(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Writes records of equal keys; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".part")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    draft.replace(path)
