"""Pairs of token ids for the step benchmark, and the roles they play.

P pairs of one prompt, one chosen and one rejected response; `PAIRS_PER_STEP` of them make a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS_PER_STEP = 4
DIALOGSUM_PAIRS = 64
REQUEST = "Summarise this conversation in one sentence:\n\n{dialogue}"
# Tokens of prompt and response of the made-up pairs: as they are, and with --quick.
LENGTHS = {"fixed": (256, 48), "short-prompt": (32, 160)}
QUICK_LENGTHS = {"fixed": (32, 8), "short-prompt": (8, 24)}
KINDS = ("fixed", "dialogsum", "short-prompt")
# Nats by which every pair is active where all of them are.
ALL_ACTIVE_LEAD = 100.0
# Least nats between the hinge and the pair nearest to it; rounding must not move a pair across.
LEAST_GAP = 2.0
QUICK_LEAST_GAP = 1e-3  # a tiny random model tells its pairs apart by little


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def distinct_tokens(self) -> int:
        """The prompt once, and both responses."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    def swapped(self) -> Pair:
        return replace(self, chosen=self.rejected, rejected=self.chosen)


@dataclass(frozen=True)
class StepCase:
    """What is trained on, and how."""

    kind: str  # one of KINDS
    dtype: str = "float32"
    active: float = 1.0
    checkpointing: bool = False
    device: str = "cpu"
    quick: bool = False

    @property
    def learning_rate(self) -> float:
        """1e-6; or too little to move a weight, where training would change who is active."""
        return 1e-6 if self.active == 1 else 1e-12

    def __str__(self) -> str:
        what = {"dialogsum": f"{DIALOGSUM_PAIRS} DialogSum pairs"}.get(self.kind)
        if what is None:
            prompt, response = (QUICK_LENGTHS if self.quick else LENGTHS)[self.kind]
            what = f"prompt {prompt}, responses {response}"
        return (
            f"{self.kind} ({what}; {PAIRS_PER_STEP} pairs a step), {self.dtype}, "
            f"{self.active:.0%} active, gradient checkpointing "
            f"{'on' if self.checkpointing else 'off'}"
        )


def made_pairs(kind: str, vocab: int, *, quick: bool, seed: int = 0) -> list[Pair]:
    """One step of pairs of random ids."""
    prompt, response = (QUICK_LENGTHS if quick else LENGTHS)[kind]
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(vocab, (count,), generator=generator).tolist()

    return [Pair(ids(prompt), ids(response), ids(response)) for _ in range(PAIRS_PER_STEP)]


def dialogsum_pairs(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, count: int = DIALOGSUM_PAIRS
) -> list[Pair]:
    """The first `count` dialogues of a DialogSum JSONL with their true lengths.

    The chosen response is the reference summary, the rejected one that of the dialogue whose
    summary is nearest in tokens (the next such one in the file).

    Raises:
        ValueError: the file has no such rows, or too few.
    """
    from plad_fast.data.text_ids import TextIds

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    if len(rows) < max(count, 2) or not all({"dialogue", "summary"} <= row.keys() for row in rows):
        raise ValueError(
            f"{path} should have {count} rows or more, each with `dialogue` and `summary`"
        )
    lengths = [
        len(tokenizer(row["summary"], add_special_tokens=False)["input_ids"]) for row in rows
    ]
    pairs = []
    for index, row in enumerate(rows[:count]):
        others = [*range(index + 1, len(rows)), *range(index)]
        other = min(
            (o for o in others if rows[o]["summary"] != row["summary"]),
            key=lambda o: abs(lengths[o] - lengths[index]),
        )
        group = TextIds(tokenizer).encode(
            [{"role": "user", "content": REQUEST.format(dialogue=row["dialogue"])}],
            [row["summary"], rows[other]["summary"]],
            max_length=10**9,
        )
        pairs.append(Pair(group["prompt_ids"], *group["response_ids"]))
    return pairs


def with_active_share(
    pairs: Sequence[Pair],
    margins: Sequence[float],  # s(chosen) - s(rejected) of each pair before training
    share: float,
    *,
    least_gap: float = LEAST_GAP,
) -> tuple[list[Pair], float]:
    """Pairs and a beta at which exactly the share of every step has a gradient.

    A pair is inactive when its chosen response leads by beta or more. Where some are to be
    inactive, they are those of a step that the model tells apart best, and responses trade roles
    where they have to: the one that the model likes better is the chosen one of an inactive pair
    and the rejected one of an active pair. Lengths, tokens and work stay what they were.

    Raises:
        ValueError: the share is not a whole number of a step's pairs, or a pair too near to the
            hinge.
    """
    active = share * PAIRS_PER_STEP
    if not 0 < share <= 1 or active % 1:
        raise ValueError(
            f"an active share of {share} is not a whole number of {PAIRS_PER_STEP} pairs"
        )
    if share == 1:
        return list(pairs), max(margins) + ALL_ACTIVE_LEAD
    roles = list(pairs)
    leads = []
    for start in range(0, len(pairs), PAIRS_PER_STEP):
        step = range(start, start + PAIRS_PER_STEP)
        by_distance = sorted(step, key=lambda index: abs(margins[index]))
        for place, index in enumerate(by_distance):
            is_active = place < active
            if is_active == (margins[index] > 0):
                roles[index] = pairs[index].swapped()
            if not is_active:
                leads.append(abs(margins[index]))
    # Half of the smallest lead is as far from the nearest inactive pair as can be without beta, a
    # margin, being negative; the active pairs are behind and so at least as far away.
    beta = min(leads) / 2
    if beta < least_gap:
        raise ValueError(
            f"a pair is {beta:.2g} nats from the hinge, which is less than {least_gap}; take other "
            "pairs"
        )
    return roles, beta


def batches(pairs: Sequence[Pair], steps: int) -> Iterator[list[Pair]]:
    """The pairs of each step, from the start again when they are used up."""
    starts = range(0, len(pairs), PAIRS_PER_STEP)
    for start in islice(cycle(starts), steps):
        yield list(pairs[start : start + PAIRS_PER_STEP])


def save(path: Path, pairs: Sequence[Pair], margins: Sequence[float]) -> None:
    path.write_text(json.dumps({"pairs": [asdict(p) for p in pairs], "margins": list(margins)}))


def load(path: Path) -> tuple[list[Pair], list[float]]:
    content = json.loads(path.read_text())
    return [Pair(**pair) for pair in content["pairs"]], content["margins"]
