"""From prompts to answers, and from two models' answers to preference pairs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plad_fast.chat import Content
from plad_fast.errors import UsageError
from plad_fast.pairs.filters import drop_reason
from plad_fast.pairs.prompts import Prompt, as_messages, content_digest, require_unique_ids
from plad_fast.pairs.sampling import Sampling
from plad_fast.pairs.store import AnswerStore
from plad_fast.pairs.teachers import Answer, TextModel

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


def generate_answers(
    model: TextModel,
    prompts: Sequence[Prompt],
    store: AnswerStore,
    sampling: Sampling,
    progress: bool = True,
) -> dict[str, Answer]:
    """Asks the model every prompt that the store has no answer to, and stores the answers.

    Args:
        model: the teacher or the student.
        prompts: with ids of their own.
        store: written after every batch, so that a killed run can go on.
        sampling: how to draw the answers; for the store's fingerprint to cover it is up to you.
        progress: show a bar on the standard error stream.

    Returns:
        The answers to these prompts, by prompt id, in the order of the prompts.

    Raises:
        UsageError: two prompts have the same id, a prompt has another content than when its answer
            was stored, or the model cannot answer.
    """
    from tqdm import tqdm

    digests = _checked_digests(prompts, store)
    pending = [prompt for prompt in prompts if prompt.id not in store.done]
    with tqdm(
        total=len(prompts),
        initial=len(prompts) - len(pending),
        desc=model.name,
        unit="prompt",
        disable=not progress,
    ) as bar:
        for answers in model.generate(pending, sampling) if pending else ():
            store.append([_to_row(answer, digests[answer.prompt_id]) for answer in answers])
            bar.update(len(answers))
    return {p.id: _from_row(store.rows[p.id]) for p in prompts if p.id in store.done}


def stored_answers(
    load: Callable[[], TextModel],
    prompts: Sequence[Prompt],
    path: str | os.PathLike[str],
    sampling: Sampling,
    *,
    fingerprint: Mapping[str, Any],
    progress: bool = True,
) -> dict[str, Answer]:
    """Answers from a store, which is filled up first where it lacks some.

    Args:
        load: makes the model; not called if the store has all answers.
        prompts, sampling, progress: see `generate_answers`.
        path: of the store.
        fingerprint: what else the answers depend on, such as the model's name.

    Raises:
        UsageError: as `AnswerStore.open` and `generate_answers`.
    """
    with AnswerStore.open(path, {**fingerprint, **sampling.settings()}) as store:
        _checked_digests(prompts, store)
        if all(prompt.id in store.done for prompt in prompts):
            return {p.id: _from_row(store.rows[p.id]) for p in prompts}
        return generate_answers(load(), prompts, store, sampling, progress)


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


def _checked_digests(prompts: Sequence[Prompt], store: AnswerStore) -> dict[str, str]:
    """Prompt id -> digest; raises UsageError where the store has an answer to another prompt."""
    require_unique_ids(prompts)
    digests = {prompt.id: content_digest(prompt.content) for prompt in prompts}
    for prompt_id, digest in digests.items():
        if prompt_id in store.done and store.rows[prompt_id]["prompt"] != digest:
            raise UsageError(
                f"prompt {prompt_id!r} is not the one that {store.path} has an answer to; choose "
                "another output folder, or pass --overwrite to start anew"
            )
    return digests


def _advice(report: PairReport) -> str:
    if not report.total:
        return "give at least one prompt"
    reason, _ = max(report.dropped.items(), key=lambda item: item[1])
    return _ADVICE[reason]


def _to_row(answer: Answer, prompt_digest: str) -> dict[str, Any]:
    return {
        "id": answer.prompt_id,
        "prompt": prompt_digest,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "n_tokens": answer.n_tokens,
    }


def _from_row(row: Mapping[str, Any]) -> Answer:
    return Answer(row["id"], row["text"], row["finish_reason"], row["n_tokens"])
