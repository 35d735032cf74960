"""README and the pages of docs/: their code and commands run, and what they name exists."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from plad_fast.cli import main
from tests.support.fault_server import FaultServer, reasoning
from tests.support.launched import Started, python

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted(DOCS.glob("*.md"))]
EVERY_PAGE = [
    *PAGES,
    *sorted((DOCS / "reference").glob("*.md")),
    *(ROOT / name for name in ("CHANGELOG.md", "SECURITY.md", "kernels/README.md")),
    *(ROOT / name for name in ("benchmarks/README.md", "examples/README.md")),
    ROOT / "examples/clusters/README.md",
]
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODELS = ("offline", SMOLLM, "Qwen/Qwen2.5-1.5B-Instruct")
LANGUAGES = {"python", "bash", "sh", "text", "json", "yaml"}
"""`bash` holds commands that are run here, a line each; `sh` whole scripts that are not."""
RUN_ELSEWHERE = {"scaling.md"}
"""Pages whose code has a test module of its own (tests/benchmarks/test_scaling.py)."""

TINY = ["--student-temperature", "1", "--max-new-tokens", "60"]
DISTILL = [*TINY, "--held-out", "4"]
EXTRA = {
    "distill": DISTILL, "tune": [*DISTILL, "--trials", "1"], "pairs": TINY, "evaluate": TINY,
}  # fmt: skip
"""What tiny models need beside what a page says; all else is run as it stands."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def commands(page: Path, program: str = "") -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line.strip() and line.startswith(program)]


def pages_with(find) -> list[Path]:
    return [page for page in PAGES if page.name not in RUN_ELSEWHERE and find(page)]


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def endpoint(monkeypatch):
    """Where a teacher or judge behind an API is asked: a model such as the pages name."""
    with FaultServer(reasoning(1500)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield server


@pytest.mark.parametrize("page", pages_with(lambda page: blocks(page, "python")), ids=by_name)
def test_the_code_of_a_page_runs(page, endpoint, tiny_teacher, tmp_path, monkeypatch):
    """Each block is a program; one that begins with a file's name is that file, for the next."""
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(blocks(page, "python")):
        code = code.replace("/tmp/", f"{tmp_path}/").replace(SMOLLM, str(tiny_teacher))
        names = {"__name__": "__main__"}
        if "import triton" in code:
            pytest.importorskip("triton")
        if "integrations.trl" in code:
            pytest.importorskip("trl")
            names["trainer"] = dpo_trainer(tiny_teacher)
        if name := re.match(r"# (\w+\.py)\n", code):
            Path(name[1]).write_text(code, encoding="utf-8")
        elif "environ" in code:
            run_in_a_fresh_process(code)
        elif "torch.distributed" in code:
            program = tmp_path / f"block{number}.py"
            program.write_text(code, encoding="utf-8")
            started = Started(1, [str(program)], tmp_path / "logs", program=python)
            assert started.statuses() == [0], started.said()
        else:
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)


