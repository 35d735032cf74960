"""Answers to prompts that a student is not trained on, by which the best checkpoint is kept."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plad_fast.data.prompts import Prompt, as_messages
from plad_fast.data.records import digest
from plad_fast.errors import UsageError
from plad_fast.evaluation.samples import RougeL
from plad_fast.models.response_scores import score_with_ends
from plad_fast.models.team import of_all, rank, size
from plad_fast.pairs.build import as_response
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.reasoning import with_reasoning
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.shards import share
from plad_fast.pairs.text_metrics import repetition_shares, word_counts
from plad_fast.recipe.inputs import prompts_digest
from plad_fast.training.validation import PREFIX, SCORE, best_check, checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plad_fast.pairs.generation.text_model import Answer
    from plad_fast.pairs.scoring.scorers import Scorer

MEASURES = {
    "score": "score",
    "words": "words",
    "repetition": "repetition",
    "cut_off": "cut off",
    "nll": "NLL",
    "end_logp": "log P(end)",
}
"""Metrics of `AnswerCheck.measure` and their titles."""


def measure_cell(name: str, value: float) -> str:
    return f"{value:.{1 if name == 'words' else 3}f}"


@dataclass(frozen=True)
class AnswerCheck:
    """Greedy answers to validation prompts and what the student makes of the teacher's.

    Raises UsageError without a prompt that the teacher answered.
    """

    prompts: Sequence[Prompt]
    teacher_answers: Mapping[str, Answer]
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    max_length: int
    scorer: Scorer | None = None
    """Of the answers; None takes ROUGE-L to the reference, or else to the teacher's answer."""
    reasoning: str = "drop"
    """What becomes of the student's; see `plad_fast.pairs.generation.reasoning.REASONING`."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError(
                "the teacher finished no answer to a validation prompt; raise --max-new-tokens in "
                "another --output-dir, or keep the last checkpoint with --validation 0"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Another process rates nothing."""
        return {**vars(self), "scorer": None}

    @property
    def quality(self) -> Scorer | RougeL:
        texts = {key: answer.text for key, answer in self.teacher_answers.items()}
        return self.scorer or RougeL(self.prompts, texts)

    def settings(self) -> dict[str, Any]:
        """What the metrics depend on besides the model."""
        return {
            "prompts": prompts_digest(self.prompts),
            "teacher's answers": digest([self.teacher_answers[p.id].text for p in self.prompts]),
            "scorer": self.quality.name if self.scorer is None else self.scorer.settings(),
            "sampling": self.sampling.settings(),
            "reasoning": self.reasoning,
        }

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Means over the prompts: the `score` of the answers, their length in `words`,
        `repetition` (the share of 4-grams that came before) and share `cut_off` by the length
        limit; the `nll` of the teacher's answers in nats per token, and the log-probability of
        their last token, `end_logp`.

        Of several processes each answers its share, and the first one rates the answers.
        """
        thinks, part = self.reasoning == "keep", (rank(), size())
        student = LocalModel(model, self.tokenizer, "validation", thinks=thinks)
        mine = share([(prompt, 0) for prompt in self.prompts], *part)
        answered = [*itertools.chain(*student.generate_samples(mine, self.sampling))]
        by_id: dict[str, Answer] = {
            answer.prompt_id: with_reasoning(answer, self.reasoning)
            for answer in itertools.chain(*of_all(answered))
        }
        answers = [by_id[prompt.id] for prompt in self.prompts]
        texts = [answer.text for answer in answers]
        items = list(zip(self.prompts, texts, strict=True))
        scores = np.array(of_all(self.quality.score(items) if rank() == 0 else [])[0])
        if np.isnan(scores).all():
            raise UsageError(
                f"{self.quality.name} gave no score to any answer on validation prompts"
            )
        contents = [as_messages(self.tokenizer, prompt.content) for prompt in self.prompts]
        told = [self.teacher_answers[prompt.id] for prompt in self.prompts]
        rows = [
            (content, as_response(content, answer.text, answer.tool_calls))
            for content, answer in zip(contents, told, strict=True)
        ]
        scored = score_with_ends(
            model,
            self.tokenizer,
            rows,
            max_length=self.max_length,
            templates=[prompt.template for prompt in self.prompts],
            part=part,
        )
        logps, ends = np.nanmax(of_all(scored), axis=0)
        return {
            "score": float(np.nanmean(scores)),
            "words": float(word_counts(texts).mean()),
            "repetition": float(repetition_shares(texts).mean()),
            "cut_off": float(np.mean([answer.finish_reason == "length" for answer in answers])),
            "nll": -float(logps.mean()),
            "end_logp": float(ends.mean()),
        }


def measures(check: Mapping[str, Any]) -> dict[str, float]:
    """The `MEASURES` of a check in a log history."""
    return {name: check[f"{PREFIX}{name}"] for name in MEASURES}


def verdict(log: Sequence[Mapping[str, Any]], start: str) -> str:
    """What a validation kept, and why, in a line; empty where there was none.

    Args:
        log: the log history of the training.
        start: name of the student that it began with.
    """
    best = best_check(log)
    if best is None:
        return ""
    scores = [f"{entry[SCORE]:.3f} at step {entry['step']}" for entry in checks(log)[1:]]
    before = f"{checks(log)[0][SCORE]:.3f} for the {start}"
    if best["step"] == 0:
        what = f"no checkpoint answered better than the {start}, which is kept"
    else:
        what = f"the checkpoint of step {best['step']} is kept"
    return f"{what}: score {', '.join([before, *scores])}"


def validation_table(log: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The checks of a training for the report: a line of titles, then one for each check."""
    lines = [["step", *MEASURES.values()]]
    for entry in checks(log):
        cells = (measure_cell(name, value) for name, value in measures(entry).items())
        lines.append([str(entry["step"]), *cells])
    return lines
