"""Commands of the recipe on tiny models, and how to kill one at a chosen moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest


def arguments(teacher, output, *extra: str) -> list[str]:
    return [
        "distill", "--teacher", str(teacher), "--student-layers", "1", "--limit", "24",
        "--held-out", "8", "--teacher-temperature", "1", "--student-temperature", "1",
        "--max-new-tokens", "60", "--batch-size", "2", "--sft-batch-size", "2",
        "--sft-share", "0.5", "--precision", "float32",
        "--output-dir", str(output), *extra,
    ]  # fmt: skip


def write_pairs(path: Path, count: int) -> Path:
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}", "rejected": " x"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


KILLABLE = """
import sys, time
import plad_fast.{module} as module
from plad_fast.cli import main
real = module.{name}
count = 0
def wait(*args, **kwargs):
    global count
    count += 1
    if count == {at}:
        print("REACHED", flush=True)
        time.sleep(60)
    return real(*args, **kwargs)
module.{name} = wait
sys.exit(main({arguments!r}))
"""


def kill_at(module: str, name: str, at: int, arguments: list[str]) -> None:
    """Run a command and kill -9 it at the given call of a function."""
    code = KILLABLE.format(module=module, name=name, at=at, arguments=arguments)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "REACHED" in line:
                break
        else:
            pytest.fail(f"{name} was never called {at} times: {process.stderr.read()}")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


HELD = """
import sys
import plad_fast.{module} as module
from plad_fast.cli import main
{before}
real = module.{name}
count = 0
def hold(*args, **kwargs):
    global count
    count += 1
    if count == {at}:
        print("REACHED", flush=True)
        sys.stdin.readline()
    return real(*args, **kwargs)
module.{name} = hold
sys.exit({run})
"""


def signal_at(
    module: str,
    name: str,
    at: int,
    arguments: list[str],
    signals: Sequence[int],
    *,
    before: str = "",
    run: str = "",
) -> subprocess.CompletedProcess:
    """Run a command, and send it signals while it is held at the given call of a function.

    It is let go on after the first signal; every other one is sent when it has said something of
    the one before.

    Args:
        before: Python lines to run first.
        run: Python expression of what to run; the command, if there is none.
    """
    code = HELD.format(
        module=module, name=name, at=at, before=before, run=run or f"main({arguments!r})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        output, errors = [], []

        def read_to_end(stream, found):
            found.extend(iter(stream.readline, ""))

        for line in process.stdout:
            output.append(line)
            if "REACHED" in line:
                break
        else:
            pytest.fail(f"{name} was never called {at} times: {process.stderr.read()}")
        for index, number in enumerate(signals):
            os.kill(process.pid, number)
            if index < len(signals) - 1:
                for line in process.stderr:
                    errors.append(line)
                    if signal.Signals(number).name in line:
                        break
        readers = [
            threading.Thread(target=read_to_end, args=arguments)
            for arguments in ((process.stdout, output), (process.stderr, errors))
        ]
        for reader in readers:
            reader.start()
        if len(signals) == 1:
            # It may have ended already.
            try:
                process.stdin.write("\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass
        for reader in readers:
            reader.join()
        process.wait()
    return subprocess.CompletedProcess(code, process.returncode, "".join(output), "".join(errors))