def dpo_trainer(model: Path):
    """The trainer that README's reader has."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": "The sky is", "chosen": " blue.", "rejected": " made of cheese."}] * 8
    return DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=DPOConfig("dpo", max_steps=1, report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def run_in_a_fresh_process(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_command_is_of_a_kind_that_is_run_here():
    kinds = (
        "plad-fast ", "python -m plad_fast.kernels.aot ", "python -m benchmarks.loss --quick",
        "make ", "git clone ", "pip install ", "pre-commit install",
    )  # fmt: skip
    for page in pages_with(commands):
        for line in commands(page):
            assert line.startswith(kinds), f"{page.name}: no test runs: {line}"


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    "page", [p for p in pages_with(lambda p: commands(p, "plad-fast ")) if p != README], ids=by_name
)
def test_the_commands_of_a_page_run(page, tiny_teacher, endpoint, tmp_path, monkeypatch, capsys):
    """In their order, since each may use what the one before made."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}.", "dialogue": f"A: {i}", "summary": f"{i}"} for i in range(24)]
    for name in ("prompts.jsonl", "dialogues.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for line in commands(page, "plad-fast "):
        words = shlex.split(line)[1:]
        if not any(word.startswith("openai:") for word in words):
            words += ["--teacher-temperature", "1"] * (words[0] in ("distill", "tune", "pairs"))
        if words[0] in ("distill", "tune") and "--teacher" not in words:
            words += ["--teacher", str(tiny_teacher)]
        if words[0] in ("distill", "tune") and "--student" not in words:
            words += ["--student-layers", "1"]
        words = [str(tiny_teacher) if word in MODELS else word for word in words]
        assert main([*words, *EXTRA.get(words[0], [])]) == 0, capsys.readouterr().err
    check_results(page)


def check_results(page: Path) -> None:
    if page.name == "command-line.md":
        assert Path("runs/compared/report.html").is_file()
    elif page.name == "data.md":
        row = json.loads(Path("runs/summaries/pairs/train.jsonl").read_text().splitlines()[0])
        assert "sentence:\nA:" in row["prompt"][0]["content"]
    elif page.name == "teachers.md":
        assert Path("runs/scored/plad-2/config.json").is_file()
        assert "answer to" in Path("runs/probe/pairs.jsonl").read_text()
        assert Path("runs/probe/pairs.jsonl").read_text().count("\n") <= 8
        assert Path("runs/judged/report.html").is_file()
    else:
        pytest.fail(f"nothing is known of what the commands of {page.name} make")


def test_readme_shows_commands_of_the_other_pages():
    elsewhere = [line for page in PAGES if page != README for line in commands(page)]
    for line in commands(README, "plad-fast "):
        assert line in elsewhere, line


def test_make_targets():
    for page in PAGES:
        for line in commands(page, "make "):
            done = subprocess.run(
                [*shlex.split(line), "--dry-run"],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr


def test_pip_lines_name_extras_that_exist():
    setup = (ROOT / "setup.py").read_text()
    for line in commands(README, "pip install"):
        for extra in re.findall(r"\[(.*?)\]", line):
            for name in extra.split(","):
                assert re.search(rf'"{name}"[\]:]', setup), f"setup.py has no extra {name}"


@pytest.mark.slow  # `tests/benchmarks/test_loss.py` has a smaller run of it
def test_the_benchmark_command():
    (line,) = commands(DOCS / "evidence.md")
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one-pass" in done.stdout


def test_the_kernel_of_the_page_compiles(tmp_path):
    pytest.importorskip("triton")
    page = DOCS / "add-a-kernel.md"
    (line,) = commands(page)
    (tmp_path / "is_argmax.py").write_text(blocks(page, "python")[0])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is_argmax" in done.stdout


@pytest.mark.parametrize("page", EVERY_PAGE, ids=by_name)
def test_blocks_are_of_a_language_that_is_checked(page):
    text = page.read_text("utf-8")
    assert set(re.findall(r"^```(\S+)$", text, flags=re.MULTILINE)) <= LANGUAGES
    for code in blocks(page, "json"):
        json.loads(code)
    for code in blocks(page, "yaml"):
        yaml.safe_load(code)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=by_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", EVERY_PAGE, ids=by_name)
def test_paths_exist(page):
    """Files are named by their path in the repository, tests by their file's name, too."""
    text = page.read_text("utf-8")
    rooted = r"`((?:tests|benchmarks|plad_fast|kernels|examples|docs)/[\w./-]+)`"
    for name in re.findall(rooted, text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+\.py)\b", text):
        assert list((ROOT / "tests").rglob(name)), name


def test_every_page_is_in_the_index_and_on_the_site():
    present = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} - {"README.md"}
    assert present <= set(re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "README.md").read_text()))
    site = (ROOT / "mkdocs.yml").read_text()
    for page in EVERY_PAGE:
        assert f": {page.relative_to(ROOT)}\n" in site, page


def documented_doors() -> list[str]:
    pages = (DOCS / "reference").glob("*.md")
    return [name for p in pages for name in re.findall(r"^::: (\S+)$", p.read_text(), re.MULTILINE)]


def test_the_reference_has_every_door():
    """The rooms with public names, and the package itself."""
    doors = {f"plad_fast.{path.parent.name}" for path in ROOT.glob("plad_fast/*/__init__.py")}
    assert doors - {"plad_fast.integrations"} <= set(documented_doors())


@pytest.mark.parametrize("door", documented_doors())
def test_a_public_name_exists_and_has_a_docstring(door):
    if door == "plad_fast.integrations.trl":
        pytest.importorskip("trl")
    module = importlib.import_module(door)
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if callable(value):
            assert value.__doc__, f"{door}.{name}"


@pytest.mark.parametrize("page", ["features.md", "coming-from.md"])
def test_the_tables_of_a_page_name_tests_that_exist(page):
    """In a column of their own or in a comment; only what is missing goes without one."""
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    text = (DOCS / page).read_text("utf-8")
    tables = re.findall(
        r"^\| .* (?:our test|plad-fast) \|\n\|[-|]+\n((?:\|.+\|\n)+)", text, re.MULTILINE
    )
    assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in tables)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 30
    for row in rows:
        name = re.search(r"(?:\| `|<!-- )(test_\w+)(?:`| -->) \|$", row)
        assert name or re.search(r"\| (no|none)\b[^|]*\| \|$", row), row
        assert name is None or f"def {name[1]}(" in tests, name[1]
