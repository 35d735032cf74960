"""The recipe of the PLaD paper, stage by stage, in a folder that survives being killed.

teacher's answers -> fine-tuning
-> student's samples -> pairs -> calibration, once or in several rounds -> evaluation

PLaD, Zhang et al. 2024, arXiv 2406.02886, section 3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from plad_fast.data.files import write_atomically
from plad_fast.data.places import OFFLINE, lies_in
from plad_fast.data.records import ELSEWHERE, digest, model_digest, recorded_scores
from plad_fast.data.store import has_rows
from plad_fast.errors import UsageError
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.report.terminal import comparison_table
from plad_fast.evaluation.report.write import write_results
from plad_fast.evaluation.run_students import evaluate_models
from plad_fast.evaluation.students import StudentOutputs
from plad_fast.models.devices import autocast_dtype, best_device, require_one_gpu
from plad_fast.models.layer_drop import depth, drop_layers
from plad_fast.models.loading import (
    check_loadable,
    find_model,
    load_model,
    load_tokenizer,
    offline_teacher_path,
)
from plad_fast.models.lora import Lora
from plad_fast.pairs.build import build_answers, build_pairs
from plad_fast.pairs.generation.answer_rows import row_id
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.sources import LazyLocalModel
from plad_fast.recipe.cards import describe_student
from plad_fast.recipe.data_checks import check_answers, require_learnable, show_findings
from plad_fast.recipe.dependencies import STAGES, bound_settings, stage_settings
from plad_fast.recipe.doctor import require_packages, versions
from plad_fast.recipe.fields import flag
from plad_fast.recipe.hub import check_push, push
from plad_fast.recipe.inputs import RunPrompts, data_of_run, dropped_file, show_pairs, write_pairs
from plad_fast.recipe.run_folder import RunFolder, Stage
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.sources import held_out_options
from plad_fast.recipe.teachers import require_tools
from plad_fast.recipe.texts import Answers, RecipeTexts
from plad_fast.recipe.validation import AnswerCheck, validation_table, verdict
from plad_fast.training.train import adapters_and_arguments, train_model
from plad_fast.training.trained_folders import log_history
from plad_fast.training.validation import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
    from plad_fast.pairs.scoring.scorers import Scorer

SFT, PLAD = "SFT student", "PLaD student"
_LAYERS_KEPT = 0.9
_OF_TRAINING = (
    *("micro_batch_size", "max_tokens_per_batch", "gradient_checkpointing"),
    *("seed", "precision", "max_length", "training"),
    *("lora_r", "lora_alpha", "lora_targets", "load_in_4bit", "merge"),
)
# In the folder of a run, with what a kill leaves; what else lies there is the user's.
_MADE = (
    r"(config|metrics)\.json|report\.html|plad-fast-error\.log|answers|evaluation|pairs|plots|tune"
    r"|student|(sft|plad)(-\d+)?(\.checkpoints)?|\..+\.(partial|tmp)"
)


def distill(
    config: DistillConfig,
    *,
    overwrite: bool = False,
    command: str = "",
    shares: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Run the recipe, or what is left of it, and return the metrics.

    Args:
        config: the settings. In a folder made with others, the stages that depend on what has
            changed run anew; one with answers of another teacher is refused.
        overwrite: start anew in a folder of an earlier run.
        command: what the report says to run again.
        shares: name of a stage -> its share of the time, to say how much is left.

    Raises:
        UsageError: bad input, found before long work where it can be.
    """
    with opened_run(config, overwrite=overwrite) as run:
        return run.run(command, shares or {})


