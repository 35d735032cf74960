"""The table in docs/supported-models.md, written from the expectations of the tests.

python docs/make_architectures.py            # or with --check: exit status 1 if it is out of date,
                                             # and the lines that differ
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "supported-models.md"
sys.path.insert(0, str(ROOT))

from tests.support.architectures import CAUSAL, MORE_THAN_TEXT, TWO_HALVES, architectures, result  # noqa: E402

_TITLES = {
    CAUSAL: "Causal language models",
    TWO_HALVES: "Encoder-decoder models",
    MORE_THAN_TEXT: "Models of text and more, on text",
}
_INTRODUCTION = """\
# Supported models

Every language-model class of transformers {version}, and how the fused loss handles it. For each
class a small random model is built, with scales and softcaps that matter, and its log-probabilities
are compared with those of the model's own logits, one sequence at a time. Sums over a response may
differ by 1e-3 nats plus a relative 1e-4. Beyond the first length of LongRoPE (4096 tokens of Phi-3)
transformers gives all rows of a batch other rotary frequencies; trainer and scores warn of that.

* **right, prompts shared**: equal in padded rows, and in packed rows that hold every prompt once.
* **right, rows padded**: equal in padded rows; `prepare` detects that the model cannot share
  prompts, and `layout="auto"` takes padded rows.
* **right, one encoding a prompt**: equal, with one pass of the encoder for all responses to a
  prompt.
* **refused**: `check_architecture`, which the trainer calls first, raises a `UsageError` with the
  reason.
* **not tried**: no small model was built. The same checks run when such a model is trained.

{counts}

The expectations are in tests/support/architectures.py and are tested by
tests/models/test_architectures.py; this page is written by docs/make_architectures.py.
"""


def page() -> str:
    """The page as it should be."""
    found = [(architecture, *result(architecture)) for architecture in architectures()]
    totals = Counter(text for _, text, _ in found)
    counts = "\n".join(
        ["| result | architectures |", "| --- | --- |"]
        + [f"| {text} | {number} |" for text, number in totals.most_common()]
    )
    parts = [_INTRODUCTION.format(version=transformers.__version__, counts=counts)]
    for kind, title in _TITLES.items():
        lines = [f"## {title}", "", "| architecture | class | result | note |"]
        lines.append("| --- | --- | --- | --- |")
        for architecture, text, note in found:
            if architecture.kind == kind:
                names = f"| {architecture.model_type} | `{architecture.class_name}`"
                lines.append(f"{names} | {text} | {note} |".replace("|  |", "| |"))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def require_its_transformers(otherwise: Callable[[str], object]) -> None:
    """Calls `otherwise` with the reason if the page is about another version of transformers."""
    if f"transformers {transformers.__version__}," not in PAGE.read_text(encoding="utf-8"):
        otherwise(f"{PAGE.name} is not about transformers {transformers.__version__}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    difference = list(
        difflib.unified_diff(
            PAGE.read_text(encoding="utf-8").splitlines(),
            page().splitlines(),
            str(PAGE.relative_to(ROOT)),
            "as it should be",
            lineterm="",
            n=0,
        )
    )
    if difference:
        print("\n".join(difference))
        print("\nrun docs/make_architectures.py to write it")
    return int(bool(difference))


if __name__ == "__main__":
    sys.exit(main())
