"""`plad-fast` in several processes, on CPUs in place of GPUs.

Processes of `start` are forked from one that has done the imports, which takes longer than what
they do. A launcher starts this module instead of `plad_fast`:

    accelerate launch --config_file ... -m tests.support.launched train ...
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import pkgutil
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from plad_fast import cli
from plad_fast.recipe import distillation, evaluate, stages  # noqa: F401

ROOT = Path(__file__).parents[2]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
"""What `accelerate launch` sets for `fsdp2.yaml`."""

ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
"""What it sets for `deepspeed.yaml`."""

_RELEASED = "released"

SPAWN = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
SPAWN.set_forkserver_preload(["tests.support.launched", "tests.support.two_answerers"])


def environment(**more: str) -> dict[str, str]:
    """Of a process on CPUs, with one thread."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    own["DS_ACCELERATOR"] = "cpu"
    return {**os.environ, **own, **more}


@contextlib.contextmanager
def cpus_as_accelerators() -> Iterator[None]:
    """accelerate takes FSDP on accelerators only and, on the CPU, runs DDP without a word. Named
    after a device of which torch has none here, the processes get what they would on one."""
    original = AcceleratorState.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_NPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = initialise
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


class Started:
    """So many processes that run one command, their standard streams in files."""

    def __init__(
        self,
        count: int,
        typed: Sequence[str],
        folder: Path,
        plant: str = "",
        largest_file: int | None = None,
        program: Callable[[Sequence[str]], int] | None = None,
        **variables: str,
    ) -> None:
        """plant: of `_plant`. largest_file: in bytes; past it, writing fails as on a full disk.
        program: what runs instead of `plad-fast`."""
        folder.mkdir(parents=True, exist_ok=True)
        meet = folder / f"meet{len(os.listdir(folder))}"
        self.logs = [folder / f"{meet.name}-{rank}.log" for rank in range(count)]
        self.processes: list[BaseProcess] = []
        for rank, log in enumerate(self.logs):
            own = {} if count == 1 else _place(rank, count)
            given = (typed, environment(**own, **variables), meet.as_uri(), log)
            given += (plant, largest_file, program)
            self.processes.append(SPAWN.Process(target=_run, args=given))
            self.processes[-1].start()

    def wait_for(self, text: str) -> None:
        """Until the first process has said so."""
        deadline = time.monotonic() + 120
        while not (self.logs[0].exists() and text in self.logs[0].read_text()):
            assert self.processes[0].is_alive(), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def send(self, number: int) -> None:
        """As a launcher does."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    def release(self) -> None:
        """Those that "hold"."""
        (self.logs[0].parent / _RELEASED).touch()

    def statuses(self, timeout: float = 300) -> list[int | None]:
        """Once all have ended."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return found

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if "plad-fast: error" in line]


def _place(rank: int, count: int) -> dict[str, str]:
    """What launchers set."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {"MASTER_ADDR": "localhost"} | {name: str(value) for name, value in names.items()}


def _run(
    typed: Sequence[str],
    variables: dict[str, str],
    meet: str,
    log: Path,
    plant: str,
    largest_file: int | None,
    program: Callable[[Sequence[str]], int] | None,
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    gc.freeze()  # see tests/conftest.py
    torch.set_num_threads(1)
    _redirect(log)
    if plant:
        _plant(*plant.split())
    if largest_file is not None:
        import resource  # POSIX alone has it

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.chdir(log.parent)  # where the traceback of a failure may go
    several = "RANK" in variables
    if several:
        # A file rather than a port: nobody else can take it between its choice and its use.
        rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
    status = (program or main)(typed)
    if several and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)


def _redirect(log: Path | str) -> None:
    """Both streams, into a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _plant(function: str, call: str, deed: str) -> None:
    """At a call of a function of `plad_fast`: "wait" says so and waits a little, "hold" says so and
    waits for `Started.release`, "raise" raises in the last process."""
    path, _, name = f"plad_fast.{function}".rpartition(".")
    owner = pkgutil.resolve_name(path)
    real = getattr(owner, name)
    calls = []

    @functools.wraps(real)
    def planted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == int(call):
            if deed == "wait":
                print("REACHED", flush=True)
                time.sleep(2)
            elif deed == "hold":
                print("REACHED", flush=True)
                while not Path(_RELEASED).exists():
                    time.sleep(0.02)
            elif int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                raise RuntimeError("planted")
        return real(*args, **kwargs)

    setattr(owner, name, planted)


def python(typed: Sequence[str]) -> int:
    """As `python SCRIPT ARGUMENT ...`."""
    sys.argv = list(typed)
    sys.path.insert(0, str(Path(typed[0]).parent))
    try:
        runpy.run_path(typed[0], run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run_module(typed: Sequence[str], variables: dict[str, str], log: str) -> None:
    """As `python -m MODULE ARGUMENT ...` in a session of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    gc.freeze()  # see tests/conftest.py
    torch.set_num_threads(1)
    _redirect(log)
    sys.argv = list(typed)
    os.chdir(ROOT)
    runpy.run_module(typed[0], run_name="__main__", alter_sys=True)


def main(typed: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true" and "RANK" in os.environ:
        # Which would be compiled first.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    with cpus_as_accelerators() if is_fsdp else contextlib.nullcontext():
        return cli.main(typed)


if __name__ == "__main__":
    sys.exit(main())
