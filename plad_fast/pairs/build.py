"""Preference rows of two models' answers, and the report on those that gave none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plad_fast.data.chat import Content, is_blank, written_calls
from plad_fast.data.prompts import Prompt, as_messages, require_unique_ids
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.answer_rows import row_id
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.select import (
    KEEP_ALL,
    NEED_SCORES,
    SELECTIONS,
    Candidate,
    PairFilters,
    Scores,
    common_list_size,
    pairs_of,
    rank_answers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Answers = Mapping[str, Answer] | Mapping[str, Sequence[Answer]]

# Reason why there is no pair -> the step that finds it, and what to do where it is the first one.
_REASONS = {
    "missing": ("answered", "let both models answer the same prompts"),
    "empty": ("answered", "check that the prompts fit the models' chat template"),
    "truncated": (
        "finished",
        "raise max_new_tokens, in another folder: shorter answers are not taken over",
    ),
    "identical": (
        "paired",
        "give the student another seed or a higher temperature, or take a smaller student",
    ),
    "few": ("paired", "lower list_size, or take more samples"),
    "unscored": ("paired", "score all answers that are neither blank nor cut off"),
    "contradicted": ("kept", "take a better teacher or another scorer, or keep such pairs"),
    "close": ("kept", "lower min_gap, or take more samples and the best and worst of them"),
    "uneven": ("kept", "raise max_length_ratio"),
    "repetitive": ("kept", "raise max_repetition, or sample the teacher at another temperature"),
    "similar": ("kept", "raise max_overlap, or sample the student at a higher temperature"),
}


class NoPairsError(UsageError):
    """No row is left; `report` says why."""

    def __init__(self, report: PairReport) -> None:
        dropped = report.dropped
        advice = "give at least one prompt"
        if dropped:
            _, advice = _REASONS[max(dropped, key=dropped.__getitem__)]
        super().__init__(f"no pair is left: {report}; {advice}")
        self.report = report


@dataclass(frozen=True)
class PairReport:
    """How many prompts gave a row, and why the others did not. `str()` gives one line.

    Where a prompt may give several pairs, each of them counts.
    """

    kept: int
    """Prompts with a row, or pairs."""

    drops: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """What was dropped, a record each: `id`, `prompt`, the answers of `teacher` and `student` (a
    text, null where there is none, or a list of several), `reason`, and `of`, whose answer it was
    that was missing, empty or truncated."""

    unit: str = "prompts"

    @property
    def total(self) -> int:
        """Prompts with a row and without, or pairs."""
        return self.kept + sum(self.dropped.values())

    @property
    def dropped(self) -> dict[str, int]:
        """Prompts without a row, or pairs that are none, by reason.

        The reasons are those of `select.drop_reason` and `PairFilters.reason`, and `missing` (there
        is no answer), `unscored` (an answer has no score) and `few` (too few different answers for
        a list). Those that this version does not know are left out.
        """
        counts = Counter(str(drop.get("reason")) for drop in self.drops)
        return {reason: counts[reason] for reason in _REASONS if counts[reason]}

    def funnel(self) -> list[tuple[str, int, dict[str, int]]]:
        """(Step, what is left of `total` after it, what it dropped by reason), from first to last.

        Answered by both, finished by both, different enough for a pair or list, kept by the
        filters.
        """
        left = self.total
        steps: list[tuple[str, int, dict[str, int]]] = [(self.unit, left, {})]
        for step in dict.fromkeys(step for step, _ in _REASONS.values()):
            lost = {why: n for why, n in self.dropped.items() if _REASONS[why][0] == step}
            left -= sum(lost.values())
            steps.append((step, left, lost))
        return steps

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
        return f"kept {self.kept} of {self.total} {self.unit}" + (f": {reasons}" if reasons else "")


def build_pairs(
    prompts: Sequence[Prompt],
    teacher_answers: Answers,
    student_answers: Answers,
    *,
    select: str = "teacher",
    scores: Scores | None = None,
    filters: PairFilters = KEEP_ALL,
    list_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[list[dict[str, Any]], PairReport]:
    """Rows in the standard preference format, in the order of the prompts.

    A row has `prompt`, `chosen`, `rejected`, `id`, `source`, and `reference` and `tools` if the
    prompt has them;
    with scores also `chosen_score` and `rejected_score`; where answers have their reasoning beside
    them also `chosen_reasoning` and `rejected_reasoning`, empty texts where one has none; where
    they say who gave them also `chosen_by` and `rejected_by`. A ranked row has `responses`,
    `scores`, `reasoning` and `by`, best first, in place of those. Prompt and responses are chat
    messages if the prompt is, or if the tokenizer has a chat template; else they are text, and the
    responses start with a space where the prompt does not end in white space, so that their sum
    reads as a model would write it.

    The id is the prompt's, with its tabs doubled; with a tab and the student's sample number behind
    it where that is not 0 and `select` is "all".

    Args:
        prompts: with ids of their own.
        teacher_answers, student_answers: by prompt id, an answer or several in the order of their
            samples.
        select: a key of `select.SELECTIONS`, which says what they mean.
        scores: of the answers, from `scoring.score_answers`. A pair or list with an answer that
            has none is dropped.
        filters: what else to drop.
        list_size: responses in a ranked row; by default as many as keep the most answers: see
            `select.common_list_size`. A prompt with fewer gives no row.
        tokenizer: of the student that is to be trained.

    Raises:
        UsageError: two prompts have the same id, scores are needed and not given, `list_size` or
            `select` is out of range.
        NoPairsError: no row is left.
    """
    require_unique_ids(prompts)
    require_selection(select, has_scores=scores is not None, filters=filters, list_size=list_size)
    given = [(_list(teacher_answers, p.id), _list(student_answers, p.id)) for p in prompts]
    selected: list[list[list[Candidate] | str]]
    if select == "ranked":
        assert scores is not None
        ranked = [rank_answers(*answers, scores, filters) for answers in given]
        size = common_list_size(ranked) if list_size is None else list_size
        selected = [[answers.of_size(size)] for answers in ranked]
    else:
        selected = [pairs_of(*answers, scores, select, filters) for answers in given]
    rows, drops = [], []
    for prompt, (teacher, student), found in zip(prompts, given, selected, strict=True):
        for number, item in enumerate(found):
            if select == "all":  # a pair of one answer of each
                answers = teacher[:1], student[number : number + 1]
                sample = answers[1][0].sample if answers[1] else 0
            else:
                answers, sample = (teacher, student), 0
            named = {"id": row_id(prompt.id, sample)}
            if isinstance(item, str):
                drops.append(named | _drop(prompt, item, *answers))
            else:
                row = _row(prompt, item, tokenizer, is_pair=select != "ranked")
                rows.append(row | prompt.template | named | {"source": SELECTIONS[select]})
                if prompt.reference is not None:
                    rows[-1]["reference"] = prompt.reference
    for column in ("reasoning", "by"):
        _leave_out_empty(rows, column)
    report = PairReport(len(rows), drops, "pairs" if select == "all" else "prompts")
    if not rows:
        raise NoPairsError(report)
    return rows, report


def require_selection(
    select: str, *, has_scores: bool, filters: PairFilters, list_size: int | None
) -> None:
    """Raises UsageError for options of `build_pairs` that do not go together, before any work."""
    if select not in SELECTIONS:
        raise UsageError(f"unknown selection {select!r}; known: {', '.join(SELECTIONS)}")
    if not has_scores and (select in NEED_SCORES or filters.needs_scores):
        what = f"selection {select!r}" if select in NEED_SCORES else "a filter by score"
        raise UsageError(f"{what} needs scores of the answers; choose a scorer")
    if list_size is not None and (
        select != "ranked" or not isinstance(list_size, int) or list_size < 2
    ):
        raise UsageError(
            f"list_size is {list_size!r} with selection {select!r}; give 2 or more, with selection "
            "'ranked' only"
        )


def build_answers(
    prompts: Sequence[Prompt],
    answers: Mapping[str, Answer],
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Rows to fine-tune on, in the form of `build_pairs` without a rejected response.

    Args:
        prompts: one without an answer gives no row.
        answers: by prompt id.
        tokenizer: of the student that is to be trained.
    """
    asked = [p for p in prompts if p.id in answers]
    rows = []
    for prompt in asked:
        content, answer = as_messages(tokenizer, prompt.content), answers[prompt.id]
        chosen = as_response(content, answer.text, answer.tool_calls)
        rows.append({"prompt": content, "chosen": chosen, **prompt.template})
    return rows


