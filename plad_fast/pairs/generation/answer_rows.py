"""Answers as rows of a store: their ids, those that are missing, and failures beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from plad_fast.data.prompts import Prompt, require_unique_ids
from plad_fast.data.store import Row, RowStore
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.reasoning import with_reasoning
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure

logger = logging.getLogger(__name__)


class NoAnswersError(UsageError):
    """A model answered no prompt."""


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


def all_wanted(prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, tuple[Prompt, int]]:
    """Row id -> prompt and number of the sample; raises UsageError for repeated ids of prompts."""
    require_unique_ids(prompts)
    return {row_id(p.id, k): (p, k) for p in prompts for k in range(sampling.n)}


def missing_from(store: RowStore, wanted: Mapping[str, tuple[Prompt, int]]) -> list[str]:
    """Ids of the rows that the store lacks.

    Raises UsageError for a stored row that is no answer, and where the store has an answer to
    another prompt.
    """
    store.require(_is_answer)
    digests = {prompt.id: prompt.digest for prompt, _ in wanted.values()}
    for key, (prompt, _) in wanted.items():
        if key in store.rows and store.rows[key]["prompt"] != digests[prompt.id]:
            raise UsageError(
                f"prompt {prompt.id!r} is not the one that {store.path} has an answer to; choose "
                "another output folder, or --overwrite"
            )
    return [key for key in wanted if key not in store.rows]


def collect(
    prompts: Sequence[Prompt],
    store: RowStore,
    sampling: Sampling,
    failures: Mapping[str, Failure],
    reasoning: str,
) -> Answered:
    """The answers to these prompts, as `with_reasoning` has them; a failure counts where there is
    none."""
    answered = Answered({}, [])
    for key, (prompt, sample) in all_wanted(prompts, sampling).items():
        if (row := store.rows.get(key)) is not None:
            said = (row["text"], row["finish_reason"], row["n_tokens"])
            calls = tuple(row.get("tool_calls", ()))
            answer = Answer(prompt.id, *said, sample, row.get("reasoning", ""), tool_calls=calls)
            told = with_reasoning(answer, reasoning)
            answered.answers.setdefault(prompt.id, []).append(told)
        elif key in failures:
            answered.failures.append(failures[key])
    return answered


def report_failures(answered: Answered, store_path: Path, name: str) -> None:
    """Logs that there are some, and lists them beside the store.

    Raises UsageError where there is nothing else.
    """
    path = store_path.with_suffix(".failed.jsonl")
    failures = answered.failures
    if not failures:
        path.unlink(missing_ok=True)
        return
    rows = [{"id": f.prompt_id, "sample": f.sample, "reason": f.reason} for f in failures]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    if not answered.answers:
        raise NoAnswersError(f"{name} gave no answer; the first failure: {failures[0].reason}")
    what = f"{name}: {len(failures)} answers could not be had, listed in {path}"
    logger.warning("%s; the first reason: %s", what, failures[0].reason)


def batch_record(store_path: Path) -> Path:
    """Where the batches under way for a store are recorded."""
    return store_path.with_suffix(".batches.json")


def row_id(prompt_id: str, sample: int) -> str:
    """A row's id in the store: the prompt's, with a tab and the sample's number from 1 on.

    Ids of pairs hold tabs themselves, so these are doubled.
    """
    prompt_id = prompt_id.replace("\t", "\t\t")
    return f"{prompt_id}\t{sample}" if sample else prompt_id


def _is_answer(row: Row) -> bool:
    types = {"prompt": str, "text": str, "n_tokens": int, "sample": int, "reasoning": str}
    types["tool_calls"] = list
    given = {"sample": 0, "reasoning": "", "tool_calls": [], **row}
    fits = all(isinstance(given.get(name), kind) for name, kind in types.items())
    return fits and row.get("finish_reason") in ("stop", "length")


def to_row(answer: Answer, prompt_digest: str) -> Row:
    return {
        "id": row_id(answer.prompt_id, answer.sample),
        "prompt": prompt_digest,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "n_tokens": answer.n_tokens,
        **({"sample": answer.sample} if answer.sample else {}),
        **({"reasoning": answer.reasoning} if answer.reasoning else {}),
        **({"tool_calls": [*answer.tool_calls]} if answer.tool_calls else {}),
    }
