"""One seed of the small PLaD experiment: data, arms of equal compute, and what comes out of them.

Compute is counted in tokens that went through the student forward and backward; a token that went
forward only, while sampling or under a reference, counts a third. The teacher's work is everybody's
and counts for nobody.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.plad_arms import Arm, slug
from plad_fast.data.prompts import Prompt, as_messages
from plad_fast.data.records import digest, model_digest, recorded_scores
from plad_fast.errors import UsageError
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.layer_drop import drop_layers
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.response_scores import score_responses
from plad_fast.pairs.build import as_response, build_answers, build_pairs
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.scorers import open_scorer
from plad_fast.pairs.scoring.stored import score_answers, stored_scores
from plad_fast.pairs.select import is_usable
from plad_fast.training.train import train_model

REQUEST = "{dialogue}\n\nWhat is this conversation about? Answer in one short sentence."
TRAINING_SCORER = "rougeL"
PARTS = ("validation", "first_held_out", "held_out")
FORWARD = 1 / 3
"""What a token counts that went forward only."""


@dataclass(frozen=True)
class Setting:
    """What all seeds share. The defaults are those of the published table."""

    teacher: str
    dialogsum: Path
    longest_dialogue: int = 260
    """Tokens."""
    layers: int = 27
    """Of the student; the teacher's, evenly spaced."""
    fine_tuning: int = 100
    """Dialogues whose teacher's answers the student is fine-tuned on."""
    pairing: int = 100
    """Dialogues for the pairs, which fine-tuning has not seen."""
    validation: int = 60
    first_held_out: int = 60
    """Dialogues on which a first choice of settings was measured (benchmarks/README.md)."""
    held_out: int = 60
    max_new_tokens: int = 64
    sft_epochs: float = 2.0
    sft_learning_rate: float = 1e-4
    pair_epochs: float = 2.0
    """Passes over the pairs of PLaD's ranking loss, which set the compute of every arm."""
    samples: int = 2
    """Of a student to a prompt it is measured on, at temperature 1."""
    temperature: float = 1.5
    """Of the samples that become rejected answers."""

    def prompts(self) -> dict[str, list[Prompt]]:
        """Part -> its dialogues; the same for every seed.

        Raises:
            UsageError: the file is no DialogSum, or too small.
        """
        tokenizer = load_tokenizer(self.teacher)
        rows = [json.loads(line) for line in self.dialogsum.read_text("utf-8").splitlines()]
        if not rows or not rows[0].keys() >= {"dialogue", "summary"}:
            raise UsageError(f"{self.dialogsum} has no `dialogue` and `summary`")
        found = [
            Prompt(f"{number}", REQUEST.format(**row), row["summary"])
            for number, row in enumerate(rows)
            if len(tokenizer(row["dialogue"])["input_ids"]) <= self.longest_dialogue
        ]
        random.Random(0).shuffle(found)
        parts = {}
        for part in ("first_held_out", "held_out", "validation", "pairing", "fine_tuning"):
            count = getattr(self, part)
            if len(found) < count:
                raise UsageError(f"{self.dialogsum} has too few dialogues for {count} {part}")
            parts[part], found = found[:count], found[count:]
        return parts