@contextmanager
def opened_run(
    config: DistillConfig, prompts: RunPrompts | None = None, *, overwrite: bool = False
) -> Iterator[Distillation]:
    """A run in its folder, which no other process has meanwhile; see `distill`.

    `prompts` are those of the settings where none are given.
    """
    require_packages("transformers", "datasets", "accelerate", "rouge_score", "matplotlib")
    require_one_gpu()
    adapters_and_arguments({**vars(config), "loss": "sft"})
    if config.push_to_hub is not None:
        has_adapters = config.lora_r is not None and not config.merge
        check_push(config.push_to_hub, adapters_on="the student" if has_adapters else None)
    config.require_room(of_teacher=True)
    if not config.has_local_teacher and config.student is None:
        raise UsageError(
            f"a student cannot be made of the teacher {' and '.join(config.teachers)}, whose "
            "weights are not here, or of several; give a model to start from with --student"
        )
    path = Path(config.output_dir)
    prompts = prompts or RunPrompts.of(config)
    if overwrite:
        _require_outside(path, config)
    # Teacher, scorers and judge are made before any work, so that what is wrong with them is found.
    judges: dict[str, Endpoint] = {}
    evaluation = held_out_options(config, path / "evaluation", judges)
    for scorer in evaluation["scorers"].values():
        scorer.check([*prompts.held_out, *prompts.validation])
    teacher = _LocalTeacher(config)
    if any(prompt.has_tools for prompt in prompts.all):
        student = teacher.source
        if config.student is not None:
            student = find_model(config.student, "--student")
        require_tools(config, prompts.all, load_tokenizer(student))
    texts = RecipeTexts(
        config,
        prompts.all,
        answers=path / "answers",
        pairs=path / "pairs",
        teacher=LazyLocalModel(teacher.as_text, "teacher") if config.has_local_teacher else None,
        judges=judges,
    )
    if overwrite or not (path / "student").exists():
        if config.student is not None:
            check_loadable(find_model(config.student, "--student"))
        if config.has_local_teacher:
            check_loadable(teacher.source)
    folder = RunFolder(
        path,
        bound_settings(config, texts.teachers.made_by),
        overwrite=overwrite,
        is_bound=lambda: any(map(has_rows, texts.teachers.stores)),
        is_own=lambda name: re.fullmatch(_MADE, name) is not None,
        # Before the folder keeps settings that an endpoint refuses.
        check=lambda: texts.try_endpoints(evaluation["judge"], overwrite=overwrite),
    )
    with closing(folder):
        write_atomically(folder / "config.json", json.dumps(config.as_dict(), indent=2))
        print(
            f"{len(prompts.all)} prompts: {len(prompts.train)} to train on "
            f"({len(prompts.sft)} of them for fine-tuning), {len(prompts.validation)} to validate "
            f"on, {len(prompts.held_out)} held out; run folder {folder.path}",
            flush=True,
        )
        yield Distillation(config, prompts, teacher, texts, evaluation, folder)


class _LocalTeacher:
    """The teacher's model, loaded once for the student and the answers: a GGUF file takes its
    time."""

    def __init__(self, config: DistillConfig) -> None:
        is_offline = config.teacher == OFFLINE
        self.source = str(offline_teacher_path()) if is_offline else config.teachers[0]
        self._precision = config.precision

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.source, merge_adapters=True)

    def as_text(self) -> LocalModel:
        model = self.model.to(device=best_device(), dtype=autocast_dtype(self._precision))
        return LocalModel(model, load_tokenizer(self.source), "teacher")


