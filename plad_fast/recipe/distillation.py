"""The recipe of the PLaD paper, stage by stage, in a folder that survives being killed.

teacher's answers -> fine-tuning
-> student's samples -> pairs -> calibration, once or in several rounds -> evaluation

PLaD, Zhang et al. 2024, arXiv 2406.02886, section 3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from plad_fast.data.files import write_atomically
from plad_fast.data.places import lies_in
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
from plad_fast.pairs.generation.answer_rows import row_id
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.recipe.data_checks import check_answers, require_learnable
from plad_fast.recipe.dependencies import scorer_settings, stage_settings, student_settings
from plad_fast.recipe.doctor import require_packages, versions
from plad_fast.recipe.fields import flag
from plad_fast.recipe.inputs import (
    RunPrompts,
    data_of_run,
    dropped_file,
    show_findings,
    show_pairs,
)
from plad_fast.recipe.pair_settings import OFFLINE_TEACHER
from plad_fast.recipe.run_folder import RunFolder, Stage
from plad_fast.recipe.scoring import held_out_scoring
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.texts import Answers, RecipeTexts, sampling_for
from plad_fast.training.train import train_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint

SFT, PLAD = "SFT student", "PLaD student"
_LAYERS_KEPT = 0.9
_TEACHER_FILE = "answers/teacher.jsonl"
# In the folder of a run, with what a kill leaves; what else lies there is the user's.
_MADE = (
    r"(config|metrics)\.json|report\.html|plad-fast-error\.log|answers|evaluation|pairs|plots"
    r"|student|(sft|plad)(-\d+)?(\.checkpoints)?|\..+\.(partial|tmp)"
)


def distill(config: DistillConfig, *, overwrite: bool = False, command: str = "") -> dict[str, Any]:
    """Run the recipe, or what is left of it, and return the metrics.

    Args:
        config: the settings. In a folder made with others, the stages that depend on what has
            changed run anew; one with answers of another teacher is refused.
        overwrite: start anew in a folder of an earlier run.
        command: what the report says to run again.

    Raises:
        UsageError: bad input, found before long work where it can be.
    """
    require_packages("transformers", "datasets", "accelerate", "rouge_score", "matplotlib")
    require_one_gpu()
    config.require_room()
    if not config.has_local_teacher and config.student is None:
        raise UsageError(
            f"a student cannot be made of the teacher {config.teacher}, whose weights are not "
            "here; give a model to start from with --student"
        )
    path = Path(config.output_dir)
    prompts = RunPrompts.of(config)
    if overwrite:
        _require_outside(path, config)
    # Teacher, scorers and judge are made before any work, so that what is wrong with them is found.
    judges: dict[str, Endpoint] = {}
    scoring = held_out_scoring(config, path / "evaluation", judges)
    for scorer in scoring["scorers"].values():
        scorer.check(prompts.held_out)
    teacher = _LocalTeacher(config)
    texts = RecipeTexts(
        config,
        prompts.all,
        answers=path / "answers",
        pairs=path / "pairs",
        load_teacher=teacher.as_text,
        judges=judges,
    )
    if overwrite or not (path / "student").exists():
        if config.student is not None:
            check_loadable(find_model(config.student, "--student"))
        if config.has_local_teacher:
            check_loadable(teacher.source)
    folder = RunFolder(
        path,
        texts.teacher_settings(),
        overwrite=overwrite,
        is_bound=texts.has_teacher_answers,
        is_own=lambda name: re.fullmatch(_MADE, name) is not None,
        # Before the folder keeps settings that an endpoint refuses.
        check=lambda: texts.try_endpoints(scoring["judge"], overwrite=overwrite),
    )
    with closing(folder):
        write_atomically(folder / "config.json", json.dumps(config.as_dict(), indent=2))
        return _Distillation(config, prompts, teacher, texts, scoring, folder).run(command)


class _LocalTeacher:
    """The teacher's model, loaded once for the student and the answers: a GGUF file takes its
    time."""

    def __init__(self, config: DistillConfig) -> None:
        is_offline = config.teacher == OFFLINE_TEACHER
        self.source = str(offline_teacher_path()) if is_offline else config.teacher
        self._precision = config.precision
        self._model: PreTrainedModel | None = None

    def model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = load_model(self.source, merge_adapters=True)
        return self._model

    def as_text(self) -> LocalModel:
        model = self.model().to(device=best_device(), dtype=autocast_dtype(self._precision))
        return LocalModel(model, load_tokenizer(self.source), "teacher")

    def release(self) -> None:
        self._model = None


@dataclass(frozen=True)
class _Distillation:
    """The stages of a run, on what was read and opened for them."""

    config: DistillConfig
    prompts: RunPrompts
    teacher: _LocalTeacher
    texts: RecipeTexts
    scoring: Mapping[str, Any]
    folder: RunFolder

    def run(self, command: str) -> dict[str, Any]:
        """Runs what is left of the stages, and writes the report."""
        prompts = self.prompts
        print(
            f"{len(prompts.all)} prompts: {len(prompts.train)} to train on "
            f"({len(prompts.sft)} of them for fine-tuning), {len(prompts.held_out)} held out; "
            f"run folder {self.folder.path}",
            flush=True,
        )
        stages = self._stages()
        self.folder.announce(stages)
        for stage in stages:
            self.folder.stage(stage)
        # Cheap, and made of what the stages left: done again by every run.
        results = self._report(command)
        print(f"\n{comparison_table(results)}\n\nreport: {self.folder / 'report.html'}", flush=True)
        return results

    def _stages(self) -> list[Stage]:
        of = partial(stage_settings, self.config)
        rounds = range(1, self.config.rounds + 1)
        return [
            Stage(
                "student",
                self._make_student,
                student_settings(self.config, self.teacher.source),
                makes=["student"],
            ),
            Stage(
                "teacher's answers",
                self._answer,
                of("teacher's answers", prompts=self.prompts.all),
                makes=[_TEACHER_FILE],
            ),
            Stage(
                "fine-tuning",
                self._fine_tune,
                of("fine-tuning", prompts=self.prompts.sft),
                reads=["student", _TEACHER_FILE],
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
                    **scorer_settings(self.scoring["scorers"], self.scoring["judge"]),
                ),
                reads=[*self._students(), _TEACHER_FILE, "pairs/held-out.jsonl"],
                makes=["evaluation"],
            ),
        ]

    def _round(self, number: int) -> list[Stage]:
        of, scorer = partial(stage_settings, self.config), self.texts.scorer
        start = _start(number)
        # The samples of the first round are also those of the held-out pairs.
        is_first = number == 1
        asked = [*self.prompts.pairs, *(self.prompts.held_out if is_first else ())]
        samples = f"answers/{_numbered('student', number)}.jsonl"
        pairs = f"pairs/{_numbered('train', number)}.jsonl"
        made = [pairs, *(["pairs/held-out.jsonl"] if is_first else ())]
        dropped = [str(PurePosixPath("pairs", dropped_file(Path(file)).name)) for file in made]
        scores = {} if scorer is None else scorer.settings()
        return [
            Stage(
                _of_round("student's samples", number),
                partial(self._sample, number),
                of("samples", prompts=asked),
                reads=[start],
                makes=[samples],
            ),
            Stage(
                _of_round("pairs", number),
                partial(self._pair, number),
                of("pairs", prompts=asked, references=True, **scores),
                reads=[start, _TEACHER_FILE, samples],
                makes=[*made, *dropped],
            ),
            Stage(
                _of_round("calibration", number),
                partial(self._calibrate, number),
                of("calibration"),
                reads=[start, pairs],
                makes=[_numbered("plad", number)],
            ),
        ]

    def _make_student(self) -> str:
        """First, because it finds out whether the models can be loaded at all."""
        config = self.config

        def fill(folder: Path) -> None:
            if config.student is None:
                source, model = self.teacher.source, self.teacher.model()
            else:
                source = find_model(config.student, "--student")
                model = load_model(source, merge_adapters=True)
            tokenizer = load_tokenizer(source)
            layers = config.student_layers
            if layers is None and config.student is None:
                layers = max(1, round(_LAYERS_KEPT * depth(model)))
            if layers is not None:
                model = drop_layers(model, layers if isinstance(layers, int) else list(layers))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        path = self.folder.make_folder("student", fill)
        saved = json.loads((path / "config.json").read_text())
        # Of an encoder-decoder model these are the layers of the decoder, which may be dropped.
        names = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
        layers = next((saved[name] for name in names if name in saved), "?")
        return f"{layers} layers, from {config.student or 'the teacher'}"

    def _answer(self) -> str:
        self.texts.renew_teacher_answers()
        answered = self.texts.ask_teacher()
        self.teacher.release()
        self.texts.require_all_asked(answered)
        finished, total = self.texts.best_teacher_answers(), len(self.prompts.all)
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
        return "; ".join([*told, *filter(None, [self.texts.usage().get("teacher")])])

    def _fine_tune(self) -> str:
        rows = self.texts.fine_tuning_rows(
            self.prompts.sft, load_tokenizer(self.folder / "student")
        )
        log = self._train(
            "student",
            rows,
            "sft",
            loss="sft",
            epochs=self.config.sft_epochs,
            learning_rate=self.config.sft_learning_rate,
            batch_size=self.config.sft_batch_size,
        )
        return f"{len(rows)} answers; {_last(log, 'nll', 'NLL {:.2f} nat per token')}"

    def _sample(self, number: int) -> str:
        samples = self._samples(number)
        count = sum(map(len, samples.values()))
        return f"{count} samples at temperature {self.config.student_temperature:g}"

    def _pair(self, number: int) -> str:
        samples = self._samples(number)
        tokenizer = load_tokenizer(self.folder / "sft")
        file, name = _numbered("train", number), "train"
        lines = []
        try:
            rows, report = self.texts.make_pairs(self.prompts.pairs, samples, tokenizer, file)
            show_pairs(rows, report, self.texts.pairs_file(file), "training pairs")
            lines.append(f"train: {report}")
            if number == 1:
                name, held_out = "held-out", self.prompts.held_out
                report = self.texts.make_held_out_pairs(held_out, samples, tokenizer)
                lines.append(f"held-out: {report}")
        except UsageError as error:
            raise UsageError(f"{name} prompts: {error}") from None
        spent = self.texts.usage().get("judge")
        return "; ".join([*lines, *([] if spent is None else [f"judge: {spent}"])])

    def _calibrate(self, number: int) -> str:
        config = self.config
        log = self._train(
            _start(number),
            self.texts.pairs(_numbered("train", number)),
            _numbered("plad", number),
            loss=config.loss,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            beta=config.beta,
            loss_args=config.loss_args,
            sft_weight=config.sft_weight,
            length_normalization=config.length_normalization,
        )
        ranked = _last(log, "ranking_accuracy", "{:.0%} of the last training pairs ranked right")
        return f"{ranked}, {_last(log, 'active_pairs', '{:.0%} inside the margin')}"

    def _evaluate(self) -> str:
        results, _ = self._measure()
        return f"{results['n_prompts']} prompts, {results['n_pairs']} pairs"

    def _report(self, command: str) -> dict[str, Any]:
        config = self.config
        results, outputs = self._measure()
        data = self._data(outputs)
        show_findings(data["findings"])
        write_results(
            self.folder.path,
            results,
            outputs,
            self._held_out_data(),
            title=f"Distillation of {Path(self.teacher.source).stem}",
            config=config.as_dict() | config.results_settings(),
            length_normalization=config.alpha,
            trainings={
                _of_round("calibration", number) if number else "fine-tuning": self.folder / folder
                for number, folder in enumerate(self._students())
            },
            stages=[{"name": name, **stage} for name, stage in self.folder.stages.items()],
            data=data,
            command=command,
            versions=versions(),
        )
        return results

    def _data(self, outputs: Sequence[StudentOutputs]) -> dict[str, Any]:
        """What became of the prompts, and what to look at in the texts."""
        numbers = range(1, self.config.rounds + 1)
        files = {_of_round("training pairs", n): _numbered("train", n) for n in numbers}
        files["held-out pairs"] = "held-out"
        return data_of_run(
            {name: self.texts.pairs_file(file) for name, file in files.items()},
            unit="pairs" if self.config.select == "all" else "prompts",
            teacher=[answer.text for answer in self.texts.best_teacher_answers().values()],
            students=outputs,
        )

    def _measure(self) -> tuple[dict[str, Any], list[StudentOutputs]]:
        return evaluate_models(
            {name: self.folder / folder for folder, name in self._students().items()},
            self._held_out_data(),
            self.folder / "evaluation",
            sampling=sampling_for(self.config, "student", n=1),
            length_normalization=self.config.alpha,
            max_length=self.config.max_length,
            precision=self.config.precision,
            others_aside=True,
            **self.scoring,
        )

    def _train(
        self, source: str, rows: Sequence[Mapping[str, Any]], output: str, **options: Any
    ) -> list[dict[str, Any]]:
        config = self.config
        return train_model(
            self.folder / source,
            rows,
            self.folder / output,
            micro_batch_size=config.micro_batch_size,
            max_tokens_per_batch=config.max_tokens_per_batch,
            saves=config.saves_per_stage,
            seed=config.seed,
            precision=config.precision,
            max_length=config.max_length,
            gradient_checkpointing=config.gradient_checkpointing,
            replace=True,
            **options,
        )

    def _samples(self, number: int) -> Answers:
        """For the pairs of a round; in the first one for the held-out pairs too."""
        folder = _start(number)
        draw = partial(
            self.texts.samples,
            model=self.folder / folder,
            name=self._students()[folder],
            round_number=number,
            others_aside=True,
        )
        samples = draw(self.prompts.pairs)
        return {**samples, **draw(self.prompts.held_out, n=1)} if number == 1 else samples

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
    for name in ("teacher", "student", "prompts", "scorer", "eval_scorer"):
        text = getattr(config, name) or ""
        place = re.sub("^(likelihood|reward):", "", text)
        if text and (lies_in(place, folder) or lies_in(place.partition("#")[0], folder)):
            raise UsageError(
                f"{flag(name)} {text} lies in --output-dir {folder}, which --overwrite would empty "
                "before it is read; choose another --output-dir"
            )


def _numbered(name: str, number: int) -> str:
    """A file or folder of a round. The first has no number: most runs have no other."""
    return name if number == 1 else f"{name}-{number}"


def _of_round(name: str, number: int) -> str:
    """In words, as `_numbered`."""
    return name if number == 1 else f"{name}, round {number}"


def _start(number: int) -> str:
    """The folder of the student that a round starts from."""
    return "sft" if number == 1 else _numbered("plad", number - 1)


def _last(log: Sequence[Mapping[str, Any]], name: str, text: str) -> str:
    """The last logged value of a metric, in words."""
    values = [entry[name] for entry in log if name in entry]
    return text.format(values[-1]) if values else f"no {name} logged"
