"""Sets of processes that talk over gloo, forked from one that has done the imports.

    start(folder, "ran", "tests.support.wrapped_losses:LOSSES:2", ...)

runs the cases in the module's dict of that name in two processes, and so on. What a case returns or
raises in each of them is left in FOLDER/LOSSES-2-<rank>.pt, as {name: ("ok", value) or ("failed",
traceback)}. One process alone has no process group.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.launched import Started

# Of one set; a hang must end in a failure.
TIMEOUT = datetime.timedelta(seconds=float(os.environ.get("PLAD_TEST_TIMEOUT", "240")))


def start(folder: Path, name: str, *sets: str) -> tuple[Path, str]:
    """Runs sets in a program of their own. Returns the folder, and how they ended."""
    command = [str(folder), *sets]
    started = Started(1, command, folder / f"{name}-logs", program=main, DS_ACCELERATOR="cpu")
    statuses = started.statuses((1 + len(sets)) * TIMEOUT.total_seconds())
    # A set that ended early leaves the results of its first cases.
    return folder, f"the processes ended with {statuses}:\n{started.said()[-4000:]}"


def results(started: tuple[Path, str], name: str, world: int, case: str) -> list[Any]:
    """What every process returned from a case; fails if one of them did not return."""
    folder, ending = started
    left = []
    for rank in range(world):
        file = folder / f"{name}-{world}-{rank}.pt"
        cases = torch.load(file) if file.is_file() else {}
        left.append(cases.get(case, ("missing", ending)))
    failed = [f"process {i}: {s}\n{v}" for i, (s, v) in enumerate(left) if s == "failed"]
    missing = [f"process {i}: {s}\n{v}" for i, (s, v) in enumerate(left) if s == "missing"]
    if failed or missing:
        # Those that are missing may have waited for those that failed.
        pytest.fail("\n".join(failed or missing[:1]))
    return [value for _, value in left]


def main(typed: Sequence[str]) -> int:
    folder, sets = Path(typed[0]), typed[1:]
    wanted = os.environ.get("PLAD_TEST_CASES", "")
    for module, name, count in (each.split(":") for each in sets):
        cases, world = importlib.import_module(module), int(count)
        gc.freeze()  # see tests/conftest.py
        chosen = {
            case: run
            for case, run in getattr(cases, name).items()
            if not wanted or case in wanted.split(",")
        }
        children = [_fork(rank, world, folder, name, chosen) for rank in range(world)]
        if not _wait(children):
            return 1
    return 0


def _fork(rank: int, world: int, folder: Path, name: str, cases: dict) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        _run(rank, world, folder, name, cases)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the parent has at exit is the parent's
    raise AssertionError


def _run(rank: int, world: int, folder: Path, set_name: str, cases: dict) -> None:
    label = f"{set_name}-{world}-{rank}"
    if world > 1:
        # A file rather than a port: nobody else can take it between its choice and its use.
        store = dist.FileStore(str(folder / f"store-{set_name}-{world}-{os.getppid()}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    faulthandler.dump_traceback_later(0.9 * TIMEOUT.total_seconds())  # where it hangs
    found = {}
    for name, run in cases.items():
        started = time.perf_counter()
        try:
            found[name] = "ok", run(folder)
        except Exception:
            found[name] = "failed", traceback.format_exc()
        print(f"{label} {name}: {found[name][0]}, {time.perf_counter() - started:.1f} s")
        torch.save(found, folder / f"{label}.pt")
        if world > 1:
            dist.barrier()
    if world > 1:
        dist.destroy_process_group()


def _wait(children: list[int]) -> bool:
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    left, good = set(children), True
    while left and good:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                good = good and status == 0
        good = good and time.monotonic() < deadline
        time.sleep(0.02)
    for child in left:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return good
