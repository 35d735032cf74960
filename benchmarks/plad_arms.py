"""The tasks of the PLaD study, and its arms: ways to go on from a fine-tuned student."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.models.loading import load_tokenizer
from plad_fast.recipe.inputs import RunPrompts, write_jsonl

PARTS = ("sft", "pairs", "validation", "held_out")


@dataclass(frozen=True)
class Task:
    """Texts with summaries that people wrote: a teacher of which the text alone is known."""

    name: str
    files: Sequence[Path]
    """One, or one for all parts but the held-out one and another for that."""
    text: str
    """Column of the text, and of its summary or list of summaries, of which the first teaches."""
    summaries: str
    request: str

    def read(self, sizes: Mapping[str, int], longest: int, student: str) -> dict[str, Any]:
        """Part -> rows of `id`, `prompt`, `answer` and `references`, the same for every seed.

        Args:
            sizes: part -> number of rows.
            longest: tokens of a prompt; longer ones are left out.
            student: whose tokens.

        Raises:
            UsageError: a file without these columns, or too few rows.
        """
        tokenizer, of_files = load_tokenizer(student), []
        for number, file in enumerate(self.files):
            found = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            if not found or not found[0].keys() >= {self.text, self.summaries}:
                raise UsageError(f"{file} has no columns {self.text} and {self.summaries}")
            rows = []
            for line, row in enumerate(found):
                prompt = self.request.format(row[self.text])
                summaries = row[self.summaries]
                references = [summaries] if isinstance(summaries, str) else summaries
                if len(tokenizer(prompt)["input_ids"]) <= longest:
                    fields = {"id": f"{number}-{line}", "prompt": prompt, "answer": references[0]}
                    rows.append({**fields, "references": references})
            random.Random(0).shuffle(rows)
            of_files.append(rows)
        *others, last = of_files
        pools = {"held_out": last, **dict.fromkeys(PARTS[:-1], others[0] if others else last)}
        parts = {}
        for part, rows in pools.items():
            if len(rows) < sizes[part]:
                raise UsageError(f"{self.name} has {len(rows)} rows left for {sizes[part]} {part}")
            parts[part] = [rows.pop() for _ in range(sizes[part])]
        return parts


def read_tasks(scitldr: Sequence[Path] | None, dialogsum: Path | None) -> list[Task]:
    tasks = []
    if scitldr:
        request = "{}\n\nWhat does this paper do? Answer in one short sentence."
        tasks.append(Task("SciTLDR", scitldr, "abstract", "tldrs", request))
    if dialogsum:
        request = "{}\n\nWhat is this conversation about? Answer in one short sentence."
        tasks.append(Task("DialogSum", [dialogsum], "dialogue", "summary", request))
    return tasks


def run_prompts(
    parts: Mapping[str, Sequence[Mapping[str, Any]]], file: Path, fine_tune_on: str = "own"
) -> RunPrompts:
    """The prompts of a run on these parts, whose rows become the file that the run reads.

    With `fine_tune_on` "all" in place of "own" both parts to train on are for both.

    Raises:
        UsageError: it is neither.
    """
    if fine_tune_on not in ("own", "all"):
        raise UsageError(f"fine_tune_on must be own or all, not {fine_tune_on!r}")
    write_jsonl(file, [row for part in PARTS for row in parts[part]])
    sft, pairs, validation, held_out = (
        [Prompt(row["id"], row["prompt"], row["answer"]) for row in parts[part]] for part in PARTS
    )
    every = [*sft, *pairs, *validation, *held_out]
    train = [*sft, *pairs]
    if fine_tune_on == "all":
        sft = pairs = train
    return RunPrompts(every, train, held_out, validation, sft, pairs)


@dataclass(frozen=True)
class Arm:
    """One way to go on from the fine-tuned student."""

    name: str
    settings: Mapping[str, Any]
    """Of `DistillConfig`."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """What is searched besides the learning rate, as `plad-fast tune --search`."""


SFT = "SFT"
"""The student before all arms."""
_NLL = {"sft_weight": "0.1,0.3,1"}
_DPO = {"beta": "0.02..1", "sft_weight": "0,0.1,1"}
ARMS = (
    Arm("SFT longer", {"loss": "sft", "select": "teacher"}),
    Arm("PLaD ranking", {"loss": "plad_ranking"}, {"beta": "0.5..16", **_NLL}),
    Arm("PLaD margin", {"loss": "plad_margin"}, {"beta": "5..400", **_NLL}),
    Arm(
        "PLaD listwise",
        {"loss": "plad_listwise", "select": "ranked"},
        {"beta": "0.25..8", **_NLL},
    ),
    Arm("DPO", {"loss": "dpo"}, _DPO),
    Arm(
        "SimPO",
        {"loss": "simpo"},
        {
            "beta": "1..10",
            "loss_args": [f'{{"gamma": {gamma}}}' for gamma in (0.5, 1.0, 2.0)],
            "sft_weight": "0,0.1,1",
        },
    ),
    Arm("IPO", {"loss": "ipo"}, _DPO),
    Arm("SODA", {"loss": "dpo", "rejected_from": "base", "select": "teacher"}, _DPO),
)
BASELINE = ARMS[0].name
