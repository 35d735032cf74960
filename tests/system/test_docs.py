"""The pages in docs/: their code runs, what they name exists, and the reference is up to date."""

from __future__ import annotations

import ast
import importlib
import inspect
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

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EVERY_PAGE = [
    *PAGES,
    *sorted((DOCS / "reference").glob("*.md")),
    *(ROOT / name for name in ("README.md", "kernels/README.md", "benchmarks/README.md")),
    ROOT / "examples" / "README.md",
]
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
LANGUAGES = {"python", "bash", "text", "json", "yaml"}
RUN_ELSEWHERE = {"scaling.md"}
"""Pages whose code has a test module of its own (tests/benchmarks/test_scaling.py)."""

TINY = ["--student-temperature", "1", "--max-new-tokens", "60"]
EXTRA = {"distill": [*TINY, "--held-out", "4"], "pairs": TINY, "evaluate": TINY}
"""What tiny students need; what an endpoint is asked stays as the page says."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def python_pages() -> list[Path]:
    return [p for p in PAGES if p.name not in RUN_ELSEWHERE and blocks(p, "python")]


@pytest.fixture
def endpoint(monkeypatch):
    """Where a teacher or judge behind an API is asked: a model such as the pages name."""
    with FaultServer(reasoning(1500)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield server


@pytest.mark.parametrize("page", python_pages(), ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(page, endpoint, tiny_teacher, tmp_path, monkeypatch):
    """Each block is a program; one that begins with a file's name is that file, for the next."""
    if page.name == "trl.md":
        pytest.importorskip("trl")
    if page.name == "add-a-kernel.md":
        pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(blocks(page, "python")):
        code = code.replace("/tmp/", f"{tmp_path}/").replace(SMOLLM, str(tiny_teacher))
        if name := re.match(r"# (\w+\.py)\n", code):
            Path(name[1]).write_text(code, encoding="utf-8")
        elif re.search(r"torch\.distributed|environ", code):
            run_in_a_process_of_its_own(code)
        else:
            exec(compile(code, f"{page.name}, block {number}", "exec"), {"__name__": "__main__"})


def run_in_a_process_of_its_own(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def commands() -> list[tuple[Path, str]]:
    return [
        (page, line)
        for page in PAGES
        if page.name not in RUN_ELSEWHERE
        for block in blocks(page, "bash")
        for line in block.splitlines()
        if line.strip()
    ]


def test_every_command_is_of_a_kind_that_is_run_here():
    for page, line in commands():
        kinds = ("plad-fast ", "python -m plad_fast.kernels.aot ")
        assert line.startswith(kinds), f"{page.name}: no test runs: {line}"


def test_the_commands_of_the_api_page(tiny_teacher, endpoint, tmp_path, monkeypatch, capsys):
    """In their order, since each uses what the one before made."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}."} for i in range(24)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for page, line in commands() if page.name == "api-teacher.md"]
    assert len(lines) == 3
    for line in lines:
        words = [str(tiny_teacher) if word == SMOLLM else word for word in shlex.split(line)[1:]]
        assert main([*words, *EXTRA[words[0]]]) == 0, capsys.readouterr().err
    assert Path("runs/judged/report.html").is_file()
    assert Path("runs/probe/pairs.jsonl").read_text().count("\n") <= 8


def test_the_kernel_of_the_page_compiles(tmp_path):
    pytest.importorskip("triton")
    (line,) = [line for page, line in commands() if page.name == "add-a-kernel.md"]
    (tmp_path / "is_argmax.py").write_text(blocks(DOCS / "add-a-kernel.md", "python")[0])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is_argmax" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
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


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_exist(page):
    pattern = r"`((?:tests|benchmarks|plad_fast|kernels|examples|docs)/[\w./-]+)`"
    for name in re.findall(pattern, page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "README.md").read_text("utf-8")))
    present = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} - {"README.md"}
    assert linked == present


def named_tests() -> list[str]:
    text = (DOCS / "features.md").read_text("utf-8")
    return re.findall(r"`(test_\w+\.py(?:::\w+)+)`", text)


def test_the_feature_table_names_tests_that_exist():
    found = named_tests()
    assert len(found) > 30
    for name in found:
        file, *path = name.split("::")
        node: ast.Module | ast.ClassDef | ast.FunctionDef
        node = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        for part in path:
            inside = {n.name: n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
            assert part in inside, name
            node = inside[part]
        assert isinstance(node, ast.FunctionDef), name


def test_a_feature_of_ours_names_its_test():
    """Only what is missing goes without one."""
    rows = re.findall(r"^\| (?!feature|-)(.+) \|$", (DOCS / "features.md").read_text("utf-8"), re.M)
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert len(cells) == 6, row
        if not cells[4].startswith(("no", "none")):
            assert cells[5].startswith("`test_"), row


def test_the_reference_is_up_to_date():
    pytest.importorskip("trl")
    done = subprocess.run(
        [sys.executable, "docs/make_reference.py", "--check"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("plad_fast.ops.logprobs", "linear_sequence_logprobs"),
        ("plad_fast.ops.preference_losses", "fused_linear_preference_loss"),
        ("plad_fast.ops.vocab_parallel.api", "vocab_parallel_sequence_logprobs"),
        ("plad_fast.models.head", "causal_lm_logprobs"),
    ],
)
def test_the_reference_has_every_parameter(module, name):
    function = getattr(importlib.import_module(module), name)
    pages = "".join(p.read_text("utf-8") for p in (DOCS / "reference").glob("*.md"))
    section = pages.partition(f"\n### {name}\n")[2].partition("\n##")[0]
    items = re.findall(r"^- `([^`]+)`: ", section, flags=re.MULTILINE)
    documented = {part.strip("* ") for item in items for part in item.split(",")}
    assert documented >= set(inspect.signature(function).parameters)
