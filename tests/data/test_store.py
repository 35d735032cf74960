"""The store: what it promises when a run is killed, the disk is full, or two runs meet."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.given import CallableModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_rows_aside

SETTINGS = {"model": "m", "sampling": {"temperature": 1.0, "stop": ("a", "b")}}


def rows(*ids, text="t"):
    return [{"id": i, "text": text} for i in ids]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "answers.jsonl"


def test_rows_come_back_and_the_first_of_an_id_counts(path):
    with RowStore.open(path, SETTINGS) as store:
        assert not store.rows
        store.append(rows("a", "b"))
        store.append([*rows("b", text="later"), {"id": "c", "text": "ü\u2028\n\ud800"}])
        store.append([])
    with path.open("ab") as file:
        file.write(b'{"id": "a", "text": "by hand"}\n')
    with RowStore.open(path, SETTINGS) as store:
        assert store.rows.keys() == {"a", "b", "c"}
        assert {row["text"] for row in store.rows.values()} == {"t", "ü\u2028\n\ufffd"}


def test_every_torn_end_is_cut_off(path):
    with RowStore.open(path, {}) as store:
        header = path.stat().st_size
        store.append(rows("a"))
        first = path.stat().st_size
        store.append(rows("bü"))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with RowStore.open(path, {}) as store:
            assert store.rows.keys() == ({"a"} if size >= first else set())
            store.append(rows("bü"))
        with RowStore.open(path, {}) as store:
            assert store.rows.keys() == ({"a", "bü"} if size >= first else {"bü"}), size
    assert 0 < header < first


KILLED = """
import sys, time
from plad_fast.data.store import RowStore
with RowStore.open(sys.argv[1], {}) as store:
    first = len(store.rows)
    for batch in range(10_000):
        print(batch, flush=True)
        store.append([{"id": f"{first + 8 * batch + i}", "text": "x" * 2000} for i in range(8)])
        time.sleep(0.001)
"""


def test_a_killed_run_loses_at_most_its_last_batch_and_leaves_no_lock(path):
    announced = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(20):
            process.stdout.readline()
        time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        announced += 20 + len(process.stdout.readlines())
        process.wait()
        process.stdout.close()

        ids = [json.loads(line).get("id") for line in path.read_bytes().split(b"\n")[1:-1]]
        assert len(ids) == len(set(ids))
        with RowStore.open(path, {}) as store:
            assert store.rows.keys() == {str(i) for i in range(len(store.rows))}
            # A batch is announced before it is written: the last one of each run may be lost.
            assert len(store.rows) >= 8 * (announced - 2)


def test_other_settings_are_named(path):
    with RowStore.open(path, SETTINGS) as store:
        store.append(rows("a"))
    changed = {"model": "m", "sampling": {"temperature": 0.5, "stop": ["a", "b"]}, "new": 1}
    with pytest.raises(UsageError) as caught:
        RowStore.open(path, changed)
    message = str(caught.value)
    assert "new was 'not set' and is 1; sampling.temperature was 1.0 and is 0.5" in message
    assert "model" not in message
    assert "stop" not in message
    assert "--overwrite" in message


def test_a_store_without_rows_takes_other_settings(path):
    """Nothing in it was made with the old ones: a first run that failed at once leaves no trace."""
    RowStore.open(path, SETTINGS).close()
    with RowStore.open(path, {"model": "other"}) as store:
        store.append(rows("a"))
    with pytest.raises(UsageError, match="model was 'other'"):
        RowStore.open(path, SETTINGS)


@pytest.mark.parametrize("content", [b'{"prompt": "a"}\n', b"no newline", b"\0\1"])
def test_a_file_of_another_kind_is_left_alone(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a store of rows"):
        RowStore.open(path, SETTINGS)
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", [b"{oops}\n", b'{"text": "no id"}\n', b"\xff\n", b"3\n"])
def test_damage_in_the_middle_is_named(path, damage):
    with RowStore.open(path, SETTINGS):
        pass
    with path.open("ab") as file:
        file.write(b'{"id": "a"}\n' + damage + b'{"id": "b"}\n')
    with pytest.raises(UsageError, match="line 3 is damaged"):
        RowStore.open(path, SETTINGS)


def test_another_format_version_is_refused(path):
    with RowStore.open(path, SETTINGS):
        pass
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 99'))
    with pytest.raises(UsageError, match="format version 99, this plad_fast writes version 1"):
        RowStore.open(path, SETTINGS)


def test_two_writers_are_told_apart(path):
    pytest.importorskip("fcntl")
    with RowStore.open(path, SETTINGS) as store:
        with pytest.raises(UsageError, match="being filled by another process"):
            RowStore.open(path, SETTINGS)
        store.append(rows("a"))
    with RowStore.open(path, SETTINGS) as store:
        assert store.rows.keys() == {"a"}


def test_a_full_disk_loses_nothing_that_was_stored(path):
    resource = pytest.importorskip("resource")
    with RowStore.open(path, SETTINGS) as store:
        store.append(rows("a"))
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # A real write that is cut short, which patching a method would not give.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        try:
            with pytest.raises(UsageError, match="what was stored before is safe"):
                store.append(rows("b", "c", text="x" * 100))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert store.rows.keys() == {"a"}
        store.append(rows("b"))
    with RowStore.open(path, SETTINGS) as store:
        assert store.rows.keys() == {"a", "b"}


def test_an_interrupted_write_is_taken_back(path, monkeypatch):
    def interrupted(fd):
        raise KeyboardInterrupt

    with RowStore.open(path, SETTINGS) as store:
        before = path.read_bytes()
        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append(rows("a"))
        assert path.read_bytes() == before


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        RowStore.open(tmp_path / "file" / "answers.jsonl", SETTINGS)

    def refused(*args, **options):  # permissions do not bind root, who runs many a CI
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(UsageError, match=r"Read-only file system.* make this one writable"):
        RowStore.open(tmp_path / "answers.jsonl", SETTINGS)


def test_answers_to_all_that_a_prompt_ever_was_are_kept(path):
    for prompt in "abca":
        set_rows_aside(path, SETTINGS, {"0": prompt})
        with RowStore.open(path, SETTINGS) as store:
            store.append([{"id": "0", "prompt": prompt}])
            assert [row["prompt"] for row in store.rows.values()] == [prompt]
    with RowStore.open(path.with_name("answers.old.jsonl"), SETTINGS) as old:
        assert sorted(row["prompt"] for row in old.rows.values()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "damage",
    [
        {"prompt": None},
        {"text": 5},
        {"finish_reason": "zz"},
        {"n_tokens": "many"},
        {"sample": "a"},
        {"id": 0},
        {"id": ["0"]},
    ],
)
def test_a_line_that_is_no_answer_is_refused(path, damage):
    prompts, sampling = [Prompt("0", "q")], Sampling(8)

    def run():
        model = CallableModel(lambda prompt: "said", "m")
        return stored_answers(
            lambda: model,
            prompts,
            path,
            sampling,
            fingerprint={},
            others_aside=True,
        )

    run()
    header, line = path.read_text().splitlines()
    row = {**json.loads(line), **damage}
    if row["prompt"] is None:
        del row["prompt"]
    path.write_text(f"{header}\n{json.dumps(row)}\n")
    with pytest.raises(UsageError, match="damaged; delete that line"):
        run()
    path.write_text(f"{header}\n")
    assert run().answers["0"][0].text == "said"
