"""The settings in `recipes/` as a whole run each, of tiny models and a few prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("openai")

from plad_fast.cli import main
from plad_fast.recipe.settings_file import load_settings
from tests.support.fault_server import FaultServer, Step

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("no_plots")

# What the size of a test needs, and what is not on this machine.
SMALL = [
    *("--held-out", "4", "--validation", "3", "--max-new-tokens", "40", "--max-length", "512"),
    *("--sft-batch-size", "2", "--batch-size", "2", "--sft-epochs", "1", "--epochs", "1"),
    *("--saves-per-stage", "1", "--precision", "float32"),
]


@pytest.mark.parametrize(
    "recipe",
    [
        path if path.stem == "orpo-distill" else pytest.param(path, marks=pytest.mark.slow)
        for path in RECIPES
    ],
    ids=lambda path: path.stem,
)
def test_a_recipe_runs(recipe, tiny_teacher, tmp_path):
    settings = yaml.safe_load(recipe.read_text("utf-8"))
    rows = [{"prompt": f"say {i}", "text": f"say {i}", "summary": f"{i}"} for i in range(24)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    teacher = settings.get("teacher", "column:summary")
    command = "tune" if "trials" in settings else "distill"
    with FaultServer(lambda *_: Step()) as server:
        typed = [command, "--config", str(recipe), "--prompts", str(prompts), *SMALL]
        typed += ["--student", str(tiny_teacher), "--teacher", teacher, "--output-dir", str(run)]
        typed += ["--base-url", server.url] if teacher.startswith("openai:") else []
        typed += ["--micro-batch-size", "2"] if "micro_batch_size" in settings else []
        typed += ["--trials", "1"] if command == "tune" else []
        assert main(typed) == 0
    kept = json.loads((run / "config.json").read_text())
    assert kept["loss"] == settings.get("loss", "plad_ranking")
    assert (run / "pairs" / "train.jsonl").exists() or command == "tune"
    assert (run / ("tune/best.yaml" if command == "tune" else "plad")).exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_is_run(recipe):
    """Its command names it, and reads every setting."""
    text = recipe.read_text("utf-8")
    (typed,) = [line for line in text.splitlines() if f"--config recipes/{recipe.name}" in line]
    command = typed.split("plad-fast ")[-1].split("plad_fast ")[-1].split()[0]
    known = list(yaml.safe_load(text))
    assert load_settings(str(recipe), known, command=command, raw=["search"]).keys() == set(known)
