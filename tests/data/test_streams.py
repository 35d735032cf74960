"""Rows that are read one by one are those that are read whole, and few of them are held."""

from __future__ import annotations

import csv
import functools
import gc
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from plad_fast import UsageError
from plad_fast.data import row_sets
from plad_fast.data.records import digest
from plad_fast.data.streams import StreamedRows, stream_rows
from plad_fast.data.tables import read_table
from plad_fast.data.tokenization import tokenize_dataset

ROWS = [
    {"prompt": [{"role": "user", "content": "a\u2028b"}], "chosen": "x", "n": 1},
    {"prompt": [{"role": "user", "content": "c", "name": "d"}], "chosen": "y", "n": None},
] * 3


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "chosen"])
            writer.writeheader()
            writer.writerows({"prompt": f"007,\r\n{i}", "chosen": "NA"} for i in range(5))
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_the_rows_are_those_of_the_whole_file(ending, tmp_path):
    path = write(tmp_path / f"rows.{ending}")
    assert list(stream_rows(str(path))) == list(read_table(str(path), "train").rows)


def test_a_folder_of_parquet_files(tmp_path):
    folder = tmp_path / "rows.parquet"
    folder.mkdir()
    for name in ("b", "a"):
        write(folder / f"{name}.parquet", [{"prompt": name}])
    for read in (stream_rows(str(folder)), read_table(str(folder), "train").rows):
        assert [row["prompt"] for row in read] == ["a", "b"]


def test_a_folder_as_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "rows.parquet")
    found = list(stream_rows(str(tmp_path / "data")))
    assert found[0] == ROWS[0]
    assert found[1] == {key: value for key, value in ROWS[1].items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"prompt": "a"}]', "one JSON list, which can only be read whole"),
        (b'{"prompt": "a"}\n{"prompt": ', "line 2, column 12 is not valid JSON"),
        (b'{"prompt": "a"}\n7\n', "row 2 is a int"),
        (gzip.compress(b"x", mtime=0), "a gzip archive"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
    ],
)
def test_what_is_no_file_of_rows_is_named(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(stream_rows(str(path)))
    with pytest.raises(UsageError, match="there is no file"):
        list(stream_rows(str(tmp_path / "row.jsonl")))


def test_token_ids_are_those_of_a_list_and_few_rows_are_held(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(row_sets, "_WRITTEN_AT_ONCE", 50)
    rows = [
        {"prompt": f"Say {i}.", "chosen": f" {i}", "rejected": [" x" * (i % 7 or 90)]}
        for i in range(400)
    ]
    held = []

    def count():
        """Rows, and groups of token ids, that something holds."""
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is dict]
        return [sum(name in one for one in found) for name in ("rejected", "prompt_ids")]

    def read():
        before = count()  # of other tests, too
        for number, row in enumerate(rows, start=1):
            yield dict(row)
            if number == len(rows):
                held.append([now - then for now, then in zip(count(), before, strict=True)])

    streamed = StreamedRows(read, "rows")
    assert (len(streamed), streamed.digest) == (400, digest(rows))
    streamed.tokens = tmp_path / "tokens.arrow"
    encode = functools.partial(tokenize_dataset, tokenizer=tiny_tokenizer, max_length=128)
    expected = encode(rows)
    before = pyarrow.total_allocated_bytes()
    found = encode(streamed)
    assert all(raw < 5 and groups <= 101 for raw, groups in held), held
    assert pyarrow.total_allocated_bytes() - before < streamed.tokens.stat().st_size / 4
    assert found.features == expected.features
    assert found.to_list() == expected.to_list()
    assert len(found) < 400  # some were too long

    streamed.read = lambda: iter(rows[:1])
    assert encode(streamed).to_list() == expected.to_list()  # of the file
