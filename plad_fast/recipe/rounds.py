"""A round of a run: samples of the student that it starts from, pairs, and training on these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.records import found_scores, model_digest, recorded_scores
from plad_fast.errors import UsageError
from plad_fast.losses.registry import get_loss
from plad_fast.models.loading import load_tokenizer
from plad_fast.pairs.build import build_pairs
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.recipe.dependencies import STAGES, stage_settings
from plad_fast.recipe.inputs import dropped_file, show_pairs, write_pairs
from plad_fast.recipe.run import NLL, Run, last_logged, numbered, of_round
from plad_fast.recipe.run_folder import Stage
from plad_fast.recipe.texts import Answers
from plad_fast.recipe.validation import AnswerCheck, measures
from plad_fast.training.validation import Validation, checks

if TYPE_CHECKING:
    from plad_fast.pairs.scoring.scorers import Scorer


@dataclass(frozen=True)
class Round:
    """A round, the first is 1."""

    run: Run
    number: int

    def stages(self) -> list[Stage]:
        """Samples, pairs, preference training."""
        config, texts, number = self.run.config, self.run.texts, self.number
        of = partial(stage_settings, config)
        is_first = number == 1
        start = "sft" if is_first else numbered("plad", number - 1)
        train = numbered("train", number)
        # The samples of the first round are also those of the held-out pairs.
        asked = [*self.run.prompts.pairs, *(self.run.prompts.held_out if is_first else ())]
        base = [] if config.rejected_from == "sft" else ["student"]
        names = {start: self.run.students[start], **dict.fromkeys(base, "base student")}
        students = [(self.run.folder / folder, name) for folder, name in names.items()]
        # Turn 0 is that of the held-out pairs.
        turns = {*config.sample_turns, *([0] if is_first else [])}
        stored = [texts.samples_file(number, turn) for turn in sorted(turns)]
        sample_files = [f"answers/{file.name}" for file in stored]
        files = [f"pairs/{name}.jsonl" for name in ([train, "held-out"] if is_first else [train])]
        dropped = [f"pairs/{dropped_file(Path(file)).name}" for file in files]

        def samples() -> Answers:
            drawn = texts.samples_in_turn(self.run.prompts.pairs, students, round_number=number)
            if not is_first:
                return drawn
            return {**drawn, **texts.samples(self.run.prompts.held_out, *students[0])}

        def sample() -> str:
            count = sum(map(len, samples().values()))
            temperatures = ", ".join(f"{value:g}" for value in config.temperatures)
            return f"{count} samples at temperature {temperatures}"

        def pair() -> str:
            drawn, tokenizer = samples(), load_tokenizer(self.run.folder / "sft")
            prompts, told = "train", []
            try:
                rows, report = texts.make_pairs(self.run.prompts.pairs, drawn, tokenizer, train)
                show_pairs(rows, report, texts.pairs_file(train), "training pairs")
                told.append(f"train: {report}")
                if is_first:
                    # The teacher's first answer > the student's first sample, whatever is trained.
                    prompts, teacher = "held-out", texts.teachers.answers()
                    rows, report = build_pairs(
                        self.run.prompts.held_out, teacher, drawn, tokenizer=tokenizer
                    )
                    write_pairs(texts.pairs_file("held-out"), rows, report)
                    told.append(f"held-out: {report}")
            except UsageError as error:
                error.args = (f"{prompts} prompts: {error}",)
                raise
            spent = texts.usage().get("judge")
            return "; ".join([*told, *([] if spent is None else [f"judge: {spent}"])])

        def train_on_pairs() -> str:
            options = {name: getattr(config, name) for name in STAGES["preference training"]}
            validation = None
            if self.run.prompts.validation:
                # Of the student before it depends on no setting of this training.
                validation = self._validation()
                file = self.run.folder / "answers" / f"{numbered('validation', number)}.json"
                made_by = {"weights": model_digest(self.run.folder / start), **validation.made_by}
                known = found_scores(file, made_by, replace=True)
                validation = replace(validation, start=known)
            options["validation"] = validation
            log = self.run.train(start, texts.pairs(train), numbered("plad", number), **options)
            if validation is not None and validation.start is None:
                recorded_scores(file, made_by, lambda: measures(checks(log)[0]), replace=True)
            spec = get_loss(config.loss)
            if spec.is_likelihood:
                told = [last_logged(log, "nll", NLL)]
            else:
                accuracy = "{:.0%} of the last training pairs ranked right"
                told = [last_logged(log, "ranking_accuracy", accuracy)]
                if not spec.always_active:  # a hinge, which pairs may satisfy
                    below = "{:.0%} with a lead below the margin that the loss asks for"
                    told.append(last_logged(log, "active_pairs", below))
            kept = [verdict for verdict, _ in self.run.validations(number)]
            return "; ".join([", ".join(told), *kept])

        return [
            Stage(
                of_round("student's samples", number),
                sample,
                of("samples", prompts=asked),
                reads=[start, *base],
                makes=sample_files,
            ),
            Stage(
                of_round("pairs", number),
                pair,
                of(
                    "pairs",
                    prompts=asked,
                    references=True,
                    **({} if texts.scorer is None else texts.scorer.settings()),
                ),
                reads=[start, *self.run.teacher_files, *sample_files],
                makes=[*files, *dropped],
            ),
            Stage(
                of_round("preference training", number),
                train_on_pairs,
                of(
                    "preference training",
                    prompts=self.run.prompts.validation,
                    references=True,
                    **self._validated_by(),
                ),
                # A validation compares with the teacher's answers.
                reads=[
                    *(start, files[0]),
                    *(self.run.teacher_files if self.run.prompts.validation else ()),
                ],
                makes=[numbered("plad", number)],
            ),
        ]

    def _validated_by(self) -> dict[str, Any]:
        """What a validated training depends on besides its own settings and the prompts."""
        if not self.run.prompts.validation:
            return {}
        scorer = self._validation_scorer()
        return {
            **stage_settings(self.run.config, "validation"),
            "saves_per_stage": self.run.config.saves_per_stage,
            "validation's scorer": None if scorer is None else scorer.settings(),
        }

    def _validation_scorer(self) -> Scorer | None:
        """None for ROUGE-L. A judge compares, and rates nothing by itself."""
        return self.run.evaluation["scorers"].get(self.run.config.eval_scorer)

    def _validation(self) -> Validation:
        config, answers = self.run.config, self.run.texts.best_teacher_answers()
        prompts = [prompt for prompt in self.run.prompts.validation if prompt.id in answers]
        check = AnswerCheck(
            prompts,
            {prompt.id: answers[prompt.id] for prompt in prompts},
            load_tokenizer(self.run.folder / "sft"),
            Sampling(
                config.student_tokens, temperature=0.0, batch_size=config.generation_batch_size
            ),
            config.max_length,
            self._validation_scorer(),
            config.reasoning,
        )
        return Validation(check.measure, check.settings(), config.patience)
