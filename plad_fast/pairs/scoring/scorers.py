"""Scorers: measures and functions. Models that score are in `models`, a judge in `judge`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from plad_fast.checks import shown
from plad_fast.data.chat import is_blank
from plad_fast.data.places import require_there
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs import text_metrics
from plad_fast.pairs.generation.given import import_function, source_settings

Item: TypeAlias = tuple[Prompt, str]
"""A prompt and the text of an answer to it."""

ScoreFunction: TypeAlias = Callable[[Any, str, str | None], float]
"""Prompt (text or messages), answer and reference to a score."""

_SPECS = (
    "rouge1, rouge2, rougeL, length, brevity, likelihood:MODEL, reward:MODEL, reward:MODEL#LABEL, "
    "judge:openai:MODEL, judge:openai:MODEL@URL, python:MODULE.FUNCTION"
)


class Scorer(Protocol):
    """Whatever says how good an answer is. To make one costs nothing: models are loaded late."""

    name: str

    uses_reference: bool = False
    """A score depends on the prompt's reference."""

    relative: bool = False
    """A score depends on the other answers to the same prompt that are scored with it."""

    def settings(self) -> dict[str, Any]:
        """What the scores depend on, as JSON values, for the fingerprint of a store."""
        return {"scorer": self.name}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UsageError for prompts whose answers could not be scored, before there are any."""
        return None

    def score(self, items: Sequence[Item]) -> list[float]:
        """A score for each item, larger is better; NaN for one that could not be had this time.

        Raises:
            UsageError: as `check`, or a score is broken.
        """
        ...


class Rouge(Scorer):
    """Overlap with the prompt's reference, an F-measure in [0, 1]; see `text_metrics.rouge`."""

    uses_reference = True

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, prompts: Sequence[Prompt]) -> None:
        lacking = [prompt.id for prompt in prompts if is_blank(prompt.reference or "")]
        if lacking:
            raise UsageError(
                f"{len(lacking)} of {len(prompts)} prompts have no reference, the first is "
                f"{lacking[0]!r}, and {self.name} compares with one; name its column "
                "(--reference-column; in rows of pairs it is `reference`), drop these prompts, or "
                "choose another scorer"
            )

    def score(self, items: Sequence[Item]) -> list[float]:
        self.check([prompt for prompt, _ in items])
        # One by one: which words are compared depends on the script of all references of a call.
        return [
            float(text_metrics.rouge([text], [prompt.reference or ""])[self.name][0])
            for prompt, text in items
        ]


class Length(Scorer):
    """The number of words (`text_metrics.words`), or with `shorter` the same below zero."""

    def __init__(self, *, shorter: bool = False) -> None:
        self.name = "brevity" if shorter else "length"
        self._sign = -1.0 if shorter else 1.0

    def score(self, items: Sequence[Item]) -> list[float]:
        return [self._sign * len(text_metrics.words(text)) for _, text in items]


class FunctionScorer(Scorer):
    """Any function of yours.

    Args:
        function: prompt, answer and reference (None where there is none) to a number.
        name: for messages; by default that of the function.
    """

    uses_reference = True

    def __init__(self, function: ScoreFunction, name: str | None = None) -> None:
        self.function = function
        self.name = getattr(function, "__name__", "function") if name is None else name

    def settings(self) -> dict[str, Any]:
        """The name, and a digest of the file that the function is in, if it is in one."""
        return {"scorer": self.name, **source_settings(self.function)}

    def score(self, items: Sequence[Item]) -> list[float]:
        values = [self.function(prompt.content, text, prompt.reference) for prompt, text in items]
        return finite_scores(self.name, items, values)


def open_scorer(spec: str, **options: Any) -> Scorer:
    """A scorer by name. No model is loaded and nothing is asked yet.

    Args:
        spec: `rouge1`, `rouge2`, `rougeL` (to the prompt's reference); `length`, `brevity` (many or
            few words); `likelihood:MODEL` (under a local model, or `offline`); `reward:MODEL`
            (sequence classification; `reward:MODEL#LABEL` takes one of several labels, by its name
            or its number); `judge:openai:MODEL` (behind an OpenAI-compatible endpoint,
            `judge:openai:MODEL@URL` behind one at this address); `python:MODULE.FUNCTION`.
        **options: of `Likelihood` and `RewardModel`; of `Judge`, where `endpoint` is an `Endpoint`
            or a dict of its options.

    Raises:
        UsageError: there is no such scorer, or it cannot be made.
    """
    kind, _, rest = spec.partition(":")
    if spec in (*text_metrics.ROUGE_NAMES, "length", "brevity"):
        if options:
            takes = f"scorer {spec!r} takes no options, got {', '.join(options)}; drop them"
            raise UsageError(takes)
        return Rouge(spec) if spec.startswith("rouge") else Length(shorter=spec == "brevity")
    if kind == "python" and rest:
        return FunctionScorer(import_function(rest), spec)
    if kind == "likelihood" and rest:
        from plad_fast.models.loading import place_of  # brings in transformers
        from plad_fast.pairs.scoring.models import Likelihood

        place = os.fspath(place_of(rest))
        require_there(place, f"scorer {shown(spec)}")
        return Likelihood(place, **options)
    if kind == "reward" and rest:
        from plad_fast.pairs.scoring.models import RewardModel, split_label

        model, label = split_label(rest)
        require_there(model, f"scorer {shown(spec)}")
        return RewardModel(model, **({"label": label} if label is not None else {}), **options)
    service, _, model = rest.partition(":")
    if kind == "judge" and service == "openai" and model:
        from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
        from plad_fast.pairs.generation.sources import split_url
        from plad_fast.pairs.scoring.judge import Judge

        model, url = split_url(model)
        endpoint = options.pop("endpoint", {})
        if isinstance(endpoint, Mapping):
            endpoint = Endpoint(model, **{**endpoint, **({"base_url": url} if url else {})})
        return Judge(endpoint, model, **options)
    raise UsageError(f"unknown scorer {spec!r}; known: {_SPECS}")


def finite_scores(name: str, items: Sequence[Item], values: Sequence[Any]) -> list[float]:
    """The values as numbers; raises UsageError where one is not finite."""
    scores = []
    for (prompt, _), value in zip(items, values, strict=True):
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise UsageError(
                f"scorer {name} gave {value!r} for an answer to prompt {prompt.id!r}; a score must "
                "be a finite number: mend the scorer, or load a model in float32"
            )
        scores.append(score)
    return scores


def by_prompt(items: Sequence[Item]) -> list[list[int]]:
    """Numbers of the items with the same prompt, prompts in the order they come first."""
    groups: dict[str, list[int]] = {}
    for index, (prompt, _) in enumerate(items):
        groups.setdefault(prompt.id, []).append(index)
    return list(groups.values())
