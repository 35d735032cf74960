"""Sources of text. A teacher is anything that answers prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from plad_fast.data.prompts import Prompt
from plad_fast.pairs.generation.sampling import Sampling


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    prompt_id: str

    text: str
    """Without special tokens and surrounding white space. Where the prompt has opened a thought,
    this begins with that mark: `<think>`, say."""

    finish_reason: Literal["stop", "length"]
    """`stop`: the model ended its answer itself. `length`: it was cut off."""

    n_tokens: int
    """Tokens generated, the end token included; 0 where they were not counted."""

    sample: int = 0
    """Which of a prompt's `Sampling.n` answers this is, from 0."""

    reasoning: str = ""
    """What the model thought first, where that is not in the text."""

    tool_calls: Sequence[Mapping[str, Any]] = ()
    """Calls that the text ends in (`written_calls`), where a server told them apart."""

    by: str = ""
    """Who said it, where it may have been one of several."""


@dataclass(frozen=True)
class Failure:
    """An answer that could not be had. It is not stored, so another run asks again."""

    prompt_id: str

    reason: str
    """One line for the user, without secrets."""

    sample: int = 0


Wanted: TypeAlias = Sequence[tuple[Prompt, int]]
"""Prompts and numbers of samples."""

Batches: TypeAlias = Iterator[Sequence[Answer | Failure]]
"""Answers as soon as they are there, in any order and in lists of any length."""


class TextModel(Protocol):
    """Whatever answers prompts: a local model, an API, a column of a data set.

    Any class with a name and `generate_samples` is one.
    """

    name: str

    @abstractmethod
    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Batches:
        """Answers what is wanted, each (prompt, sample) once.

        What is wrong with the prompts or the model as a whole is raised as a UsageError from this
        very call, before anything is generated.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Batches:
        """All samples of these prompts; see `generate_samples`."""
        return self.generate_samples([(p, k) for p in prompts for k in range(sampling.n)], sampling)
