"""Files that a command left, cut, emptied, removed or of another state: the numbers are those of a
run left alone, or there is one line that says what is wrong. Never other numbers with exit 0."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import sys

import pytest

from plad_fast.cli import main
from tests.support.launched import Started
from tests.support.recipe_runs import arguments, write_pairs

pytestmark = pytest.mark.usefixtures("no_plots")

FAULTS = ("half", "empty", "missing", "rows", "stale")
NUMBERS = ("metrics.json", "pairs/train.jsonl", "pairs/held-out.jsonl")


def distill(teacher, folder, *extra):
    return arguments(
        teacher, folder, "--limit", "14", "--held-out", "4",
        "--sft-epochs", "1", "--epochs", "1", "--saves-per-stage", "1",
        "--calibration-samples", "2", "--scorer", "length", *extra,
    )  # fmt: skip


def run(command) -> tuple[int, str]:
    """Exit status and what it said on the error stream, without bars."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        status = main(command)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("plad-fast: error")]
    return status, "\n".join(lines)


@pytest.fixture(scope="module")
def teacher(tiny_teacher, tmp_path_factory):
    """A copy of its own: the folders of a run are known by its path too."""
    return shutil.copytree(tiny_teacher, tmp_path_factory.mktemp("faults") / "teacher")


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run(distill(teacher, folder))[0] == 0
    return folder


@pytest.fixture(scope="module")
def other(teacher, tmp_path_factory):
    """Another run, whose files are the stale ones: the teacher's answers are others, too."""
    folder = tmp_path_factory.mktemp("other") / "run"
    assert run(distill(teacher, folder, "--seed", "1", "--limit", "16"))[0] == 0
    return folder


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def break_file(path, fault, stale) -> bool:
    """False where there is no such fault of the file."""
    content = path.read_bytes()
    if fault == "half":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "missing":
        path.unlink()
    elif fault == "rows":  # cut at the end of a line: what is left reads as a whole
        lines = content.splitlines(keepends=True)
        if path.suffix != ".jsonl" or len(lines) < 3:
            return False
        path.write_bytes(b"".join(lines[: len(lines) // 2 + 1]))
    elif not stale.is_file() or stale.read_bytes() == content:
        return False
    else:
        path.write_bytes(stale.read_bytes())
    return True


def wrong(command, folder, finished, numbers) -> str | None:
    """What is wrong with the way in which a command went on, if anything is."""
    status, error = run(command)
    if status == 0:
        changed = [n for n in numbers if (folder / n).read_bytes() != (finished / n).read_bytes()]
        return f"exit 0, and other {changed}" if changed else None
    if status == 2 and error and "\n" not in error:
        return None
    return f"exit {status}: {error}"


def faulty(command, finished, other, tmp_path, faults, numbers) -> list[str]:
    """Every fault in every file, and what was wrong with what came of it."""
    found, tried = [], 0
    for name, kinds in faults.items():
        for fault in kinds:
            folder = tmp_path / "copy"
            shutil.copytree(finished, folder)
            if break_file(folder / name, fault, other / name):
                tried += 1
                if reason := wrong(command(folder), folder, finished, numbers):
                    found.append(f"{name}, {fault}: {reason}")
            shutil.rmtree(folder)
    assert tried > len(faults)
    return found


# Of each kind of file and fault one, for every day; all of them take minutes.
EVERY_DAY = {
    "run.json": ("half", "empty", "stale"),
    "config.json": ("half",),
    "metrics.json": ("stale",),
    "answers/teacher.jsonl": ("half", "rows", "empty", "missing"),
    "answers/student.jsonl": ("rows", "stale"),
    "pairs/train.jsonl": ("half", "rows", "empty", "stale"),
    "pairs/held-out.jsonl": ("rows", "missing"),
    "pairs/scores.jsonl": ("half",),
    "pairs/dropped.jsonl": ("half",),
    "sft/model.safetensors": ("half",),
    "plad/log_history.json": ("empty",),
    "student/config.json": ("stale", "missing"),
    "evaluation/plad-student-sampled.jsonl": ("rows", "stale"),
    "evaluation/plad-student-logps.json": ("half", "missing"),
}


def test_files_of_a_run(finished, other, teacher, tmp_path):
    assert {str(name) for name in files_of(finished)} >= EVERY_DAY.keys()
    command = functools.partial(distill, teacher)
    assert not faulty(command, finished, other, tmp_path, EVERY_DAY, NUMBERS)


@pytest.mark.slow
def test_every_file_of_a_run(finished, other, teacher, tmp_path):
    faults = dict.fromkeys(files_of(finished), FAULTS)
    assert len(faults) > 40
    command = functools.partial(distill, teacher)
    assert not faulty(command, finished, other, tmp_path, faults, NUMBERS)


@pytest.mark.parametrize("command", ["pairs", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_every_file_of_a_command(command, teacher, tmp_path):
    """run.json, stores, scores, results: of `pairs` and `evaluate`."""
    prompts = write_pairs(tmp_path / "prompts.jsonl", 6)
    more = write_pairs(tmp_path / "more.jsonl", 8)

    def parts(folder, *extra, file):
        models = {
            "pairs": ["--teacher", str(teacher), "--student", str(teacher), "--prompts", str(file),
                      "--teacher-temperature", "1", "--scorer", "length"],
            "evaluate": ["--student", f"A={teacher}", "--pairs", str(file), "--eval-scorer",
                         "length", "--calibration-samples", "2"],
        }  # fmt: skip
        return [command, *models[command], "--max-new-tokens", "20", "--precision", "float32",
                "--output-dir", str(folder), *extra]  # fmt: skip

    finished, other = tmp_path / "finished", tmp_path / "other"
    assert run(parts(finished, file=prompts))[0] == 0
    assert run(parts(other, "--seed", "1", file=more))[0] == 0
    numbers = ["pairs.jsonl" if command == "pairs" else "metrics.json"]
    faults = dict.fromkeys(files_of(finished), FAULTS)
    go_on = functools.partial(parts, file=prompts)
    assert not faulty(go_on, finished, other, tmp_path, faults, numbers)


def test_a_halved_store_of_the_teacher_is_filled_up(finished, teacher, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    store = folder / "answers" / "teacher.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(lines[: len(lines) // 2]))
    assert main(distill(teacher, folder)) == 0
    out = capsys.readouterr().out
    count = len(lines) - 1
    assert f"teacher.jsonl has {len(lines) // 2 - 1} of its {count} rows: teacher's answers" in out
    # The answers came out the same: nothing that follows is done again.
    assert (
        out.count("done before") == len(json.loads((folder / "run.json").read_text())["stages"]) - 1
    )
    assert sorted(store.read_text().splitlines(keepends=True)) == sorted(lines)
    assert os.listdir(folder / "answers") == os.listdir(finished / "answers")


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by POSIX means")
def test_a_full_disk_loses_nothing_that_was_finished(teacher, tmp_path):
    """The size limit on files stands in for a full disk: a write fails part of the way."""
    command = distill(teacher, tmp_path / "run")
    started = Started(1, command, tmp_path / "logs", largest_file=60_000)
    assert started.statuses() == [2], started.said()
    assert "what was finished is kept: make room and run the same command again" in started.said()
    assert "Traceback" not in started.said()
    assert run(command)[0] == 0
