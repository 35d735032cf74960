"""What an import costs and needs, and that imports go downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = [
    {"errors", "logit_spec", "reference", "kernels", "wrappers"},
    {"_packages", "_records", "_page", "_headline", "_load_errors", "_adapters", "_token_limits"},
    {"bins", "dropout", "_template_options"},
    {"products", "losses", "segments", "softmax_rows", "validation", "chat", "_tables"},
    {"objective", "trl_options", "intervals", "first_order"},
    {"_vocab_group", "_vocab_rows"},
    {"backend"},
    {"workspace", "stored_logits", "dispatch"},
    {"onepass", "kernel_workspace", "_vocab_workspace"},
    {"chunked", "triton_backend"},
    {"autograd", "preference_autograd"},
    {"ops"},
    {"fused"},
    {"_vocab_autograd"},
    {"_vocab_call"},
    {"vocab_parallel"},
    {"_rows", "_row_sets", "_plain_rows", "_devices"},
    {"row_layout", "tokenization"},
    {"packing", "_flash"},
    {"attention", "depth", "students", "training_metrics", "micro_batches"},
    {"adapted_layers", "_tensor_parallel"},
    {"encoder_decoder"},
    {"lm_head"},
    {"head"},
    {"router"},
    {"sharing", "training_config"},
    {"training_data", "training_processes"},
    {"metrics", "_pooled_ranks"},
    {"pairs", "evaluation", "_student_metrics", "_pair_scores", "calibration"},
    {"plots", "calibration_plots", "report", "_results", "_score_files"},
    {"reference_logps"},
    {"training_reference"},
    {"trainer", "integrations"},
    {
        *("recipe", "pair_settings", "run_folder", "stage_folder"),
        *("training", "training_checks", "doctor"),
    },
    {
        "held_out",
        "held_out_samples",
        "_held_out_rows",
        "_report_parts",
        "_recipe_data",
        "recipe_texts",
        "recipe_scoring",
    },
    {"distill"},
    {"stages", "evaluation_stage"},
    {"cli"},
]
"""Ground floor first. A module imports from its own floor and below, never from above."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ["transformers", "triton", "datasets", "accelerate", "matplotlib", "rouge_score", "yaml"]


def test_import_needs_torch_alone():
    """Blocking every other package, the ops import and compute."""
    run(
        f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
import torch, plad_fast
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


def test_exports_exist_and_others_do_not():
    import plad_fast

    for name in [*plad_fast.__all__, "PLaDConfig", "PLaDTrainer", "__version__"]:
        assert getattr(plad_fast, name) is not None
        assert name in dir(plad_fast)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        plad_fast.nothing  # noqa: B018


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted((ROOT / "plad_fast").rglob("*.py")):
        parts = path.relative_to(ROOT / "plad_fast").parts
        if parts != ("__init__.py",):  # the package's own door opens on every floor
            found.append((parts[0].removesuffix(".py"), path))
    return found


def floor(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


@pytest.mark.parametrize(
    ("name", "path"), modules(), ids=lambda x: x.stem if isinstance(x, Path) else ""
)
def test_imports_go_downward(name, path):
    mine = floor(name)
    assert mine is not None, f"plad_fast.{name} has no floor: add it to LAYERS"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plad_fast."):
            target = node.module.split(".")[1]
            theirs = floor(target)
            assert theirs is not None, f"plad_fast.{target} has no floor: add it to LAYERS"
            assert theirs <= mine, f"{path.name} imports plad_fast.{target} from above"


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
