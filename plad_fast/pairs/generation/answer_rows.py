"""Between a model, prompts and a store: what is missing, what comes, and what failed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from plad_fast.data.prompts import Prompt, content_digest, require_unique_ids
from plad_fast.data.store import RowStore, require_rows
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure, TextModel

logger = logging.getLogger(__name__)

_ENOUGH = 16  # prompts, to see whether the length limit fits their answers

Wanted = Sequence[tuple[Prompt, int]]
"""Prompts and numbers of samples."""


@runtime_checkable
class BySample(Protocol):
    """A TextModel that can be asked for some of a prompt's samples rather than for all."""

    def generate_samples(
        self, wanted: Wanted, sampling: Sampling
    ) -> Iterator[Sequence[Answer | Failure]]: ...


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


def all_wanted(prompts: Iterable[Prompt], sampling: Sampling) -> list[tuple[Prompt, int]]:
    return [(prompt, sample) for prompt in prompts for sample in range(sampling.n)]


def missing_from(
    store: RowStore, prompts: Iterable[Prompt], sampling: Sampling
) -> list[tuple[Prompt, int]]:
    wanted = all_wanted(prompts, sampling)
    return [(prompt, k) for prompt, k in wanted if row_id(prompt.id, k) not in store.done]


def ask(
    model: TextModel,
    wanted: Wanted,
    store: RowStore,
    sampling: Sampling,
    *,
    stored: int = 0,
    progress: bool = True,
    to_the_end: bool = False,
) -> dict[str, Failure]:
    """Stores the answers that are wanted as they come.

    Args:
        stored: answers that were there before, for the bar.
        to_the_end: only answers that end before their limit are of use.

    Returns:
        What failed, by row id.

    Raises:
        UsageError: no answer to the first prompts ended, where it matters.
    """
    from tqdm import tqdm

    digests = {prompt.id: content_digest(prompt.content) for prompt, _ in wanted}
    failures: dict[str, Failure] = {}
    known = not (to_the_end and wanted) or _check_limit(model.name, store, sampling)
    with tqdm(
        total=stored + len(wanted),
        initial=stored,
        desc=model.name,
        unit="prompt" if sampling.n == 1 else "answer",
        disable=not progress,
    ) as bar:
        for batch in _generate(model, wanted, sampling):
            answers = [item for item in batch if isinstance(item, Answer)]
            new = [a for a in answers if row_id(a.prompt_id, a.sample) not in store.done]
            store.append([_to_row(answer, digests[answer.prompt_id]) for answer in new])
            for item in batch:
                if isinstance(item, Failure):
                    failures[row_id(item.prompt_id, item.sample)] = item
            bar.update(len(new))
            known = known or _check_limit(model.name, store, sampling)
    return failures


def _check_limit(name: str, store: RowStore, sampling: Sampling) -> bool:
    """Whether enough prompts are answered to see if answers fit their limit.

    Raises:
        UsageError: not one of them is answered to the end.
    """
    finished: dict[str, bool] = {}
    for key, row in store.rows.items():
        prompt = key.removesuffix(f"\t{row['sample']}") if row.get("sample") else key
        finished[prompt] = finished.get(prompt, False) or row["finish_reason"] != "length"
    count, cut = len(finished), len(finished) - sum(finished.values())
    if count < _ENOUGH:
        return False
    limit = f"max_new_tokens={sampling.max_new_tokens}"
    if cut == count:
        raise UsageError(
            f"{name}: the answers to the first {count} prompts are all cut off at {limit}, and "
            "none is of use; raise --max-new-tokens, or ask for short answers. What is stored "
            "was made with other settings then: choose another folder, or pass --overwrite"
        )
    if cut > count / 2:
        logger.warning(
            "%s: to %d of the first %d prompts no answer ended within %s, and they make no pairs; "
            "interrupt and raise --max-new-tokens if that is not meant",
            name,
            cut,
            count,
            limit,
        )
    return True


def _generate(
    model: TextModel, wanted: Wanted, sampling: Sampling
) -> Iterator[Sequence[Answer | Failure]]:
    if not wanted:
        return iter(())
    if isinstance(model, BySample):
        return model.generate_samples(wanted, sampling)
    # Of a prompt that lacks some samples the others come again, and are not stored.
    return model.generate(list({prompt.id: prompt for prompt, _ in wanted}.values()), sampling)


def collect(
    prompts: Iterable[Prompt],
    store: RowStore,
    sampling: Sampling,
    failures: Mapping[str, Failure],
) -> Answered:
    """The answers to these prompts; a failure counts where there is none."""
    answered = Answered({}, [])
    for prompt in prompts:
        ids = [row_id(prompt.id, k) for k in range(sampling.n)]
        if there := [_from_row(store.rows[i], prompt.id) for i in ids if i in store.done]:
            answered.answers[prompt.id] = there
        lost = [i for i in ids if i in failures and i not in store.done]
        answered.failures.extend(failures[i] for i in lost)
    return answered


def report_failures(answered: Answered, store_path: Path, name: str) -> None:
    """Logs that there are some, and lists them beside the store.

    Raises:
        UsageError: nothing but failures.
    """
    path = failure_list(store_path)
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


def failure_list(store_path: Path) -> Path:
    return store_path.with_suffix(".failed.jsonl")


def check_prompts(prompts: Sequence[Prompt], store: RowStore, sampling: Sampling) -> None:
    """Raises UsageError for repeated ids, for a stored row that is no answer, and where the store
    has an answer to another prompt."""
    require_unique_ids(prompts)
    require_rows(store, _is_answer)
    digests = {prompt.id: content_digest(prompt.content) for prompt in prompts}
    for prompt, sample in all_wanted(prompts, sampling):
        row = store.rows.get(row_id(prompt.id, sample))
        if row is not None and row["prompt"] != digests[prompt.id]:
            raise UsageError(
                f"prompt {prompt.id!r} is not the one that {store.path} has an answer to; choose "
                "another output folder, or pass --overwrite to start anew"
            )


def row_id(prompt_id: str, sample: int) -> str:
    """A row's id in the store: the prompt's, with a tab and the sample's number from 1 on.

    Ids of pairs hold tabs themselves, so these are doubled.
    """
    prompt_id = prompt_id.replace("\t", "\t\t")
    return f"{prompt_id}\t{sample}" if sample else prompt_id


def _is_answer(row: Mapping[str, Any]) -> bool:
    texts, numbers = (
        (row.get("prompt"), row.get("text")),
        (row.get("n_tokens"), row.get("sample", 0)),
    )
    return (
        all(isinstance(value, str) for value in texts)
        and all(isinstance(value, int) for value in numbers)
        and row.get("finish_reason") in ("stop", "length")
    )


def _to_row(answer: Answer, prompt_digest: str) -> dict[str, Any]:
    return {
        "id": row_id(answer.prompt_id, answer.sample),
        "prompt": prompt_digest,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "n_tokens": answer.n_tokens,
        **({"sample": answer.sample} if answer.sample else {}),
    }


def _from_row(row: Mapping[str, Any], prompt_id: str) -> Answer:
    sample = row.get("sample", 0)
    return Answer(prompt_id, row["text"], row["finish_reason"], row["n_tokens"], sample)
