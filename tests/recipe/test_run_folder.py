"""A run folder: what it holds is complete, its own, and of one process; the rest is left alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest

from plad_fast import UsageError
from plad_fast.data.store import RowStore
from plad_fast.recipe.run_folder import RunFolder, Stage
from plad_fast.recipe.settings import DistillConfig


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1})

    def fail(path):
        (path / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        folder.make_folder("model", fail)
    assert not (folder / "model").exists()
    made = folder.make_folder("model", lambda path: (path / "whole").write_text("x") and None)
    assert [p.name for p in made.iterdir()] == ["whole"]


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    first = RunFolder(tmp_path / "run", {})
    with pytest.raises(UsageError, match="another process"):
        RunFolder(tmp_path / "run", {})
    first.close()
    RunFolder(tmp_path / "run", {}).close()


def test_nothing_is_emptied_while_a_store_is_open(tmp_path):
    pytest.importorskip("fcntl")
    RunFolder(tmp_path / "run", {}).close()
    for name in ("student", "teacher"):
        with RowStore.open(tmp_path / "run" / "answers" / f"{name}.jsonl", {}) as store:
            store.append([{"id": "a"}])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    store = RowStore.open(tmp_path / "run" / "answers" / "teacher.jsonl", {})
    with store, pytest.raises(UsageError, match=r"teacher\.jsonl is being filled by another"):
        RunFolder(tmp_path / "run", {}, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "record",
    [
        "not JSON",
        '{"settings": {}, "stages": {}}',
        '{"format": "another", "version": 1, "settings": {}, "stages": {}}',
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_program_is_left_alone(tmp_path, record, overwrite):
    """`run.json` is a common name; it takes our format in it to delete what lies beside it."""
    (tmp_path / "run.json").write_text(record)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not the record of a run, or is damaged"):
        RunFolder(tmp_path, {}, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "run.json").read_text() == record


def test_a_record_of_another_version_is_named_and_replaced_on_demand_only(tmp_path):
    run = tmp_path / "run"
    RunFolder(run, {"a": 1}).close()
    record = json.loads((run / "run.json").read_text()) | {"version": 7}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"version 7.*writes [0-9]+, so.*--overwrite"):
        RunFolder(run, {"a": 1})
    RunFolder(run, {"a": 1}, overwrite=True).close()


@pytest.mark.parametrize("name", ["thesis.txt", ".git"])
def test_a_folder_without_a_record_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match="not the folder of a run"):
        RunFolder(tmp_path, {}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_overwriting_removes_links_and_not_what_they_lead_to(tmp_path):
    RunFolder(tmp_path / "run", {"a": 1}).close()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model").write_text("x")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "sft").mkdir()
    RunFolder(tmp_path / "run", {"a": 2}, overwrite=True).close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert (tmp_path / "elsewhere" / "model").exists()


def test_overwriting_is_refused_where_something_lies_that_no_run_made(tmp_path):
    run = tmp_path / "run"
    RunFolder(run, {"a": 1}).close()
    (run / "sft").mkdir()
    (run / "prompts.jsonl").write_text("{}")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"also holds prompts\.jsonl"):
            RunFolder(run, {"a": 2}, overwrite=True, made="sft")
    assert (run / "sft").exists()
    assert (run / "prompts.jsonl").exists()
    (run / "prompts.jsonl").unlink()
    RunFolder(run, {"a": 2}, overwrite=True, made="sft").close()
    assert [path.name for path in run.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "name", ["data.locks.make_folders", "data.locks.locked", "data.records.write_atomically"]
)
def test_a_disk_that_is_full_when_a_folder_is_opened(name, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"plad_fast.{name}", full)
    with pytest.raises(UsageError, match="make room") as caught:
        RunFolder(tmp_path / "run", {})
    assert "--output-dir" not in str(caught.value)


def test_a_kill_during_overwriting_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    """With or without --overwrite, the next run finishes the emptying and starts at the start."""
    folder = RunFolder(tmp_path / "run", {"a": 1})
    folder.stage(Stage("student", lambda: "made"))
    folder.close()
    for name in ("student", "sft"):
        (tmp_path / "run" / name).mkdir()

    def killed(path):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(RuntimeError):
            RunFolder(tmp_path / "run", {"a": 2}, overwrite=True)
    folder = RunFolder(tmp_path / "run", {"a": 2})
    assert folder.stages == {}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"] == {"a": 2}
    folder.close()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    RunFolder(tmp_path / "run", {}).close()
    assert "has no locks" in caplog.text


CUT = json.dumps({"format": "plad-fast run", "version": 2, "settings": {}}, indent=2)[:40]


@pytest.mark.parametrize("damage", [b"", b"\0" * 60, CUT.encode(), CUT[:9].encode()])
def test_a_damaged_record_of_ours_is_replaced_where_that_is_asked_for(tmp_path, damage):
    """After a power cut it may be empty, zeros, or its beginning."""
    run = tmp_path / "run"
    RunFolder(run, {"a": 1}).close()
    (run / "config.json").write_text(json.dumps(DistillConfig().as_dict()))
    (run / "sft").mkdir()
    (run / "run.json").write_bytes(damage)
    with pytest.raises(UsageError, match=r"is damaged.*--overwrite"):
        RunFolder(run, {"a": 1})
    assert (run / "run.json").read_bytes() == damage
    folder = RunFolder(run, {"a": 2}, overwrite=True)
    assert folder.stages == {}
    folder.close()
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_a_folder_with_settings_alone_takes_others(tmp_path):
    """A first try that was refused or killed keeps nobody from another."""
    run = tmp_path / "run"
    RunFolder(run, {"teacher": "a"}).close()
    folder = RunFolder(run, {"teacher": "b"})
    folder.stage(Stage("student", lambda: "made"))
    folder.close()
    with pytest.raises(UsageError, match="teacher was 'b' and is 'c'"):
        RunFolder(run, {"teacher": "c"})
    RunFolder(run, {"teacher": "c"}, is_bound=lambda: False).close()


def test_what_is_refused_before_the_work_leaves_no_folder(tmp_path):
    def refuse():
        raise UsageError("no such model")

    with pytest.raises(UsageError, match="no such model"):
        RunFolder(tmp_path / "run", {}, check=refuse)
    assert not list(tmp_path.iterdir())


def rows(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def chain(tmp_path):
    """Three stages, each with a file; the last reads the one before."""
    done = []

    def make(name, *texts):
        def run():
            done.append(name)
            rows(tmp_path / "run" / f"{name}.jsonl", *texts)
            return "made"

        return run

    def again(**settings):
        done.clear()
        stages = [
            Stage("a", make("a", "1", "2", "3"), {"x": settings.get("x", 1)}, makes=["a.jsonl"]),
            Stage("b", make("b", "4"), {"y": settings.get("y", 1)}, makes=["b.jsonl"]),
            Stage(
                *("c", make("c", "5"), {"z": settings.get("z", 1)}),
                reads=["a.jsonl", "b.jsonl"],
                makes=["c.jsonl"],
            ),
        ]
        folder = RunFolder(tmp_path / "run", {})
        try:
            folder.announce(stages)
            for stage in stages:
                folder.stage(stage)
        finally:
            folder.close()
        return list(done)

    assert again() == ["a", "b", "c"]
    assert again() == []
    return again


def test_a_stage_runs_anew_for_its_own_reason_and_for_that_of_what_it_reads(chain, capsys):
    capsys.readouterr()
    assert chain(x=2, z=2) == ["a", "c"]
    told = capsys.readouterr().out
    assert "x was 1 and is 2: a and c run anew" in told
    assert "z was 1 and is 2: c runs anew" in told


@pytest.mark.parametrize(
    ("content", "anew", "said"),
    [
        (None, ["a"], "a.jsonl is missing"),
        ("", ["a"], "a.jsonl has 0 of its 3 rows"),
        ('{"text": "1"}\n', ["a"], "a.jsonl has 1 of its 3 rows"),
        ('{"text": "1"}\n{"te', ["a"], "a.jsonl has 1 of its 3 rows"),
        ('{"text": "1"}\n{"text": "2"}', ["a"], "a.jsonl has 2 of its 3 rows"),
        ('{"text": "1"}\n{"text": "3"}\n', ["c"], "(3 before, 2 now), and is kept as edited: c"),
        ('{"text": "1"}\n{"text": "2"}\n{"text": "3"}\n{"text": "9"}\n', ["c"], "(3 before, 4"),
        ('{"text":"1"}\n\n{"text":"2"}\n{"text":"3"}', [], ""),
        ('{"text": "1"}\n{"te\n{"text": "3"}\n', None, "a.jsonl, line 2 is no JSON"),
        ('{"text": "7"}\n{"text": "8"}\n', None, "none of the 3 rows"),
    ],
    ids=["missing", "empty", "cut", "torn", "no end", "row less", "row more", "spelling", "unread",
         "foreign"],
)  # fmt: skip
def test_a_cut_file_is_made_again_and_an_edited_one_is_used(
    chain, tmp_path, content, anew, said, capsys
):
    file = tmp_path / "run" / "a.jsonl"
    file.unlink()
    if content is not None:
        file.write_text(content)
    capsys.readouterr()
    if anew is None:
        with pytest.raises(UsageError, match=said):
            chain()
        assert file.read_text() == content
        file.unlink()
        assert chain() == ["a"]
        return
    assert chain() == anew
    assert said in capsys.readouterr().out
    if anew != ["a"]:
        assert file.read_text() == content
    assert chain() == []


def test_an_edit_is_not_overwritten_by_a_stage_that_runs_anew(chain, tmp_path):
    file = tmp_path / "run" / "a.jsonl"
    rows(file, "1", "3")
    for _ in range(2):
        with pytest.raises(
            UsageError, match="edited, and 'a' would make it anew: x was 1 and is 2"
        ):
            chain(x=2)
        assert chain(y=2) in (["b", "c"], [])  # which has no part in it
    # Nor is it made up for when it is cut in its turn.
    rows(file, "1")
    with pytest.raises(UsageError, match="has 1 of its 2 rows"):
        chain(y=2)
    file.unlink()
    assert chain(x=2, y=2) == ["a", "c"]


def test_a_file_of_an_earlier_state_is_no_edit(tmp_path, capsys):
    """Some of its rows are as they were; it is what the stage had made with other settings."""
    file = tmp_path / "run" / "a.jsonl"

    def run(x):
        stage = Stage("a", lambda: rows(file, "1", str(x)) or "made", {"x": x}, makes=["a.jsonl"])
        folder = RunFolder(tmp_path / "run", {})
        folder.stage(stage)
        folder.close()
        return file.read_text()

    first, second = run(5), run(6)
    assert first != second
    file.write_text(first)
    capsys.readouterr()
    assert run(6) == second
    assert "a.jsonl is an earlier one" in capsys.readouterr().out


def test_a_store_that_gained_rows_is_read_again_and_not_made_again(tmp_path):
    """Such as answers that were asked for once more, of which pairs are made."""
    file, done = tmp_path / "run" / "a.jsonl", []

    def add(key):
        with RowStore.open(file, {}) as store:
            store.append([{"id": key}])
        return "made"

    def again():
        done.clear()
        folder = RunFolder(tmp_path / "run", {})
        folder.stage(Stage("a", lambda: done.append("a") or add("1"), makes=["a.jsonl"]))
        folder.stage(Stage("b", lambda: done.append("b") or "read", reads=["a.jsonl"]))
        folder.close()
        return list(done)

    assert again() == ["a", "b"]
    assert again() == []
    add("2")
    assert again() == ["b"]
    assert again() == []


def test_stages_of_one_folder_that_checks_itself(tmp_path, capsys):
    """As the evaluations after one round and after two."""
    folder = RunFolder(tmp_path / "run", {})

    def stage(name, x):
        def write():
            (folder / "both").mkdir(exist_ok=True)
            (folder / "both" / "scores.json").write_text(f"{name} {x}")
            return "made"

        return Stage(name, write, {"x": x}, makes=["both"], checks_itself=True)

    for name, x in (("two", 1), ("one", 2), ("two", 1)):
        folder.announce([stage(name, x)])
        folder.stage(stage(name, x))
    assert (folder / "both" / "scores.json").read_text() == "two 1"
    assert "both/scores.json is another: two runs anew" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is not as it was written; put it right"):
        folder.announce([replace(stage("one", 2), checks_itself=False)])


def test_a_stage_that_is_killed_while_it_runs_anew_is_not_done(chain, tmp_path):
    """What it had written by then is no edit of somebody's."""
    folder = RunFolder(tmp_path / "run", {})

    def killed():
        rows(tmp_path / "run" / "a.jsonl", "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.stage(Stage("a", killed, {"x": 2}, makes=["a.jsonl"]))
    folder.close()
    assert chain(x=2) == ["a"]


def test_the_time_left_is_that_of_the_shares(tmp_path, capsys, monkeypatch):
    """From the stages that were done, this time or before; nothing is said where nothing is
    known."""
    clock = iter([0, 30, 100, 160])
    monkeypatch.setattr("plad_fast.recipe.run_folder.time.monotonic", lambda: next(clock))
    names = {"a": 0.1, "b": 0.0, "c": 0.2, "d": 0.7}
    stages = [Stage(name, lambda: "done", share=share) for name, share in names.items()]
    folder = RunFolder(tmp_path / "run", {})
    folder.announce(stages)
    folder.stage(stages[0])
    assert "left" not in capsys.readouterr().out
    folder.stages["b"] = {**folder.stages["a"], "seconds": 0.0}
    folder.stage(stages[2])  # a tenth took half a minute
    assert "== c, about 4 min left" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("plad_fast.recipe.run_folder.time.monotonic", lambda: 0)
        folder.stages["c"]["seconds"] = 3.0
        folder.stage(stages[3])
    assert "== d, about 77 s left" in capsys.readouterr().out
    folder.close()
