"""Imports: their cost, what they need, and that they go downward only."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROOMS = [
    {"errors", "kernels"},
    {"checks"},
    {"losses", "data"},
    {"ops"},
    {"models"},
    {"training", "pairs", "integrations"},
    {"evaluation"},
    {"recipe"},
    {"cli"},
    {"__main__"},
]
"""Ground floor first. A room imports from floors below, never from its own floor or from above."""

NOT_FROM = {"ops": {"data"}}
"""A room -> rooms below it that it does without all the same."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = [
    *("transformers", "triton", "datasets", "accelerate", "matplotlib", "rouge_score", "yaml"),
    *("lazy_loader", "jinja2", "scipy", "filelock", "trl"),
]


def test_import_needs_torch_alone():
    """Blocking every other package, the ops import and compute."""
    run(
        f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
import torch, plad_fast, plad_fast.integrations, plad_fast.losses.trl_options
from plad_fast import *
problem = torch.randn(4, 3), torch.randn(5, 3), torch.zeros(4).long(), torch.tensor([0, 2, 4])
assert fused_linear_preference_loss(*problem).loss.isfinite()
"""
    )


def test_import_takes_no_longer_than_torch():
    """Nothing is loaded before it is used: the package alone adds only its own lines."""
    added = run(
        "import torch, sys; before = set(sys.modules); import plad_fast;"
        "print(sorted(set(sys.modules) - before))"
    )
    assert ast.literal_eval(added) == ["plad_fast"]


def test_help_loads_no_transformers():
    run(
        """
import sys
from plad_fast.cli import main
try:
    main(["distill", "--help"])
except SystemExit:
    pass
assert "transformers" not in sys.modules
"""
    )


def test_exports_exist_and_others_do_not():
    import plad_fast

    for name in [*plad_fast.__all__, "PLaDConfig", "PLaDTrainer", "__version__"]:
        assert getattr(plad_fast, name) is not None
        assert name in dir(plad_fast)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        plad_fast.nothing  # noqa: B018


@pytest.mark.parametrize(
    "room", ["data", "evaluation", "losses", "models", "ops", "pairs", "recipe", "training"]
)
def test_doors(room):
    door = importlib.import_module(f"plad_fast.{room}")
    assert len((door.__doc__ or "").strip().splitlines()) >= 1
    assert all(getattr(door, name) is not None for name in door.__all__)


def modules() -> dict[str, Path]:
    """By dotted name; a package by the name of its folder."""
    found = {}
    for top, prefix in ((ROOT / "plad_fast", "plad_fast"), (ROOT / "kernels", "plad_fast.kernels")):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a module imports, and whether it does so as soon as it is loaded."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plad_fast"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module), node.col_offset == 0


def floor(name: str) -> int:
    room = name.split(".")[1]
    return next(i for i, rooms in enumerate(ROOMS) if room in rooms)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "plad_fast"])
def test_imports_go_downward(name):
    room = name.split(".")[1]
    for target, _ in imported(name):
        if target == "plad_fast" or target.split(".")[1] == room:
            continue
        assert floor(target) < floor(name), f"{name} imports {target}, which is not below it"
        assert target.split(".")[1] not in NOT_FROM.get(room, ())


def test_no_circles():
    edges = {
        name: {target for target, at_once in imported(name) if at_once and target != name}
        for name in MODULES
    }
    while leaves := {name for name, targets in edges.items() if not targets}:
        edges = {name: targets - leaves for name, targets in edges.items() if name not in leaves}
    assert not edges


def test_names_of_files():
    """Rooms and files by name: nothing lies outside of a room, nothing hides."""
    flat = {path.name for path in (ROOT / "plad_fast").iterdir() if path.name != "__pycache__"}
    rooms = {"data", "evaluation", "losses", "models", "ops", "pairs", "recipe", "training"}
    files = {"__init__.py", "__main__.py", "checks.py", "cli.py", "errors.py", "py.typed"}
    assert flat == rooms | files | {"integrations"}
    hidden = [name for name in MODULES if name.rsplit(".", 1)[-1].startswith("_")]
    assert all(name.endswith("__main__") for name in hidden)


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                top = name.split(".")[0]
                ours = name.startswith("plad_fast.kernels")
                assert ours or top in {"torch", "triton", *sys.stdlib_module_names}, name
