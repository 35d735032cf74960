"""`plad-fast` as several processes, and on CPUs in place of GPUs.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.support.launched train ...

accelerate takes FSDP on accelerators only and, on the CPU, runs DDP without a word; told of a
device of which torch has none here, the processes get what they would on one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    } | more


def torchrun(count: int, module: str = "plad_fast") -> list[str]:
    """What starts a module so many times; its arguments follow."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(count), "-m", module]


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    given = {"env": environment(), "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command, **given | options, check=False)


def main() -> int:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_NPU
        original(self, *args, **kwargs)

    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        AcceleratorState.__init__ = initialise
    from plad_fast.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
