"""Answers that need no model: those in a column of the data, and those of any Python function."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from plad_fast.data.chat import is_blank
from plad_fast.data.prompts import Prompt, load_prompts
from plad_fast.data.tables import read_table
from plad_fast.data.unicode import mend
from plad_fast.errors import UsageError, reported_as
from plad_fast.pairs.generation.endpoint.access import one_line
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure, TextModel, Wanted


def column_answers(
    source: str, column: str, *, split: str = "train", **prompt_options: Any
) -> dict[str, str | None]:
    """The texts in a column, by the ids that `load_prompts` gives the prompts of the same data.

    Args:
        source, split, prompt_options: as `load_prompts` got them: `prompt_column` or
            `prompt_template`.
        column: of texts; null where there is none.

    Raises:
        UsageError: as `load_prompts`, or there is no such column.
    """
    columns = read_table(source, split).columns
    if column not in columns:
        has = ", ".join(map(repr, columns))
        raise UsageError(f"{source} has no column {column!r} to take answers from; it has {has}")
    prompts = load_prompts(source, reference_column=column, split=split, **prompt_options)
    return {prompt.id: prompt.reference for prompt in prompts}


class ColumnModel(TextModel):
    """Answers that exist already.

    Args:
        answers: prompt id -> its answer, or None.
        name: for progress and messages.
    """

    def __init__(self, answers: Mapping[str, str | None], name: str) -> None:
        self.answers = answers
        self.name = name

    def generate_samples(
        self, wanted: Wanted, sampling: Sampling
    ) -> Iterator[list[Answer | Failure]]:
        """Yields all answers at once; one that is missing or blank is a failure.

        Raises:
            UsageError: several answers to a prompt are wanted.
        """
        if sampling.n > 1:
            raise UsageError(
                f"{self.name} holds one answer to a prompt, and {sampling.n} are wanted; take one"
            )
        missing = f"{self.name} has no answer to it"
        return iter([[_answer(self.answers.get(p.id), p, k, missing) for p, k in wanted]])


class CallableModel(TextModel):
    """Any Python function as a source of text.

    An exception is the failure of the call's prompts, with its message as the reason; so is what is
    no text or blank. Ctrl-C ends it as usual.

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

    def generate_samples(
        self, wanted: Wanted, sampling: Sampling
    ) -> Iterator[list[Answer | Failure]]:
        """Yields the answers of one call after the other."""
        size = self.batch_size or 1
        return (self._call(wanted[i : i + size]) for i in range(0, len(wanted), size))

    def _call(self, asked: Wanted) -> list[Answer | Failure]:
        contents = [prompt.content for prompt, _ in asked]
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
        missing = "the function returned no text"
        return [_answer(t, p, k, missing) for t, (p, k) in zip(texts, asked, strict=True)]


def _answer(text: Any, prompt: Prompt, sample: int, missing: str) -> Answer | Failure:
    if not (text is None or isinstance(text, str)):
        return Failure(prompt.id, f"the function returned a {type(text).__name__}", sample)
    text = mend(text or "").strip()
    if is_blank(text):
        return Failure(prompt.id, missing, sample)
    return Answer(prompt.id, text, "stop", 0, sample)


def import_function(path: str) -> Callable[..., Any]:
    """The function `package.module.function`; modules in the working directory are found too."""
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UsageError(f"python:{path} names no module; write python:MODULE.FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    problem = f"cannot import {module_name} for python:{path}; run where it lies, or install it"
    with reported_as(problem, "Python"):
        function = getattr(importlib.import_module(module_name), attribute, None)
    if not callable(function):
        raise UsageError(f"{module_name} has no function {attribute!r}; check python:{path}")
    return function


def source_settings(function: Callable[..., Any]) -> dict[str, str]:
    """A digest of the file that a function, or an object's class, is in, for a fingerprint.

    Empty where it is in none. What it imports from other files is not covered.
    """
    function = inspect.unwrap(function)
    for thing in (function, type(function)):
        with contextlib.suppress(TypeError, OSError):
            source = Path(inspect.getsourcefile(thing) or "").read_bytes()
            return {"source": hashlib.sha256(source).hexdigest()[:16]}
    return {}