class Study:
    """A seed in a folder of its own. Everything is kept there, and taken from there again.

    Args:
        setting: what all seeds share.
        folder: of the experiment.
        seed: of fine-tuning, sampling and the arms' training.
        part: of `PARTS`: what the arms are measured on.
    """

    def __init__(self, setting: Setting, folder: Path, seed: int, part: str) -> None:
        self.setting = setting
        self.common = folder
        self.folder = folder / f"seed-{seed}"
        self.seed = seed
        self.part = part
        self.parts = setting.prompts()
        if not self.parts[part]:
            raise UsageError(f"the part {part} has no dialogues; give it some")
        self.tokenizer = load_tokenizer(setting.teacher)

    @cached_property
    def teacher_answers(self) -> dict[str, Answer]:
        """Greedy, so the same for every seed; those that ended by themselves."""

        def load() -> LocalModel:
            model = load_model(
                self.setting.teacher, dtype=autocast_dtype("auto"), device=best_device()
            )
            return LocalModel(model, self.tokenizer, "teacher")

        how = Sampling(self.setting.max_new_tokens, temperature=0.0)
        made_by = {"weights": model_digest(self.setting.teacher)}
        answers: dict[str, Answer] = {}
        # Apart: in a batch with what the arms are measured on, training data might round otherwise.
        for name, parts in (("training", ("fine_tuning", "pairing")), (self.part, (self.part,))):
            prompts = [prompt for part in parts for prompt in self.parts[part]]
            path = self.common / f"teacher-{name}.jsonl"
            answers |= stored_answers(load, prompts, path, how, fingerprint=made_by).first
        return {prompt_id: answer for prompt_id, answer in answers.items() if is_usable(answer)}

    @cached_property
    def fine_tuned(self) -> Path:
        start = self.common / "student"
        if not start.is_dir():
            model = drop_layers(load_model(self.setting.teacher), self.setting.layers)
            partial = start.with_name(".student.partial")
            model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            partial.rename(start)
        self._train(
            start,
            self._fine_tuning_rows("fine_tuning"),
            "sft",
            loss="sft",
            epochs=self.setting.sft_epochs,
            learning_rate=self.setting.sft_learning_rate,
            batch_size=8,
        )
        return self.folder / "sft"

    @cached_property
    def pair_samples(self) -> dict[str, list[Answer]]:
        """Of the fine-tuned student, one to each dialogue for the pairs."""
        how = Sampling(
            self.setting.max_new_tokens,
            temperature=self.setting.temperature,
            seed=self.seed + 1,
        )
        return self._answers(self.fine_tuned, "pair-samples", self.parts["pairing"], how)

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """The teacher's answer > a sample of the fine-tuned student, with scores of both."""
        prompts, samples = self.parts["pairing"], self.pair_samples
        teacher = {p.id: [a] for p in prompts if (a := self.teacher_answers.get(p.id))}
        scores = score_answers(
            open_scorer(TRAINING_SCORER), prompts, [teacher, samples], self.folder / "scores.jsonl"
        )
        rows, report = build_pairs(
            prompts, teacher, samples, scores=scores, tokenizer=self.tokenizer
        )
        print(f"seed {self.seed}: {report}", flush=True)
        return rows

    def run(self, arm: Arm) -> Path:
        """Train an arm; all of them cost the same."""
        rows = self._fine_tuning_rows("pairing") if arm.fine_tunes else self._filtered(arm)
        self._train(
            self.fine_tuned,
            rows,
            slug(arm.name),
            loss=arm.loss,
            epochs=self._epochs(arm, rows),
            learning_rate=arm.learning_rate,
            batch_size=arm.batch_size,
            **arm.options,
        )
        return self.folder / slug(arm.name)

    def measure(self, name: str, model: Path, scorers: Sequence[str]) -> dict[str, Any]:
        """Greedy answers and samples of a model to the prompts of the part, and their worth.

        Returns:
            `ids`; `greedy`: texts; `samples`: a list of texts for each prompt; `logps` of the
            samples, per token; `scores`: scorer -> {"greedy", "samples"}; `cut`: share of answers
            that reached the length limit.
        """
        prompts = [p for p in self.parts[self.part] if p.id in self.teacher_answers]
        longest, n = self.setting.max_new_tokens, self.setting.samples
        stem = f"{slug(name)}-{self.part}"
        greedy = self._answers(model, f"{stem}-greedy", prompts, Sampling(longest, temperature=0.0))
        sampling = Sampling(longest, seed=self.seed + 1000, n=n)
        samples = self._answers(model, f"{stem}-samples", prompts, sampling)
        texts = [[a.text for a in samples[p.id]] for p in prompts]
        scores = {}
        for spec in scorers:
            options = {"dtype": autocast_dtype("auto")} if ":" in spec else {}
            scorer = open_scorer(spec, **options)
            items = [(p, greedy[p.id][0].text) for p in prompts]
            items += [(p, text) for p, given in zip(prompts, texts, strict=True) for text in given]
            path = self.folder / "evaluation" / f"{stem}-{slug(spec.partition(':')[0])}.jsonl"
            values = stored_scores(scorer, items, path)
            rest = iter(values[len(prompts) :])
            scores[spec] = {
                "greedy": values[: len(prompts)],
                "samples": [[next(rest) for _ in given] for given in texts],
            }
        ended = [
            a.finish_reason == "stop" for p in prompts for a in (*greedy[p.id], *samples[p.id])
        ]
        return {
            "ids": [p.id for p in prompts],
            "greedy": [greedy[p.id][0].text for p in prompts],
            "samples": texts,
            "logps": self._logps(model, f"{stem}-logps", prompts, texts),
            "scores": scores,
            "cut": 1 - sum(ended) / len(ended),
        }

    def _logps(
        self, model: Path, stem: str, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        rows = []
        for prompt, given in zip(prompts, texts, strict=True):
            content = as_messages(self.tokenizer, prompt.content)
            rows.append((content, [as_response(content, text) for text in given]))

        def compute() -> dict[str, Any]:
            network = load_model(model, dtype=autocast_dtype("auto"), device=best_device())
            logps = score_responses(network, self.tokenizer, rows, length_normalization=1.0)
            return {"logps": [values.tolist() for values in logps]}

        made_by = {"weights": model_digest(model), "rows": digest(rows)}
        file = self.folder / "evaluation" / f"{stem}.json"
        return recorded_scores(file, made_by, compute)["logps"]

    def _answers(
        self, model: Path, name: str, prompts: Sequence[Prompt], sampling: Sampling
    ) -> dict[str, list[Answer]]:
        def load() -> LocalModel:
            network = load_model(model, dtype=autocast_dtype("auto"), device=best_device())
            return LocalModel(network, self.tokenizer, f"seed {self.seed} {name}")

        path = self.folder / "evaluation" / f"{name}.jsonl"
        made_by = {"weights": model_digest(model)}
        return stored_answers(load, prompts, path, sampling, fingerprint=made_by).answers

    def _fine_tuning_rows(self, part: str) -> list[dict[str, Any]]:
        return build_answers(self.parts[part], self.teacher_answers, tokenizer=self.tokenizer)

    def _filtered(self, arm: Arm) -> list[dict[str, Any]]:
        def gap(row: Mapping[str, Any]) -> float:
            return row["chosen_score"] - row["rejected_score"]

        kept = [
            row
            for row in self.pairs
            if arm.filters.reason(_text(row["chosen"]), _text(row["rejected"]), gap(row)) is None
        ]
        if not kept:
            raise UsageError(f"{arm.name}: its filters leave none of {len(self.pairs)} pairs")
        return kept[: arm.pairs]

    def _epochs(self, arm: Arm, rows: Sequence[Mapping[str, Any]]) -> float:
        """So many that the arm costs what PLaD's ranking loss costs with `pair_epochs`."""
        sampled = FORWARD * self._sampled_tokens()
        trained = sum(self._tokens(row, "chosen", "rejected") for row in self.pairs)
        budget = sampled + self.setting.pair_epochs * trained
        if arm.fine_tunes:
            return budget / sum(self._tokens(row, "chosen") for row in rows)
        epoch = sum(self._tokens(row, "chosen", "rejected") for row in rows)
        reference = FORWARD * epoch if arm.objective.needs_reference else 0.0
        return (budget - sampled - reference) / epoch

    def _sampled_tokens(self) -> int:
        """Of all samples: one that makes no pair has cost as much."""
        return sum(
            self._count(_text(prompt.content), answer.text)
            for prompt in self.parts["pairing"]
            for answer in self.pair_samples[prompt.id]
        )

    def _tokens(self, row: Mapping[str, Any], *responses: str) -> int:
        """The prompt counts once."""
        return self._count(_text(row["prompt"]), *(_text(row[name]) for name in responses))

    def _count(self, *texts: str) -> int:
        return sum(len(self.tokenizer(text)["input_ids"]) for text in texts)

    def _train(
        self, source: Path, rows: Sequence[Mapping[str, Any]], output: str, **options: Any
    ) -> None:
        train_model(
            source,
            rows,
            self.folder / output,
            max_tokens_per_batch=4096,
            saves=1,
            seed=self.seed,
            # Unset, as in `PLaDConfig`: an arm names the weights that it trains with.
            **{"sft_weight": 0.0, "length_normalization": 0.0, **options},
        )


def _text(content: Any) -> str:
    return content if isinstance(content, str) else content[-1]["content"]
