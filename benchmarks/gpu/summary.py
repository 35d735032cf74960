"""A CSV for each section and summary.md, from the results that are known so far."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import RESULTS, Record, write_csv
from benchmarks.gpu.worker import read

# Names of implementations in results/counted.csv.
COUNTED = {
    "one-pass": "one pass", "op": "op", "3 products": "1 + 2a bare products",
    "trl": "TRL, chunked",
}  # fmt: skip
VERSION = re.compile(r" [\d.]+(?=,)")
FACTS = ("device_model", "commit", "torch", "triton")


def write(folder: Path) -> str:
    """Writes them and returns the summary."""
    rows: dict[str, list[Record]] = {name: [] for name in TABLES}
    for row in read(folder):
        rows.setdefault(row.pop("section"), []).append(row)
    facts = {r["what"]: r["value"] for r in rows["environment"] if r.get("what") in FACTS}
    for name, records in rows.items():
        if records:
            columns = dict.fromkeys(column for record in records for column in record)
            whole = [dict.fromkeys(columns, "") | r | facts for r in records]
            write_csv(folder / f"{name}.csv", whole)
    parts = [f"# plad_fast on {facts.get('device_model', 'a device')}"]
    for name, (title, table) in TABLES.items():
        parts += [f"## {title}", table(rows[name]) if rows[name] else "Nothing yet."]
    text = "\n\n".join(parts) + "\n"
    (folder / "summary.md").write_text(text, encoding="utf-8")
    return text


def markdown(rows: Sequence[Record], *columns: str) -> str:
    """A table of these columns; the digits of a number are those that matter."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row.get(column, "")) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")


def all_of(*columns: str) -> Callable[[Sequence[Record]], str]:
    return lambda rows: markdown(rows, *columns)


def what_is_not_ok(*columns: str) -> Callable[[Sequence[Record]], str]:
    """Counts of statuses, and the rows that are not ok."""

    def table(rows: Sequence[Record]) -> str:
        counts = Counter(row["status"].partition(":")[0] for row in rows)
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        others = [row for row in rows if row["status"] != "ok"]
        return f"{said}.\n\n{markdown(others, *columns)}" if others else f"{said}."

    return table


def losses(rows: Sequence[Record]) -> str:
    """By shape and share of active pairs, the fastest first; at the end what was not measured.

    Beside the time is what `benchmarks.counted` predicts of an H100.
    """
    predicted = predictions()

    def order(row: Record) -> tuple[str, float, float]:
        if "median_ms" not in row:
            return "~", 0.0, 0.0
        return row["shape"], -row["active"], row["median_ms"]

    found = []
    for row in sorted(rows, key=order):
        place = row.get("shape"), COUNTED.get(row["impl"]), row.get("active")
        found.append(row | {"predicted_h100_ms": predicted.get(place, "")})
    return markdown(
        found, "shape", "impl", "loss_kind", "active", "median_ms", "q1_ms", "q3_ms",
        "predicted_h100_ms", "tflops", "extra_mib", "over_gradients_mib", "worst_error", "status",
    )  # fmt: skip


def predictions() -> dict[tuple[str, str, float], str]:
    """ms by case, implementation without its version, and share of active pairs."""
    path = RESULTS / "counted.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (row["case"], VERSION.sub("", row["implementation"]), float(row["active"])): row[
                "predicted_ms"
            ]
            for row in csv.DictReader(file)
        }


def launches(rows: Sequence[Record]) -> str:
    """The frozen configuration and the fastest of each kind of launch."""
    kinds: dict[tuple[str, str, str], list[Record]] = {}
    for row in rows:
        if "ms" in row:
            kinds.setdefault((row["shape"], row["kernel"], row["key"]), []).append(row)
    lines: list[Record] = []
    for found in kinds.values():
        fastest = min(found, key=lambda row: row["ms"])
        lines += [row | {"which": "frozen"} for row in found if row["default"]]
        lines.append(fastest | {"which": "fastest"})
    values = [row for row in rows if "error" in row]
    others = {"shape", "kernel", "which", "splits", "key", "default", "ms", "status"}
    fields = [name for name in dict.fromkeys(n for row in lines for n in row) if name not in others]
    return "\n\n".join(
        (
            markdown(lines, "shape", "kernel", "which", *fields, "splits", "ms"),
            markdown(values, "shape", "kernel", "error", "status"),
        )
    )


TABLES: dict[str, tuple[str, Callable[[Sequence[Record]], str]]] = {
    "sections": ("Sections", all_of("name", "status", "seconds")),
    "environment": ("Machine", all_of("what", "value")),
    "correctness": (
        "Correctness, beside float64",
        what_is_not_ok(
            "problem", "dtype", "how", "sums", "d_hidden", "d_weight", "d_bias", "status"
        ),
    ),
    "loss": ("Loss, forward and backward", losses),
    "step": (
        "Training step, 1.2 billion parameters",
        all_of(
            "impl", "ms", "least_ms", "pairs_per_s", "peak_mib", "loss", "gradient_norm", "status"
        ),
    ),
    "tests": ("Tests marked gpu", what_is_not_ok("test", "seconds", "status")),
    "sweep": ("Launch configurations", launches),
    "parts": (
        "Parts",
        all_of("shape", "rows", "what", "calls", "ms", "tflops", "gb_per_s", "status"),
    ),
}  # fmt: skip
