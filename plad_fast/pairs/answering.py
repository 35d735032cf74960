"""From prompts to stored answers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plad_fast.errors import UsageError
from plad_fast.pairs.prompts import Prompt, content_digest, require_unique_ids
from plad_fast.pairs.sampling import Sampling
from plad_fast.pairs.store import AnswerStore
from plad_fast.pairs.teachers import Answer, Failure, TextModel

logger = logging.getLogger(__name__)


class Answered(NamedTuple):
    """What a model said, and what it did not."""

    answers: dict[str, list[Answer]]
    """Prompt id -> its answers in the order of their samples; prompts in the order given. One that
    has no answer at all is left out."""

    failures: list[Failure]
    """In the order of the prompts."""

    @property
    def first(self) -> dict[str, Answer]:
        """Prompt id -> its answer with the lowest sample number."""
        return {prompt_id: answers[0] for prompt_id, answers in self.answers.items()}


def generate_answers(
    model: TextModel,
    prompts: Sequence[Prompt],
    store: AnswerStore,
    sampling: Sampling,
    progress: bool = True,
) -> Answered:
    """Asks the model for every answer that the store does not hold, and stores what comes.

    Args:
        model: the teacher or the student.
        prompts: with ids of their own.
        store: written as answers come, so that a killed run can go on.
        sampling: how to draw the answers, `n` to a prompt; for the store's fingerprint to cover
            it is up to you.
        progress: show a bar on the standard error stream.

    Returns:
        The answers to these prompts. Failures are logged, and listed with their reasons beside the
        store, in a file that ends in `.failed.jsonl`; another run asks for them again.

    Raises:
        UsageError: two prompts have the same id, a prompt has another content than when its answer
            was stored, the model cannot answer, or no answer came at all.
    """
    from tqdm import tqdm

    digests = _checked_digests(prompts, store)
    wanted = range(sampling.n)
    pending = [
        prompt for prompt in prompts if any(_key(prompt.id, k) not in store.done for k in wanted)
    ]
    failures: dict[str, Failure] = {}
    with tqdm(
        total=len(prompts) * sampling.n,
        initial=sum(_key(p.id, k) in store.done for p in prompts for k in wanted),
        desc=model.name,
        unit="prompt" if sampling.n == 1 else "answer",
        disable=not progress,
    ) as bar:
        for batch in model.generate(pending, sampling) if pending else ():
            answers = [item for item in batch if isinstance(item, Answer)]
            new = [a for a in answers if _key(a.prompt_id, a.sample) not in store.done]
            store.append([_to_row(answer, digests[answer.prompt_id]) for answer in new])
            for item in batch:
                if isinstance(item, Failure):
                    failures[_key(item.prompt_id, item.sample)] = item
            bar.update(len(new))
    answered = _collect(prompts, store, sampling, failures)
    _report_failures(answered, store.path, model.name)
    return answered


def stored_answers(
    load: Callable[[], TextModel],
    prompts: Sequence[Prompt],
    path: str | os.PathLike[str],
    sampling: Sampling,
    *,
    fingerprint: Mapping[str, Any],
    progress: bool = True,
) -> Answered:
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
        if all(_key(p.id, k) in store.done for p in prompts for k in range(sampling.n)):
            return _collect(prompts, store, sampling, {})
        return generate_answers(load(), prompts, store, sampling, progress)


def _collect(
    prompts: Iterable[Prompt],
    store: AnswerStore,
    sampling: Sampling,
    failures: Mapping[str, Failure],
) -> Answered:
    answered = Answered({}, [])
    for prompt in prompts:
        keys = [_key(prompt.id, k) for k in range(sampling.n)]
        if there := [_from_row(store.rows[key], prompt.id) for key in keys if key in store.done]:
            answered.answers[prompt.id] = there
        answered.failures.extend(failures[key] for key in keys if key in failures)
    return answered


def _report_failures(answered: Answered, store_path: Path, name: str) -> None:
    path = store_path.with_suffix(".failed.jsonl")
    failures = answered.failures
    if not failures:
        path.unlink(missing_ok=True)
        return
    rows = [{"id": f.prompt_id, "sample": f.sample, "reason": f.reason} for f in failures]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    if not answered.answers:
        raise UsageError(f"{name} gave no answer; the first failure: {failures[0].reason}")
    logger.warning(
        "%s: %d answers could not be had, listed in %s; the first reason: %s",
        name,
        len(failures),
        path,
        failures[0].reason,
    )


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


def _key(prompt_id: str, sample: int) -> str:
    """A row's id in the store. A tab does not occur in ids that people write."""
    return f"{prompt_id}\t{sample}" if sample else prompt_id


def _to_row(answer: Answer, prompt_digest: str) -> dict[str, Any]:
    return {
        "id": _key(answer.prompt_id, answer.sample),
        "prompt": prompt_digest,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "n_tokens": answer.n_tokens,
        **({"sample": answer.sample} if answer.sample else {}),
    }


def _from_row(row: Mapping[str, Any], prompt_id: str) -> Answer:
    sample = row.get("sample", 0)
    return Answer(prompt_id, row["text"], row["finish_reason"], row["n_tokens"], sample)
