"""Every command and every example in the README, run on models of a size for tests."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from plad_fast.cli import main
from tests.support.fault_server import FaultServer, reasoning

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

TINY = ["--student-temperature", "1", "--max-new-tokens", "60"]
EXTRA = {
    "distill": [*TINY, "--student-layers", "1", "--held-out", "4"],
    "pairs": TINY,
    "evaluate": TINY,
}
"""What a tiny model needs beside what the README says; the rest is run as it stands."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def commands(program: str) -> list[str]:
    return [line for line in COMMANDS if line.startswith(program)]


def test_every_command_is_of_a_kind_that_is_run_here():
    kinds = ("plad-fast ", "python -m benchmarks.loss --quick", "pip install", "make ")
    assert COMMANDS
    for line in COMMANDS:
        assert line.startswith(kinds), f"no test runs: {line}"


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_python_examples(code, tiny_teacher, tmp_path, monkeypatch):
    if "trl import" in code:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_teacher))
    exec(compile(code, "README.md", "exec"), {})


@pytest.fixture
def endpoint(monkeypatch):
    """Where `openai:MODEL` is asked: a model such as the commands name."""
    with FaultServer(reasoning(1500)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield server


def test_command_line(tiny_teacher, endpoint, tmp_path, monkeypatch, capsys):
    """In the order of the README, since each command uses what the one before made."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}.", "dialogue": f"A: {i}", "summary": f"{i}"} for i in range(24)]
    for name in ("prompts.jsonl", "dialogues.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = commands("plad-fast ")
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)[1:]
        if not any(word.startswith("openai:") for word in words):
            words += ["--teacher-temperature", "1"] * (words[0] in ("distill", "pairs"))
        if words[0] == "distill" and "--teacher" not in words:
            words += ["--teacher", str(tiny_teacher)]
        words = [str(tiny_teacher) if word == "offline" else word for word in words]
        assert main([*words, *EXTRA.get(words[0], [])]) == 0, capsys.readouterr().err
    assert Path("runs/compared/report.html").is_file()
    assert "answer to" in Path("runs/api-pairs/pairs.jsonl").read_text()
    assert Path("runs/scored/plad-2/config.json").is_file()
    prompt = json.loads(Path("runs/summaries/pairs/train.jsonl").read_text().splitlines()[0])
    assert "sentence:\nA:" in prompt["prompt"][0]["content"]


def test_make_targets():
    for line in commands("make "):
        done = subprocess.run(
            [*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_pip_lines_name_extras_that_exist():
    setup = (ROOT / "setup.py").read_text()
    for line in commands("pip install"):
        for extra in re.findall(r"\[(.*?)\]", line):
            for name in extra.split(","):
                assert re.search(rf'"{name}"[\]:]', setup), f"setup.py has no extra {name}"


def test_the_benchmark_command():
    (line,) = commands("python -m benchmarks.loss")
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one-pass" in done.stdout


def test_files_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`((?:tests|benchmarks|plad_fast)/[\w/.]+)`", README):
        assert (ROOT / target).exists(), target
