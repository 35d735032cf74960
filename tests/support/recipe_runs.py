"""Commands of the recipe on tiny models, and how to kill one at a chosen moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
