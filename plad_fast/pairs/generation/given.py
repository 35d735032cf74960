"""Answers that need no model: those in a column of the data, and those of any Python function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from plad_fast.data.chat import Content, is_blank
from plad_fast.data.prompts import Prompt, load_prompts
from plad_fast.data.tables import read_table
from plad_fast.data.unicode import mend
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.secrets import one_line
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from plad_fast.pairs.generation.thoughts import watched


def column_answers(
    source: str,
    column: str,
    *,
    prompt_column: str | None = None,
    prompt_template: str | None = None,
    split: str = "train",
) -> dict[str, str | None]:
    """The texts in a column, by the ids that `load_prompts` gives the prompts of the same data.

    Args:
        source, prompt_column, prompt_template, split: as `load_prompts` got them.
        column: of texts; null where there is none.

    Raises:
        UsageError: as `load_prompts`, or there is no such column.
    """
    table = read_table(source, split)
    if column not in table.columns:
        raise UsageError(
            f"{source} has no column {column!r} to take answers from; it has "
            f"{', '.join(map(repr, table.columns))}"
        )
    prompts = load_prompts(
        source,
        prompt_column=prompt_column,
        prompt_template=prompt_template,
        reference_column=column,
        split=split,
    )
    return {prompt.id: prompt.reference for prompt in prompts}


class ColumnModel:
    """Answers that exist already.

    Args:
        answers: prompt id -> its answer, or None.
        name: for progress and messages.
    """

    def __init__(self, answers: Mapping[str, str | None], name: str) -> None:
        self.answers = answers
        self.name = name

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[list[Answer | Failure]]:
        """Yields all answers at once; one that is missing or blank is a failure.

        Raises:
            UsageError: several answers to a prompt are wanted.
        """
        if sampling.n > 1:
            raise UsageError(
                f"{self.name} holds one answer to a prompt, and {sampling.n} are wanted; ask for "
                "one, or choose another teacher"
            )
        return watched(self.name, [[self._answer(prompt.id) for prompt in prompts]])

    def _answer(self, prompt_id: str) -> Answer | Failure:
        text = mend(self.answers.get(prompt_id) or "").strip()
        if is_blank(text):
            return Failure(prompt_id, f"{self.name} has no answer to it")
        return Answer(prompt_id, text, "stop", 0)


class CallableModel:
    """Any Python function as a source of text.

    Args:
        function: takes a prompt's content, text or chat messages, and returns the answer; or, if
            `batch_size` is given, takes a list of them and returns a list. It is called anew for
            every sample, and does its own sampling.
        name: for progress and messages.
        batch_size: most prompts in a call; None for a function of one.
    """

    def __init__(
        self, function: Callable[[Any], Any], name: str, *, batch_size: int | None = None
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        self.function = function
        self.name = name
        self.batch_size = batch_size

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[list[Answer | Failure]]:
        """Yields the answers of one call after the other.

        An exception is the failure of the call's prompts, with its message as the reason; so is
        what is no text or blank. Ctrl-C ends it as usual.
        """
        return self.generate_samples([(p, k) for p in prompts for k in range(sampling.n)], sampling)

    def generate_samples(
        self, wanted: Sequence[tuple[Prompt, int]], sampling: Sampling
    ) -> Iterator[list[Answer | Failure]]:
        """As `generate`, of each prompt the samples of these numbers alone."""
        size = self.batch_size or 1
        starts = range(0, len(wanted), size)
        return watched(self.name, (self._call(wanted[i : i + size]) for i in starts))

    def _call(self, asked: Sequence[tuple[Prompt, int]]) -> list[Answer | Failure]:
        contents: list[Content] = [prompt.content for prompt, _ in asked]
        try:
            if self.batch_size is None:
                texts = [self.function(contents[0])]
            else:
                texts = list(self.function(contents))
                if len(texts) != len(asked):
                    raise ValueError(f"{len(texts)} answers to {len(asked)} prompts")
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            return [Failure(prompt.id, reason, sample) for prompt, sample in asked]
        return [
            _as_answer(text, prompt.id, sample)
            for text, (prompt, sample) in zip(texts, asked, strict=True)
        ]


def _as_answer(text: Any, prompt_id: str, sample: int) -> Answer | Failure:
    if text is None or (isinstance(text, str) and is_blank(text)):
        return Failure(prompt_id, "the function returned no text", sample)
    if not isinstance(text, str):
        return Failure(prompt_id, f"the function returned a {type(text).__name__}", sample)
    return Answer(prompt_id, mend(text).strip(), "stop", 0, sample)