def as_response(
    prompt: Content, text: str, tool_calls: Sequence[Mapping[str, Any]] = ()
) -> Content:
    """An answer in the form of its prompt: an assistant message, with the calls that its text ends
    in apart, or text that may follow text."""
    text = text.strip()
    if not isinstance(prompt, str):
        content = text.removesuffix(written_calls(tool_calls)).strip()
        calls = {"tool_calls": list(tool_calls)} if tool_calls else {}
        return [{"role": "assistant", "content": content, **calls}]
    return text if prompt[-1:].isspace() else f" {text}"


def _row(
    prompt: Prompt,
    found: list[Candidate],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    is_pair: bool,
) -> dict[str, Any]:
    content = prompt.content if tokenizer is None else as_messages(tokenizer, prompt.content)
    responses = [as_response(content, c.answer.text, c.answer.tool_calls) for c in found]
    scores = [candidate.score for candidate in found]
    more = {name: [getattr(c.answer, name) for c in found] for name in ("reasoning", "by")}
    if not is_pair:
        return {"prompt": content, "responses": responses, "scores": scores, **more}
    row: dict[str, Any] = {"prompt": content, "chosen": responses[0], "rejected": responses[1]}
    for name, values in more.items():
        row |= {f"chosen_{name}": values[0], f"rejected_{name}": values[1]}
    if not any(map(math.isnan, scores)):
        row |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    return row


def _leave_out_empty(rows: Sequence[dict[str, Any]], column: str) -> None:
    """Removes columns of one kind where no row has anything in them."""
    names = (column, f"chosen_{column}", f"rejected_{column}")
    if not any(any(row.get(name) or ()) for row in rows for name in names):
        for row in rows:
            for name in names:
                row.pop(name, None)


def _drop(
    prompt: Prompt, reason: str, teacher: Sequence[Answer], student: Sequence[Answer]
) -> dict[str, Any]:
    """What gave no row, for `PairReport.drops`."""
    sides = {"teacher": teacher, "student": student}
    record: dict[str, Any] = {"prompt": prompt.content}
    for name, answers in sides.items():
        texts = [answer.text for answer in answers]
        record[name] = texts if len(texts) > 1 else next(iter(texts), None)
    record["reason"] = reason
    faults: dict[str, Callable[[Answer], bool]] = {
        "missing": lambda answer: False,
        "empty": lambda answer: is_blank(answer.text),
        "truncated": lambda answer: answer.finish_reason == "length",
    }
    if reason in faults:
        record["of"] = [name for name, given in sides.items() if all(map(faults[reason], given))]
    return record


def _list(answers: Answers, prompt_id: str) -> Sequence[Answer]:
    given = answers.get(prompt_id, ())
    return [given] if isinstance(given, Answer) else given
