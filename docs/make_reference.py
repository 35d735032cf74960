"""Writes docs/reference/*.md from the docstrings and signatures of the public names.

python docs/make_reference.py            # or: make docs
python docs/make_reference.py --check    # exit status 1 if a page is not what it would write

Signatures are taken from the source: their comments hold the shapes.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

REFERENCE = Path(__file__).parent / "reference"

# Page -> (title, {module: its public names, in the order of the page}).
PAGES: dict[str, tuple[str, dict[str, list[str]]]] = {
    "backend": (
        "The loss as a backend",
        {
            "plad_fast.ops.logprobs": [
                "linear_sequence_logprobs",
                "sequence_logprobs",
                "SequenceLogProbs",
            ],
            "plad_fast.ops.preference_losses": ["fused_linear_preference_loss", "FusedLoss"],
            "plad_fast.losses.objective": ["preference_loss"],
            "plad_fast.ops.vocab_parallel.api": [],
            "plad_fast.losses": ["register_loss", "get_loss", "available", "LossSpec"],
            "plad_fast.errors": ["UsageError"],
        },
    ),
    "models": (
        "Models, rows and batches",
        {
            "plad_fast.models.head": [
                "find_head",
                "LMHead",
                "check_head",
                "backbone_hidden",
                "head_arguments",
                "causal_lm_logprobs",
                "through_head",
            ],
            "plad_fast.models.wrappers": ["call_inside", "unwrap"],
            "plad_fast.models.encoder_decoder": ["decoder_hidden", "is_encoder_decoder"],
            "plad_fast.data.tokenization": ["tokenize_dataset", "encode_group", "encode_prompt"],
            "plad_fast.data.packing": ["PreferenceCollator", "PreferenceBatch", "to_device"],
            "plad_fast.models.sharing": ["prepare"],
            "plad_fast.models.layer_drop": ["drop_layers", "depth"],
            "plad_fast.models.loading": [
                "load_model",
                "load_tokenizer",
                "offline_teacher_path",
            ],
        },
    ),
    "training": (
        "Training",
        {
            "plad_fast.training.trainer": ["PLaDTrainer"],
            "plad_fast.training.config": ["PLaDConfig"],
            "plad_fast.training.train": ["train_model"],
            "plad_fast.training.reference_logps": ["add_reference_logps"],
            "plad_fast.integrations.trl.use": ["use_plad_fast"],
            "plad_fast.losses.trl_options": [
                "translate_dpo",
                "translate_cpo",
                "translate_orpo",
                "translate_kto",
            ],
        },
    ),
    "pairs": (
        "Teachers, scores and pairs",
        {
            "plad_fast.data.prompts": ["Prompt", "load_prompts", "builtin_prompts"],
            "plad_fast.pairs.generation.sampling": ["Sampling"],
            "plad_fast.pairs.generation.text_model": ["TextModel", "Answer", "Failure"],
            "plad_fast.pairs.generation.sources": ["open_teacher", "open_local_model"],
            "plad_fast.pairs.generation.local_model": ["LocalModel"],
            "plad_fast.pairs.generation.endpoint.model": ["EndpointModel"],
            "plad_fast.pairs.generation.answering": [
                "stored_answers",
                "generate_answers",
                "Answered",
            ],
            "plad_fast.pairs.scoring.scorers": ["Scorer", "open_scorer", "score_answers"],
            "plad_fast.pairs.filters": ["PairFilters"],
            "plad_fast.pairs.build": ["build_pairs", "build_answers", "PairReport"],
        },
    ),
    "evaluation": (
        "Evaluation and the recipe",
        {
            "plad_fast.evaluation.compare": ["score_pairs"],
            "plad_fast.evaluation.metrics": [],
            "plad_fast.evaluation.calibration": ["evaluate_calibration", "ScoredSamples"],
            "plad_fast.recipe.distillation": ["distill", "DistillConfig"],
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    stale = []
    for name, (title, modules) in PAGES.items():
        path, text = REFERENCE / f"{name}.md", page(title, modules)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"not up to date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return int(check and bool(stale))


def page(title: str, modules: dict[str, list[str]]) -> str:
    parts = [f"# {title}", "Written by `make docs` from the docstrings."]
    for module_name, names in modules.items():
        module = importlib.import_module(module_name)
        parts += [f"## {module_name}", markdown(inspect.getdoc(module) or "")]
        for name in names or public_names(module):
            parts.append("\n\n".join(entry(name, getattr(module, name))))
    return "\n\n".join(parts) + "\n"


def public_names(module: ModuleType) -> list[str]:
    """Functions and classes that a module defines itself, in their order."""
    own = [
        (inspect.getsourcelines(value)[1], name)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        if inspect.isfunction(value) or inspect.isclass(value)
    ]
    return [name for _, name in sorted(own)]


def entry(name: str, value: object) -> Iterator[str]:
    """A function or class: signature, docstring, and what a class has in public."""
    node = definition(value)
    yield f"### {name}"
    yield f"```text\n{signature(value, node)}\n```"
    yield markdown(own_docstring(node))
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if not isinstance(member, ast.FunctionDef) or member.name.startswith("_"):
                continue
            if documented := own_docstring(member):
                yield f"#### {name}.{member.name}"
                yield f"```text\n{signature(value, member)}\n```"
                yield markdown(documented)


def definition(value: object) -> ast.FunctionDef | ast.ClassDef:
    source = textwrap.dedent(inspect.getsource(value))  # type: ignore[arg-type]
    node = ast.parse(source).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef)), value
    return node


def own_docstring(node: ast.FunctionDef | ast.ClassDef) -> str:
    return ast.get_docstring(node) or ""


def signature(value: object, node: ast.FunctionDef | ast.ClassDef) -> str:
    """The lines of the source up to the body; of a dataclass or protocol its fields too."""
    lines = textwrap.dedent(inspect.getsource(value)).splitlines()  # type: ignore[arg-type]
    start, end = node.lineno - 1, node.body[0].lineno - 1
    if isinstance(node, ast.FunctionDef):
        return textwrap.dedent("\n".join(lines[start:end])).rstrip(":")
    fields = [member for member in node.body if isinstance(member, ast.AnnAssign)]
    documented = [lines[m.lineno - 1 : _end_with_docstring(node, m)] for m in fields]
    head = "\n".join(lines[start:end]).rstrip(":")
    return "\n".join([head, *(line for field in documented for line in field)])


def _end_with_docstring(node: ast.ClassDef, field: ast.AnnAssign) -> int:
    """The last line of a field, or of the text that stands below it."""
    following = node.body[node.body.index(field) + 1 :][:1]
    text = following and isinstance(following[0], ast.Expr)
    return int((following[0] if text else field).end_lineno or field.lineno)


_SECTION = re.compile(r"^(Args|Returns|Raises|Yields):\s*$")
_ITEM = re.compile(r"^ {4}(?! )(\*{0,2}\w[\w, `*.]*): (.*)$")
_NAMES = re.compile(r"^ {4}(?! )[\w, `*.]+,$")


def markdown(docstring: str) -> str:
    """Sections and their items as lists; all else stays as it is."""
    lines: list[str] = []
    in_section, names = False, ""
    for line in docstring.splitlines():
        if names:
            line, names = f"{names} {line.strip()}", ""
        if in_section and _NAMES.match(line):  # an item whose names go on in the next line
            names = line
            continue
        if _SECTION.match(line):
            lines += [f"**{line.strip().rstrip(':')}**", ""]
            in_section = True
        elif in_section and (item := _ITEM.match(line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif in_section and line.startswith("    "):
            lines.append(f"  {line.strip()}" if lines[-1].startswith(("- ", "  ")) else line[4:])
        else:
            in_section = in_section and not line
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