@dataclass(frozen=True)
class Distillation:
    """The stages of a run, on what was read and opened for them."""

    config: DistillConfig
    prompts: RunPrompts
    teacher: _LocalTeacher
    texts: RecipeTexts
    evaluation: Mapping[str, Any]
    folder: RunFolder

    def run(self, command: str, shares: Mapping[str, float]) -> dict[str, Any]:
        """Runs what is left of the stages, and writes the report."""
        stages = [replace(stage, share=shares.get(stage.name, 0)) for stage in self._stages()]
        self.run_stages(stages)
        # Cheap, and made of what the stages left: done again by every run.
        results = self._report(command)
        table = comparison_table(results)
        print(f"\n{table}\n\nreport: {self.folder / 'report.html'}", flush=True)
        students = [self.folder / folder for folder in self._students()]
        for student in students:
            describe_student(student, self.config, log_history(student), table)
        if self.config.push_to_hub is not None:
            print(f"pushed: {push(students[-1], self.config.push_to_hub)}", flush=True)
        return results

    def prepare(self) -> dict[str, Any]:
        """Runs what is left of the stages before the pairs, and returns what the pairs and the
        calibration depend on, as JSON values. Of a run of one round."""
        *before, pairs, calibration, _ = self._stages()
        self.run_stages(before)
        made = [self.folder.stages[stage.name]["made"] for stage in before]
        settings = {stage.name: stage.settings for stage in (pairs, calibration)}
        return {"student and answers": digest(made), **settings}

    def with_settings(self, config: DistillConfig) -> Distillation:
        """The run with other settings of its stages from the samples on, but for the scorer; what
        these make takes the place of what the folder has."""
        return replace(self, config=config, texts=self.texts.with_settings(config))

    def make_pairs(self) -> list[dict[str, Any]]:
        """Makes the pairs unless they are there, after `prepare`, and returns them."""
        self.folder.stage(self._round(1)[1])
        return self.texts.pairs("train")

    def calibrate(self) -> list[dict[str, Any]]:
        """Trains on the pairs unless that is done, after `make_pairs`, and returns the log."""
        self.folder.stage(self._round(1)[2])
        return log_history(self.folder / "plad")

    def run_stages(self, stages: Sequence[Stage]) -> None:
        """Runs what is left of these."""
        self.folder.announce(stages)
        for stage in stages:
            self.folder.stage(stage)

    def _stages(self) -> list[Stage]:
        of = partial(stage_settings, self.config)
        source = self._student_source()
        rounds = range(1, self.config.rounds + 1)
        judge = {} if self.evaluation["judge"] is None else {"judge": self.evaluation["judge"]}
        scorers = {**self.evaluation["scorers"], **judge}
        return [
            Stage(
                "student",
                self._make_student,
                {**of("student"), "student's weights": model_digest(source)},
                makes=["student"],
            ),
            Stage(
                "teacher's answers",
                self._answer,
                of("teacher's answers", prompts=self.prompts.all),
                makes=self._teacher_files,
            ),
            Stage(
                "fine-tuning",
                self._fine_tune,
                of("fine-tuning", prompts=self.prompts.sft, **self.texts.teachers.choice),
                reads=["student", *self._teacher_files],
                makes=["sft"],
            ),
            *(stage for number in rounds for stage in self._round(number)),
            Stage(
                _of_round("evaluation", rounds[-1]),
                self._evaluate,
                of(
                    "evaluation",
                    prompts=self.prompts.held_out,
                    references=True,
                    **{f"settings of {name}": s.settings() for name, s in scorers.items()},
                ),
                reads=[
                    *self._students(),
                    *self._teacher_files,
                    "pairs/held-out.jsonl",
                    *(f"answers/{file.name}" for file in self._samples_of_pairs().values()),
                ],
                makes=["evaluation"],
            ),
        ]

    @property
    def _teacher_files(self) -> list[str]:
        return [f"answers/{store.name}" for store in self.texts.teachers.stores]

    def _round(self, number: int) -> list[Stage]:
        """Samples of the student that the round starts from, pairs, and training on these."""
        config, texts = self.config, self.texts
        of = partial(stage_settings, config)
        is_first = number == 1
        start = "sft" if is_first else _numbered("plad", number - 1)
        train = _numbered("train", number)
        # The samples of the first round are also those of the held-out pairs.
        asked = [*self.prompts.pairs, *(self.prompts.held_out if is_first else ())]
        students = [(self.folder / start, self._students()[start])]
        base = [] if config.rejected_from == "sft" else ["student"]
        students += [(self.folder / name, "base student") for name in base]
        # Turn 0 is that of the held-out pairs.
        turns = {*config.sample_turns, *([0] if is_first else [])}
        stored = [texts.samples_file(number, turn) for turn in sorted(turns)]
        sample_files = [f"answers/{file.name}" for file in stored]
        files = [f"pairs/{name}.jsonl" for name in ([train, "held-out"] if is_first else [train])]
        dropped = [str(PurePosixPath("pairs", dropped_file(Path(file)).name)) for file in files]

        def samples() -> Answers:
            options: dict[str, Any] = {"round_number": number, "others_aside": True}
            drawn = texts.samples_in_turn(self.prompts.pairs, students, **options)
            if not is_first:
                return drawn
            return {**drawn, **texts.samples(self.prompts.held_out, *students[0], **options)}

        def sample() -> str:
            count = sum(map(len, samples().values()))
            temperatures = ", ".join(f"{value:g}" for value in config.temperatures)
            return f"{count} samples at temperature {temperatures}"

        def pair() -> str:
            drawn, tokenizer = samples(), load_tokenizer(self.folder / "sft")
            prompts, told = "train", []
            try:
                rows, report = texts.make_pairs(self.prompts.pairs, drawn, tokenizer, train)
                show_pairs(rows, report, texts.pairs_file(train), "training pairs")
                told.append(f"train: {report}")
                if is_first:
                    # The teacher's first answer > the student's first sample, whatever is trained.
                    prompts, teacher = "held-out", texts.teachers.answers()
                    rows, report = build_pairs(
                        self.prompts.held_out, teacher, drawn, tokenizer=tokenizer
                    )
                    write_pairs(texts.pairs_file("held-out"), rows, report)
                    told.append(f"held-out: {report}")
            except UsageError as error:
                error.args = (f"{prompts} prompts: {error}",)
                raise
            spent = texts.usage().get("judge")
            return "; ".join([*told, *([] if spent is None else [f"judge: {spent}"])])

        def calibrate() -> str:
            options = {name: getattr(config, name) for name in STAGES["calibration"]}
            if self.prompts.validation:
                options["validation"] = self._validation(number, start)
            output = _numbered("plad", number)
            log = self._train(start, texts.pairs(train), output, **options)
            accuracy = "{:.0%} of the last training pairs ranked right"
            ranked = _last(log, "ranking_accuracy", accuracy)
            inside = _last(log, "active_pairs", "{:.0%} inside the margin")
            told = [verdict for verdict, _ in self._validations(number)]
            return "; ".join([f"{ranked}, {inside}", *told])

        return [
            Stage(
                _of_round("student's samples", number),
                sample,
                of("samples", prompts=asked),
                reads=[start, *base],
                makes=sample_files,
            ),
            Stage(
                _of_round("pairs", number),
                pair,
                of(
                    "pairs",
                    prompts=asked,
                    references=True,
                    **({} if texts.scorer is None else texts.scorer.settings()),
                ),
                reads=[start, *self._teacher_files, *sample_files],
                makes=[*files, *dropped],
            ),
            Stage(
                _of_round("calibration", number),
                calibrate,
                of(
                    "calibration",
                    prompts=self.prompts.validation,
                    references=True,
                    **self._validated_by(),
                ),
                # A validation compares with the teacher's answers.
                reads=[start, files[0], *(self._teacher_files if self.prompts.validation else ())],
                makes=[_numbered("plad", number)],
            ),
        ]

    def _validated_by(self) -> dict[str, Any]:
        """What a validated calibration depends on besides its own settings and the prompts."""
        if not self.prompts.validation:
            return {}
        named = {name: getattr(self.config, name) for name in STAGES["validation"]}
        scorer = self._validation_scorer()
        return {
            **named,
            "saves_per_stage": self.config.saves_per_stage,
            "validation's scorer": None if scorer is None else scorer.settings(),
        }

    def _validation_scorer(self) -> Scorer | None:
        """None for ROUGE-L. A judge compares, and rates nothing by itself."""
        return self.evaluation["scorers"].get(self.config.eval_scorer)

    def _validation(self, number: int, start: str) -> Validation:
        config, answers = self.config, self.texts.best_teacher_answers()
        prompts = [prompt for prompt in self.prompts.validation if prompt.id in answers]
        check = AnswerCheck(
            prompts,
            {prompt.id: answers[prompt.id].text for prompt in prompts},
            load_tokenizer(self.folder / "sft"),
            Sampling(
                config.max_new_tokens, temperature=0.0, batch_size=config.generation_batch_size
            ),
            config.max_length,
            self._validation_scorer(),
            config.reasoning,
        )

        def measure_start(model: PreTrainedModel) -> dict[str, float]:
            file = self.folder / "answers" / f"{_numbered('validation', number)}.json"
            made_by = {"weights": model_digest(self.folder / start), **check.settings()}
            return recorded_scores(file, made_by, lambda: check.measure(model), replace=True)

        return Validation(check.measure, check.settings(), config.patience, measure_start)

    def _validations(self, *rounds: int) -> list[tuple[str, list[list[str]]]]:
        """What the validation of each of these rounds, or of all, kept and why, with its table."""
        students, found = list(self._students().items()), []
        for number in rounds or range(1, self.config.rounds + 1):
            log = log_history(self.folder / students[number][0])
            if told := verdict(log, students[number - 1][1]):
                found.append((told, validation_table(log)))
        return found

    def _make_student(self) -> str:
        """First, because it finds out whether the models can be loaded at all."""
        config, source, layers = self.config, self._student_source(), self.config.student_layers
        if config.student is None:
            model = self.teacher.model
            layers = max(1, round(_LAYERS_KEPT * depth(model))) if layers is None else layers
        else:
            model = load_model(source, merge_adapters=True)
        if layers is not None:
            model = drop_layers(model, layers)
        if (lora := Lora.of(vars(config))) is not None:
            lora.check(model)

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            load_tokenizer(source).save_pretrained(folder)

        self.folder.make_folder("student", fill)
        return f"{depth(model)} layers, from {config.student or 'the teacher'}"

    def _student_source(self) -> str:
        """Of the model that the student is made of."""
        student = self.config.student
        return self.teacher.source if student is None else find_model(student, "--student")

    def _answer(self) -> str:
        answered = self.texts.teachers.ask(renew=True)
        vars(self.teacher).pop("model", None)  # makes room for the student
        stopped, total = self.texts.teachers.stopped, len(self.prompts.all)
        if answered.failures and stopped:
            raise UsageError(
                f"the teacher has answered {len(answered.answers)} of {total} prompts and is asked "
                f"no more: {stopped}; what has come is kept: run the same command again to ask for "
                "the rest, with a larger budget if one was spent"
            )
        finished = self.texts.best_teacher_answers()
        if not finished:
            raise UsageError(
                f"the teacher finished none of its {total} answers within --max-new-tokens "
                f"{self.config.max_new_tokens}; raise it, or ask for short answers"
            )
        findings = check_answers([answer.text for answer in finished.values()], "teacher's answers")
        show_findings(findings)
        require_learnable(findings, "take another teacher, or ask other prompts")
        told = [f"{len(finished)} of {total} answers finished, the others are dropped"]
        if answered.failures:
            told.append(f"{len(answered.failures)} could not be had")
        spent = self.texts.teachers.usage()
        named = len(spent) > 1
        return "; ".join([*told, *(f"{n}: {u}" if named else u for n, u in spent.items())])

    def _fine_tune(self) -> str:
        config, tokenizer = self.config, load_tokenizer(self.folder / "student")
        rows = build_answers(
            self.prompts.sft, self.texts.best_teacher_answers(), tokenizer=tokenizer
        )
        if not rows:
            raise UsageError(
                "the teacher finished no answer for fine-tuning; raise --max-new-tokens"
            )
        log = self._train(
            "student",
            rows,
            "sft",
            loss="sft",
            epochs=config.sft_epochs,
            learning_rate=config.sft_learning_rate,
            batch_size=config.sft_batch_size,
            lora_dropout=config.lora_dropout,
        )
        return f"{len(rows)} answers; {_last(log, 'nll', 'NLL {:.2f} nat per token')}"

    def _evaluate(self) -> str:
        results, _ = self._measure()
        return f"{results['n_prompts']} prompts, {results['n_pairs']} pairs"

    def _report(self, command: str) -> dict[str, Any]:
        config, texts = self.config, self.texts
        results, outputs = self._measure()
        files = {
            _of_round("training pairs", number): texts.pairs_file(_numbered("train", number))
            for number in range(1, config.rounds + 1)
        }
        data = data_of_run(
            {**files, "held-out pairs": texts.pairs_file("held-out")},
            unit="pairs" if config.select == "all" else "prompts",
            teacher=[answer.text for answer in texts.best_teacher_answers().values()],
            students=outputs,
        )
        show_findings(data["findings"])
        write_results(
            self.folder.path,
            results,
            outputs,
            self._held_out_data(),
            title=self._title(),
            config=config.as_dict() | config.results_settings(),
            length_normalization=config.alpha,
            trainings={
                _of_round("calibration", number) if number else "fine-tuning": self.folder / folder
                for number, folder in enumerate(self._students())
            },
            stages=[{"name": name, **stage} for name, stage in self.folder.stages.items()],
            data=data,
            about=self._about(),
            validations=self._validations(),
            command=command,
            versions=versions(),
        )
        return results

    def _title(self) -> str:
        config = self.config
        sources = [self.teacher.source] if config.has_local_teacher else config.teachers
        teacher = " and ".join(map(_name_of, sources))
        into = "" if config.student is None else f" into {_name_of(self._student_source())}"
        return f"Distillation of {teacher}{into}"

    def _about(self) -> str:
        """What the students were trained on, so that nobody takes the whole gain for the
        ranking's."""
        answers, last = self.texts.best_teacher_answers(), list(self._students().values())[-1]
        tuned_on = {prompt.id for prompt in self.prompts.sft if prompt.id in answers}
        pairs = self.texts.pairs("train")
        are_new = tuned_on.isdisjoint(prompt.id for prompt in self.prompts.pairs)
        return (
            f"The {SFT} was fine-tuned on {len(tuned_on)} of the teacher's answers; the {last} is "
            f"that student trained further on {len(pairs)} pairs"
            + " of other prompts, and owes part of any gain to the answers to these" * are_new
            + "."
        )

    def _measure(self) -> tuple[dict[str, Any], list[StudentOutputs]]:
        return evaluate_models(
            {name: self.folder / folder for folder, name in self._students().items()},
            self._held_out_data(),
            self.folder / "evaluation",
            samples=self._samples_of_pairs(),
            others_aside=True,
            **self.evaluation,
        )

    def _samples_of_pairs(self) -> dict[str, Path]:
        """Those of the SFT student that the held-out pairs reject, where an evaluation needs no
        more of them."""
        return {} if self.config.calibration_samples else {SFT: self.texts.samples_file()}

    def _train(
        self, source: str, rows: Sequence[Mapping[str, Any]], output: str, **options: Any
    ) -> list[dict[str, Any]]:
        options |= {name: getattr(self.config, name) for name in _OF_TRAINING}
        saves = self.config.saves_per_stage
        folder = self.folder
        return train_model(
            folder / source, rows, folder / output, saves=saves, replace=True, **options
        )

    def _students(self) -> dict[str, str]:
        """Folder -> name of every student that is evaluated, in the order of training."""
        rounds = self.config.rounds
        names = {"sft": SFT}
        for number in range(1, rounds + 1):
            name = PLAD if rounds == 1 else f"PLaD round {number}"
            names[_numbered("plad", number)] = name
        return names

    def _held_out_data(self) -> HeldOut:
        answers = self.texts.best_teacher_answers()
        prompts = [p for p in self.prompts.held_out if p.id in answers]
        texts = {p.id: answers[p.id].text for p in prompts}
        pairs = self.texts.pairs("held-out")
        by_row = {row_id(p.id, 0): p.id for p in prompts}
        for number, pair in enumerate(pairs, start=1):
            if pair.get("id") not in by_row:
                raise UsageError(
                    f"{self.texts.pairs_file('held-out')}, row {number}: its id, "
                    f"{pair.get('id')!r}, is not that of a held-out prompt that the teacher "
                    "answered; put it right, or delete the file to have it made again"
                )
        return HeldOut(prompts, texts, pairs, [by_row[pair["id"]] for pair in pairs])


