"""One seed of a task of the PLaD study: a run of the recipe whose last stages the arms take turns
in, and what comes out of them.

Compute is counted in tokens that went through the student forward and backward; a token that went
forward only, while sampling or under a reference, counts a third. Validation is everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plad_arms import SFT, Arm, Task, run_prompts
from plad_fast.data.prompts import Prompt, as_messages
from plad_fast.data.records import model_digest, recorded_scores
from plad_fast.losses.registry import get_loss
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.response_scores import score_responses
from plad_fast.pairs.build import as_response
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.scoring.scorers import open_scorer
from plad_fast.pairs.text_metrics import ROUGE_NAMES, repetition_shares, rouge, word_counts
from plad_fast.recipe.distillation import Distillation, opened_run
from plad_fast.recipe.fields import read_value
from plad_fast.recipe.search import SearchSpace, TuneConfig
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.tune import Trial, search

FORWARD = 1 / 3
"""What a token counts that went forward only."""
KINDS = {"greedy": 0.0, "at 0.7": 0.7, "at 1": 1.0}
"""How held-out prompts are answered -> temperature."""


@dataclass(frozen=True)
class Setting:
    """What all tasks and seeds share."""

    student: str
    likelihood: str | None = None
    """A second model that rates the answers."""
    sft: int = 160
    """Prompts whose summaries the student is fine-tuned on."""
    pairs: int = 160
    validation: int = 60
    held_out: int = 100
    longest: int = 420
    """Tokens of a prompt."""
    max_new_tokens: int = 64
    fine_tune_on: str = "own"
    """`own` prompts, apart from those of the pairs, or `all`: then there are pairs of all too."""
    candidates: int = 4
    """Samples of a prompt of the pairs: all of them in ranked lists, the first in pairs."""
    student_temperature: str = "0.7,1"
    """Of these samples, in turn."""
    select: str = "teacher"
    """What makes a pair, as `select` of the recipe."""
    samples: int = 4
    """Of a student to a held-out prompt at each temperature above 0."""
    pair_epochs: float = 2.0
    """Passes of PLaD's ranking loss over its pairs, which set the compute of every arm."""
    sft_learning_rate: float = 1e-4
    learning_rate: str = "3e-6..1e-4"
    """Searched in every arm."""
    lora_r: int = 0
    """Rank of LoRA adapters, which are trained in place of all weights."""
    checkpoints: int = 4
    """Of a training, each validated."""
    trials: int = 8
    """Of every arm, with the first of the seeds."""


