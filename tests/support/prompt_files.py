"""Files of prompts in every format, and what is said of one that cannot be read."""

from __future__ import annotations

import json

import pytest

from plad_fast.data.prompts import load_prompts
from plad_fast.errors import UsageError

ROWS = [
    {"id": "a", "prompt": "One?", "topic": "x", "answer": "1"},
    {"id": "b", "prompt": 'Two, "or"\nnot?', "topic": "y", "answer": "2"},
    {"id": "c", "prompt": "Drei für\u2028NA?", "topic": "007", "answer": "3"},
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows), "utf-8")


def write_csv(path, rows):
    import csv

    with path.open("w", encoding="utf-8-sig", newline="") as file:  # a BOM, as Excel writes it
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def message_of(*args, **options) -> str:
    with pytest.raises(UsageError) as caught:
        load_prompts(*args, **options)
    return str(caught.value)