def _require_outside(folder: Path, config: DistillConfig) -> None:
    """Raises UsageError where emptying the folder would remove what the run is to read."""
    names = ("student", "prompts", "scorer", "eval_scorer")
    given = [(name, getattr(config, name) or "") for name in names]
    for name, text in [*(("teacher", teacher) for teacher in config.teachers), *given]:
        place = re.sub("^(likelihood|reward|vllm):", "", text)
        if text and (lies_in(place, folder) or lies_in(place.partition("#")[0], folder)):
            raise UsageError(
                f"{flag(name)} {text} lies in --output-dir {folder}, which --overwrite would empty "
                f"before it is read; {ELSEWHERE}"
            )


def _name_of(model: str) -> str:
    """Of a hub id, a folder or a file."""
    return Path(model).name.removesuffix(".gguf")


def _numbered(name: str, number: int) -> str:
    """A file or folder of a round. The first has no number: most runs have no other."""
    return name if number == 1 else f"{name}-{number}"


def _of_round(name: str, number: int) -> str:
    """In words, as `_numbered`."""
    return name if number == 1 else f"{name}, round {number}"


def _last(log: Sequence[Mapping[str, Any]], name: str, text: str) -> str:
    """The last logged value of a metric, in words."""
    values = [entry[name] for entry in log if name in entry]
    return text.format(values[-1]) if values else f"no {name} logged"
