"""Shapes, arguments and results of a section, which runs in a process of its own."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Record, release_memory
from benchmarks.measure import Case

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Shape:
    """N tokens in pairs of two responses, and the head that they meet: D hidden, V vocabulary."""

    name: str
    tokens: int
    hidden: int
    vocab: int
    response: int = 256

    @property
    def product(self) -> float:
        """flop"""
        return 2.0 * self.tokens * self.hidden * self.vocab

    def case(self, active: float, device: torch.device) -> Case:
        dtype = "float32" if device.type == "cpu" else "bfloat16"
        sizes = self.tokens, self.hidden, self.vocab
        return Case(*sizes, dtype, active, self.response, device=device.type)


SHAPES = (
    Shape("A", 8192, 4096, 128_256),
    Shape("B", 2048, 896, 151_936),
    Shape("C", 16_384, 2048, 248_320),
)
TINY = (Shape("tiny", 16, 64, 200, response=4),)


class Section:
    """Arguments of a section and its results, each a line of results.jsonl once it is known."""

    def __init__(self, name: str, **options: dict[str, Any]) -> None:
        """`options` are those that only this section has: keywords of `add_argument`."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", required=True)
        parser.add_argument("--tiny", action="store_true")
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--truths", type=Path, required=True, help="float64 results are kept")
        for option, keywords in options.items():
            parser.add_argument(f"--{option}", **keywords)
        self.args = parser.parse_args()
        self.name = name
        self.device = torch.device(self.args.device)
        self.tiny: bool = self.args.tiny
        self.shapes = TINY if self.tiny else SHAPES
        self.failures: list[str] = []

    @contextmanager
    def row(self, **facts: Any) -> Iterator[Record]:
        """A result, which the block completes. What goes wrong in it becomes the row's `status`.

        Raises:
            RuntimeError: the error has left the GPU unusable for this process.
        """
        row: Record = {"section": self.name, **facts, "status": "ok"}
        try:
            yield row
        except torch.OutOfMemoryError:
            row["status"] = "out of memory"
        except ImportError as error:
            row["status"] = f"missing: {error}"
        except Exception as error:
            traceback.print_exc()
            row["status"] = f"failed: {error!r}"[:300]
        if row["status"].startswith(("failed", "wrong")):
            self.failures.append(row["status"])
        append(self.args.out, row)
        print(row, flush=True)
        release_memory(self.device)

    def finish(self) -> int:
        """Exit status; the last line of output names the first failure."""
        print(*self.failures[:1])
        return int(bool(self.failures))


def append(folder: Path, row: Record) -> None:
    with (folder / RESULTS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path) -> list[Record]:
    path = folder / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
