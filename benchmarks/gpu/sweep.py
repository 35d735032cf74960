"""Launch configurations of the linear kernels and the row kernels, at every shape: sweep.csv.

Both ops run with an autotuner that times all it is offered, and more; row kernels run on stored
logits. Rows have the fields of a configuration as `kernels/launch.py` names them; `default` marks
what is frozen there. The loss and gradients that the fastest linear kernels gave are compared with
float64.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest import mock

import triton.testing
from plad_fast.kernels import autotune, launch
from plad_fast.kernels.launch import LinearConfig, RowsConfig

from benchmarks import peers
from benchmarks.check import errors_of, mismatch
from benchmarks.common import time_runs
from benchmarks.gpu import parts
from benchmarks.gpu.loss import oracle_of
from benchmarks.gpu.worker import Section, Shape

# BLOCK_N, BLOCK_V, BLOCK_D, warps, stages: beside what the autotuner would try.
MORE = tuple(
    LinearConfig(*fields)
    for fields in (
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 4, 3),
        (256, 128, 64, 8, 3), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 128, 8, 3),
    )
)  # fmt: skip
ROWS = tuple(RowsConfig(block, warps) for block in (1024, 2048, 4096) for warps in (4, 8, 16))
LOGITS = 4096  # rows of them
# Parts of the vocabulary that run side by side, as multiples of what `launch.py` takes.
SPLITS = (0.5, 2.0)

Bench = Callable[[Any], float]


class Sweep:
    """In the place of `autotune.tuned`: times each kind of launch once, and returns the fastest."""

    def __init__(self, section: Section, shape: Shape) -> None:
        self.section, self.shape = section, shape
        self.fastest: dict[tuple[str, str], Any] = {}

    def tuned(self, kernel: str, key: str, candidates: Sequence[Any], bench: Bench) -> Any:
        if (kernel, key) not in self.fastest:
            self.fastest[kernel, key] = self.sweep(kernel, key, candidates, bench)
        return self.fastest[kernel, key]

    def sweep(self, kernel: str, key: str, candidates: Sequence[Any], bench: Bench) -> Any:
        default = candidates[0]
        more = MORE if isinstance(default, LinearConfig) else ()
        configs = list(dict.fromkeys([*candidates, *more]))
        if self.section.tiny:
            configs = configs[:2]
        time = partial(self.time, kernel, key, bench)
        times = {config: time(config, 1.0, default=config == default) for config in configs}
        fastest = min(times, key=times.__getitem__)
        choose = launch.vocab_splits
        for factor in SPLITS:
            chosen = mock.Mock(side_effect=lambda *args, f=factor: max(1, round(choose(*args) * f)))
            with mock.patch.object(launch, "vocab_splits", chosen):
                if isinstance(default, LinearConfig) and "forward" in kernel:
                    time(fastest, factor, default=False)
        return fastest

    def time(
        self, kernel: str, key: str, bench: Bench, config: Any, splits: float, *, default: bool
    ) -> float:
        """ms; infinite for what cannot be compiled or launched, as some will be on any card."""
        facts = {"shape": self.shape.name, "kernel": kernel, **asdict(config), "splits": splits}
        with self.section.row(**facts, default=default, key=key) as row:
            try:
                row["ms"] = bench(config)
            except Exception as error:
                row["status"] = f"not launched: {error!r}"[:200]
        return row.get("ms", float("inf"))


def run_ops(section: Section, shape: Shape) -> None:
    case = shape.case(1.0, section.device)
    for name, prepare in (("op", peers.op), ("one pass", peers.one_pass)):
        with (
            mock.patch.object(autotune, "tuned", Sweep(section, shape).tuned),
            mock.patch.object(autotune, "wanted", return_value=True),
            mock.patch.object(launch, "uses_library", return_value=False),
            section.row(shape=shape.name, kernel=f"{name} with the fastest") as row,
        ):
            step = prepare(case.batch(), impl="triton")
            loss = step.run()
            assert loss is not None
            errors = errors_of(loss, *step.gradients(), oracle_of(section, shape, 1.0))
            row["error"] = max(errors.values())
            problem = mismatch(errors, case.torch_dtype)
            if problem:
                row["status"] = f"wrong: {problem}"


def run_row_kernels(section: Section, shape: Shape) -> None:
    batch = shape.case(1.0, section.device).batch()
    sweep = Sweep(section, shape)
    candidates = [launch.rows_config(shape.vocab), *ROWS]
    for part in parts.row_kernels(batch, min(LOGITS, shape.tokens)):

        def bench(config: RowsConfig, run: Callable[[], object] = part.run) -> float:
            with mock.patch.object(launch, "rows_config", return_value=config):
                return triton.testing.do_bench(run)

        sweep.tuned(part.what, f"V={shape.vocab}", candidates, bench)


def main() -> int:
    section = Section("sweep")

    def do_bench(run: Callable[[], object], **_: Any) -> float:
        return statistics.median(time_runs(run, section.device, repeats=2, seconds=0.0)) * 1e3

    timer = triton.testing.do_bench if section.device.type == "cuda" else do_bench
    with mock.patch.object(triton.testing, "do_bench", timer):
        for shape in section.shapes:
            run_ops(section, shape)
        for shape in section.shapes:
            run_row_kernels(section, shape)
    return section.finish()


if __name__ == "__main__":
    sys.exit(main())