class Study:
    """A seed of a task in a folder of its own. What was done is taken from there again."""

    def __init__(self, setting: Setting, task: Task, folder: Path, seed: int) -> None:
        self.setting, self.seed = setting, seed
        self.folder = folder / f"seed-{seed}"
        parts = task.read(vars(setting), setting.longest, setting.student)
        file = folder / "data.jsonl"
        self.prompts = run_prompts(parts, file, setting.fine_tune_on)
        self._budget: float | None = None
        self.references = {row["id"]: row["references"] for row in parts["held_out"]}
        temperatures = read_value(
            "tuple[float, ...]", setting.student_temperature, "--student-temperature"
        )
        self.config = DistillConfig(
            teacher="column:answer",
            student=setting.student,
            prompts=str(file),
            reference_column="answer",
            output_dir=str(self.folder / "run"),
            scorer="rougeL",
            student_samples=setting.candidates,
            student_temperature=temperatures,
            select=setting.select,
            max_new_tokens=setting.max_new_tokens,
            validation=setting.validation,
            sft_learning_rate=setting.sft_learning_rate,
            lora_r=setting.lora_r or None,
            seed=seed,
            saves_per_stage=setting.checkpoints,
            patience=setting.checkpoints,  # all of the compute is spent
        )

    @contextmanager
    def opened(self) -> Iterator[Distillation]:
        with opened_run(self.config, self.prompts) as run:
            yield run

    def tune(self, run: Distillation, arm: Arm) -> list[Trial]:
        """Trials of an arm on validation prompts."""
        config = self._of_arm(run, arm)
        searched = {"learning_rate": self.setting.learning_rate, **arm.search}
        space = SearchSpace.of(config, searched, fixed={f.name for f in fields(config)})
        plan = TuneConfig(trials=self.setting.trials)
        file = self.folder / "trials" / f"{slug(arm.name)}.jsonl"
        return search(run.with_settings(config), space, plan, file)

    def measure_arm(
        self, run: Distillation, arm: Arm, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Trains an arm with these settings, and measures it."""

        def compute() -> dict[str, Any]:
            trained = run.with_settings(replace(self._of_arm(run, arm), **settings))
            trained.prepare()
            trained.make_pairs()
            log = trained.train_on_pairs()
            return {**self._measures(arm.name, run.folder / "plad"), "log": log}

        return self._recorded(run, arm.name, compute, settings={**arm.settings, **settings})

    def measure_start(self, run: Distillation) -> dict[str, Any]:
        """Measures the student that all arms start from."""
        return self._recorded(run, SFT, lambda: self._measures(SFT, run.folder / "sft"))

    def _recorded(
        self, run: Distillation, name: str, compute: Callable[[], dict[str, Any]], **made_by: Any
    ) -> dict[str, Any]:
        shared = {n: v for n, v in vars(self.setting).items() if n not in ("trials",)}
        start = model_digest(run.folder / "sft")
        made_by = {**made_by, "setting": shared, "start": start, "has": "log"}
        return recorded_scores(self.folder / f"{slug(name)}.json", made_by, compute, replace=True)

    def _measures(self, name: str, model: Path) -> dict[str, Any]:
        """Answers of a model to held-out prompts, and their worth.

        Returns:
            `ids`, and a kind of `KINDS` -> measure -> a list of values for each prompt. At 1 there
            is `logp` among them, the student's own log-probability per token.
        """
        prompts, tokenizer = self.prompts.held_out, load_tokenizer(model)
        found: dict[str, Any] = {"ids": [prompt.id for prompt in prompts]}

        def load() -> LocalModel:
            network = load_model(model, dtype=autocast_dtype("auto"), device=best_device())
            return LocalModel(network, tokenizer, f"seed {self.seed}, {name}")

        for number, (kind, temperature) in enumerate(KINDS.items()):
            n = self.setting.samples if temperature else 1
            sampling = Sampling(
                self.setting.max_new_tokens,
                temperature=temperature,
                seed=self.seed + 1000 * (number + 1),
                n=n,
            )
            file = self.folder / "answers" / f"{slug(name)}-{slug(kind)}.jsonl"
            made_by = {"weights": model_digest(model)}
            answered = stored_answers(
                load, prompts, file, sampling, fingerprint=made_by, others_aside=True
            ).answers
            answers = [answer for prompt in prompts for answer in answered[prompt.id]]
            texts = [answer.text for answer in answers]
            values = {
                **self._rouge([answer.prompt_id for answer in answers], texts),
                "repetition": repetition_shares(texts),
                "words": word_counts(texts),
                "cut_off": np.array([float(a.finish_reason == "length") for a in answers]),
            }
            asked = [prompt for prompt in prompts for _ in range(n)]
            if self.setting.likelihood is not None:
                spec = f"likelihood:{self.setting.likelihood}"
                scorer = open_scorer(spec, dtype=autocast_dtype("auto"))
                values["likelihood"] = np.array(scorer.score(list(zip(asked, texts, strict=True))))
            if temperature == 1:
                values["logp"] = _own_logps(load().model, tokenizer, prompts, texts, n)
            found[kind] = {name: v.reshape(-1, n).tolist() for name, v in values.items()}
        return found

    def _rouge(self, ids: Sequence[str], texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The best over the references of a prompt."""
        number = max(len(self.references[prompt_id]) for prompt_id in ids)
        each = []
        for k in range(number):
            references = [self.references[prompt_id] for prompt_id in ids]
            each.append(rouge(texts, [given[min(k, len(given) - 1)] for given in references]))
        return {name: np.max([found[name] for found in each], axis=0) for name in ROUGE_NAMES}

    def _of_arm(self, run: Distillation, arm: Arm) -> DistillConfig:
        """The settings of an arm, which is given as many epochs as the compute of all allows."""
        if self._budget is None:
            epoch, sampled, _ = self._costs(run, {})
            self._budget = sampled + self.setting.pair_epochs * epoch
        spec = get_loss(arm.settings["loss"])
        epoch, sampled, chosen = self._costs(run, arm.settings)
        reference = FORWARD * epoch if spec.needs_reference else 0.0
        epochs = (self._budget - sampled - reference) / epoch
        if spec.is_likelihood:
            epochs = self._budget / chosen
        return replace(self.config, **arm.settings, epochs=epochs)

    def _costs(self, run: Distillation, settings: Mapping[str, Any]) -> tuple[float, float, float]:
        """(an epoch, the samples it is made of, its chosen answers alone), in tokens."""
        arm = run.with_settings(replace(self.config, **settings))
        arm.prepare()
        rows, tokenizer = arm.make_pairs(), load_tokenizer(run.folder / "sft")

        def count(content: Any) -> int:
            text = content if isinstance(content, str) else content[-1]["content"]
            return len(tokenizer(text)["input_ids"])

        drawn = 1 if arm.config.select == "teacher" else self.setting.candidates
        epoch = sampled = chosen = 0.0
        for row in rows:
            responses = row.get("responses") or [row["chosen"], row["rejected"]]
            prompt, (best, *others) = count(row["prompt"]), map(count, responses)
            epoch += prompt + best + sum(others)
            chosen += prompt + best
            sampled += FORWARD * drawn * (prompt + sum(others) / len(others))
        # What came to nothing was sampled too.
        return epoch, sampled * len(self.prompts.pairs) / len(rows), chosen


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _own_logps(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], texts: Sequence[str], n: int
) -> np.ndarray:
    """Per token, in the order of the texts, `n` of each prompt."""
    rows = []
    for number, prompt in enumerate(prompts):
        content = as_messages(tokenizer, prompt.content)
        given = texts[n * number : n * (number + 1)]
        rows.append((content, [as_response(content, text) for text in given]))
    return np.concatenate(score_responses(model, tokenizer, rows, length_normalization=1.0))
