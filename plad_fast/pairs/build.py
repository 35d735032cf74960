"""From two models' answers to preference pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plad_fast.chat import Content
from plad_fast.errors import UsageError
from plad_fast.pairs.filters import drop_reason
from plad_fast.pairs.prompts import Prompt, as_messages, require_unique_ids
from plad_fast.pairs.teachers import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADVICE = {
    "missing": "let both models answer the same prompts",
    "empty": "check that the prompts fit the models' chat template",
    "truncated": "raise max_new_tokens",
    "identical": "give the student another seed or a higher temperature, or take a smaller student",
}


@dataclass(frozen=True)
class PairReport:
    """How many prompts gave a pair, and why the others did not. `str()` gives one line."""

    total: int
    identical: int = 0
    empty: int = 0
    truncated: int = 0
    missing: int = 0

    @property
    def kept(self) -> int:
        """Prompts with a pair."""
        return self.total - sum(self.dropped.values())

    @property
    def dropped(self) -> dict[str, int]:
        """Prompts without a pair, by reason (see `filters.drop_reason`)."""
        return {
            "identical": self.identical,
            "empty": self.empty,
            "truncated": self.truncated,
            "missing": self.missing,
        }

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items() if n)
        return f"kept {self.kept} of {self.total} prompts" + (f": {reasons}" if reasons else "")


def build_pairs(
    prompts: Sequence[Prompt],
    teacher_answers: Mapping[str, Answer],
    student_answers: Mapping[str, Answer],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str = "teacher > student",
) -> tuple[list[dict[str, Any]], PairReport]:
    """Pairs in the standard preference format, the teacher's answer as the chosen one.

    A row has `prompt`, `chosen`, `rejected`, `id`, `source`, and `reference` if the prompt has one.
    Prompt and responses are chat messages if the prompt is, or if the tokenizer has a chat
    template; else they are text, and the responses start with a space where the prompt does not
    end in white space, so that their sum reads as a model would write it.

    Args:
        prompts: with ids of their own.
        teacher_answers: by prompt id.
        student_answers: by prompt id.
        tokenizer: of the student that is to be trained.
        source: written into every row.

    Raises:
        UsageError: two prompts have the same id, or no pair is left.
    """
    require_unique_ids(prompts)
    pairs = []
    dropped: Counter[str] = Counter()
    for prompt in prompts:
        teacher, student = teacher_answers.get(prompt.id), student_answers.get(prompt.id)
        reason = drop_reason(teacher, student)
        if reason is not None:
            dropped[reason] += 1
            continue
        assert teacher is not None
        assert student is not None
        content = prompt.content if tokenizer is None else as_messages(tokenizer, prompt.content)
        row: dict[str, Any] = {
            "prompt": content,
            "chosen": as_response(content, teacher.text),
            "rejected": as_response(content, student.text),
            "id": prompt.id,
            "source": source,
        }
        if prompt.reference is not None:
            row["reference"] = prompt.reference
        pairs.append(row)
    report = PairReport(len(prompts), **dropped)
    if not pairs:
        raise UsageError(f"no pair is left: {report}; {_advice(report)}")
    return pairs, report


def as_response(prompt: Content, text: str) -> Content:
    """An answer in the form of its prompt: an assistant message, or text that may follow text."""
    text = text.strip()
    if not isinstance(prompt, str):
        return [{"role": "assistant", "content": text}]
    return text if prompt[-1:].isspace() else f" {text}"


def _advice(report: PairReport) -> str:
    if not report.total:
        return "give at least one prompt"
    reason, _ = max(report.dropped.items(), key=lambda item: item[1])
    return _ADVICE[reason]
