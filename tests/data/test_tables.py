"""Files of rows that cannot be read: one sentence says what and where."""

from __future__ import annotations

import pytest

from plad_fast.data.prompts import load_prompts
from plad_fast.errors import UsageError
from tests.support.prompt_files import (
    CHAT,
    ROWS,
    message_of,
    write_csv,
    write_json,
    write_jsonl,
    write_parquet,
)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3, column 15 is not valid JSON"),
        ("p.json", '[{"prompt": "a"},\n {"prompt" "b"}]', "line 2, column 12 is not valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n"b"\n', "row 2 is a str; every row must be an object"),
        ("p.csv", "id,prompt\n1,a\n2,b, c\n", "line 3 has more fields than the header"),
        ("p.csv", 'id,prompt\n1,"a" b\n', "line 2 is not valid CSV"),
        ("p.parquet", "id,prompt\n", "not a readable Parquet file"),
        ("p.txt", "a\n", "cannot tell the format"),
        ("p.jsonl", "", "has no rows"),
        ("p.json", "[]", "has no rows"),
        ("p.csv", "prompt\n", "has no rows"),
        ("p.csv", "prompt;id\nq;1\n", "but 'prompt;id': if ';' stands between its fields"),
        ("p.jsonl", '{"prompt": 3}\n', "row 1, column 'prompt' is 3; it should be text or a list"),
        ("p.jsonl", '{"prompt": "a"}\n{}\n', "row 2, column 'prompt' is None; it should be"),
        ("p.jsonl", '{"prompt": " \\n"}\n', "row 1, column 'prompt' holds a blank prompt"),
        ("p.jsonl", '{"prompt": ["a"]}\n', "column 'prompt' is ['a']; it should be"),
        ("p.jsonl", '{"prompt": "a\\ud83d"}\n', "row 1, column 'prompt' holds '\\ud83d', half"),
        (
            "p.jsonl",
            '{"prompt": [{"role": "user\\ud83d", "content": "a"}]}\n',
            "row 1, column 'prompt' holds '\\ud83d', half",
        ),
        (
            "p.jsonl",
            '{"prompt": [{"role": "user", "content": "\\ude00"}]}\n',
            "half of a surrogate pair",
        ),
        (
            "p.jsonl",
            '{"prompt": [{"role": "assistant", "content": "a"}]}\n',
            "ends in an assistant message",
        ),
    ],
)
def test_bad_files(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, "utf-8")
    assert expected in message_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "line 2"),
        ("p.jsonl", b'{"prompt": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}", "line 1 is nested"),
        ("p.json", b"[" * 200_000, "nested more than"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "n": ' + b"7" * 5000 + b"}", "line 2 holds"),
        ("p.json", b'[{"prompt": "a"},\n{"n": -' + b"7" * 5000 + b"}]", "number of 5001 digits"),
        ("p.csv", b"prompt,id,prompt\na,1,b\n", "several columns are named 'prompt'"),
        ("p.csv", "prompt\na\n".encode("utf-16-le"), "NUL bytes, as UTF-16 does"),
        ("p.jsonl", b"\x1f\x8b\x08\x00\x00", "a gzip archive"),
        ("p.csv", b"PK\x03\x04\x14\x00", "a zip archive, as an Excel file is"),
        ("p.json", b"PAR1\x15\x04", "a Parquet file"),
        ("p.parquet", b"PAR1 and nothing of it PAR1", "not a readable Parquet file"),
        ("p.parquet", b"", "not a readable Parquet file"),
    ],
)
def test_files_that_hold_what_nothing_can_read(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    message = message_of(tmp_path / name)
    assert expected in message
    assert len(message) < 400


def test_a_date_that_python_does_not_know_is_no_crash(tmp_path):
    import pyarrow
    import pyarrow.parquet

    dates = pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a"], "when": dates}), tmp_path / "p.parquet"
    )
    assert "not a readable Parquet file" in message_of(tmp_path / "p.parquet")
    texts = pyarrow.array(["a"])
    twice = pyarrow.Table.from_arrays([texts, texts], ["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "p.parquet")
    assert "several columns are named 'prompt'" in message_of(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "source",
    ["./x", "../x", "/none/x", "~/none-of-these", "a/b/c", "here/x", "x.tsv", "x.jsonl.gz", "a\0b",
     "~nobody-at-all/x", "", "x" * 5000],
)  # fmt: skip
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert len(message_of(source)) < 400


def test_files_of_random_damage_are_read_or_refused(tmp_path):
    """Two hundred files whose bytes were changed, cut or repeated: prompts, or a UsageError."""
    import random

    draw = random.Random(0)
    write_jsonl(tmp_path / "p.jsonl", [*ROWS, {"prompt": CHAT, "id": 4, "n": [1.5, None, {}]}])
    write_json(tmp_path / "p.json", ROWS)
    write_csv(tmp_path / "p.csv", ROWS)
    write_parquet(tmp_path / "p.parquet", ROWS)
    whole = {name: (tmp_path / name).read_bytes() for name in ("p.jsonl", "p.json", "p.csv")}
    whole["p.parquet"] = (tmp_path / "p.parquet").read_bytes()
    read, messages = 0, []
    for turn in range(200):
        name = sorted(whole)[turn % 4]
        data = bytearray(whole[name])
        for _ in range(draw.randint(1, 4)):
            start = draw.randrange(len(data))
            end = start + draw.randint(0, 20)
            data[start:end] = draw.choice(
                [b"", b"\x00", bytes([draw.randrange(256)]), data[start:end] * 3, b"[" * 500,
                 b"9" * 5000, b'"', b"NaN", b"1e999", b"\n", b"\\ud800"]
            )  # fmt: skip
        (tmp_path / name).write_bytes(bytes(data))
        try:
            read += bool(load_prompts(tmp_path / name, reference_column="answer"))
        except UsageError as error:
            messages.append(str(error))
    assert read > 10
    assert len(messages) > 10
    assert max(map(len, messages)) < 1000


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "p.csv").write_bytes("prompt\nfür\n".encode("latin-1"))
    assert "not UTF-8" in message_of(tmp_path / "p.csv")
    (tmp_path / "p.jsonl").mkdir()
    assert "cannot read" in message_of(tmp_path / "p.jsonl")
