"""Answers that need no model: those in a column of the data, and those of any Python function."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plad_fast.data.chat import is_blank
from plad_fast.data.prompts import Prompt, load_prompts
from plad_fast.data.records import file_digest
from plad_fast.data.tables import read_table
from plad_fast.data.unicode import mend
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.access import one_line
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Batches, Failure, TextModel, Wanted


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

    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Batches:
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

    An exception is the failure of the prompt, with its message as the reason; so is what is no text
    or blank. Ctrl-C ends it as usual.

    Args:
        function: takes a prompt's content, text or chat messages, and returns the answer. It is
            called anew for every sample, and does its own sampling.
        name: for progress and messages.
    """

    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        self.function = function
        self.name = name

    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Batches:
        """Yields an answer at a time."""
        return ([self._call(prompt, sample)] for prompt, sample in wanted)

    def _call(self, prompt: Prompt, sample: int) -> Answer | Failure:
        try:
            text = self.function(prompt.content)
        except Exception as error:
            return Failure(prompt.id, one_line(f"{type(error).__name__}: {error}"), sample)
        return _answer(text, prompt, sample, "the function returned no text")


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
    try:
        function = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # whatever the user's module does when it is imported
        said = one_line(f"{type(error).__name__}: {error}")
        raise UsageError(
            f"cannot import {module_name} for python:{path} ({said}); run where it lies, or "
            "install it"
        ) from error
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
            return {"source": file_digest(Path(inspect.getsourcefile(thing) or ""))[:16]}
    return {}
