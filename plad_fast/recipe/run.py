"""What the stages of a run share: its settings, prompts, texts, scorers and folder; and what came
out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plad_fast.errors import UsageError
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.report.write import write_results
from plad_fast.evaluation.run_students import evaluate_models
from plad_fast.evaluation.students import StudentOutputs
from plad_fast.models.loading import find_model
from plad_fast.pairs.generation.answer_rows import row_id
from plad_fast.recipe.data_checks import show_findings
from plad_fast.recipe.dependencies import OF_TRAINING
from plad_fast.recipe.doctor import versions
from plad_fast.recipe.inputs import RunPrompts, data_of_run
from plad_fast.recipe.run_folder import RunFolder
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.texts import RecipeTexts
from plad_fast.recipe.validation import validation_table, verdict
from plad_fast.training.train import train_model
from plad_fast.training.trained_folders import log_history
from plad_fast.training.validation import best_check

SFT, PLAD = "SFT student", "PLaD student"
NLL = "NLL {:.2f} nat per token"
_IN_MEMORY = ("micro_batch_size", "max_tokens_per_batch", "gradient_checkpointing")


@dataclass(frozen=True)
class Run:
    """What was read and opened for a run."""

    config: DistillConfig
    prompts: RunPrompts
    texts: RecipeTexts
    evaluation: Mapping[str, Any]
    """Options of `evaluate_models`."""
    folder: RunFolder

    @property
    def students(self) -> dict[str, str]:
        """Folder -> name of every student that is evaluated, in the order of training."""
        further = {numbered("plad", number): f"{PLAD} {number}" for number in self._rounds[1:]}
        return {"sft": SFT, "plad": PLAD, **further}

    @property
    def _rounds(self) -> range:
        return range(1, self.config.rounds + 1)

    @property
    def teacher_files(self) -> list[str]:
        return [f"answers/{store.name}" for store in self.texts.teachers.stores]

    def train(
        self, source: str, rows: Sequence[Mapping[str, Any]], output: str, **options: Any
    ) -> list[dict[str, Any]]:
        options |= {name: getattr(self.config, name) for name in (*OF_TRAINING, *_IN_MEMORY)}
        options["training"] = named_run(self.config, output)
        return train_model(
            self.folder / source,
            rows,
            self.folder / output,
            saves=self.config.saves_per_stage,
            replace=True,
            base=f"../{source}",
            **options,
        )

    def report(self, command: str) -> dict[str, Any]:
        config, texts = self.config, self.texts
        results, outputs = self.measure()
        files = {
            of_round("training pairs", number): texts.pairs_file(numbered("train", number))
            for number in self._rounds
        }
        folders = [self.folder / name for name in self.students]
        trainings = ["fine-tuning", *(of_round("preference training", n) for n in self._rounds)]
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
            self._held_out(),
            title=self._title(),
            config=config.as_dict() | config.results_settings(),
            length_normalization=config.alpha,
            trainings=dict(zip(trainings, folders, strict=True)),
            stages=[{"name": name, **stage} for name, stage in self.folder.stages.items()],
            data=data,
            about=self._about(),
            validations=self.validations(),
            command=command,
            versions=versions(),
        )
        return results

    def _title(self) -> str:
        config = self.config
        sources = config.teachers
        if config.has_local_teacher:
            sources = (find_model(config.teachers[0], "--teacher"),)
        teacher = " and ".join(map(_name_of, sources))
        into = "" if config.student is None else f" into {_name_of(student_source(config))}"
        return f"Distillation of {teacher}{into}"

    def _about(self) -> str:
        """What the students were trained on, so that nobody takes the whole gain for the
        ranking's."""
        answers, last = self.texts.best_teacher_answers(), list(self.students.values())[-1]
        tuned_on = {prompt.id for prompt in self.prompts.sft if prompt.id in answers}
        told = f"The {SFT} was fine-tuned on {len(tuned_on)} of the teacher's answers; the {last}"
        best = {n: best_check(log_history(self.folder / numbered("plad", n))) for n in self._rounds}
        kept = [n for n, check in best.items() if check is None or check["step"] > 0]
        if not kept:
            return f"{told} is that student, which validation kept."
        pairs = sum(len(self.texts.pairs(numbered("train", number))) for number in kept)
        are_new = tuned_on.isdisjoint(prompt.id for prompt in self.prompts.pairs)
        return (
            f"{told} is that student trained further on {pairs} pairs"
            + " of other prompts, and owes part of any gain to the answers to these" * are_new
            + "."
        )

    def measure(self) -> tuple[dict[str, Any], list[StudentOutputs]]:
        return evaluate_models(
            {name: self.folder / folder for folder, name in self.students.items()},
            self._held_out(),
            self.folder / "evaluation",
            samples=self.samples_of_pairs(),
            others_aside=True,
            **self.evaluation,
        )

    def samples_of_pairs(self) -> dict[str, Path]:
        """Those of the SFT student that the held-out pairs reject, where an evaluation needs no
        more of them."""
        return {} if self.config.calibration_samples else {SFT: self.texts.samples_file()}

    def validations(self, *rounds: int) -> list[tuple[str, list[list[str]]]]:
        """What the validation of each of these rounds, or of all, kept and why, with its table."""
        students, found = list(self.students.items()), []
        for number in rounds or self._rounds:
            log = log_history(self.folder / students[number][0])
            if told := verdict(log, students[number - 1][1]):
                found.append((told, validation_table(log)))
        return found

    def _held_out(self) -> HeldOut:
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


def student_source(config: DistillConfig) -> str:
    """The model that the student is made of: the teacher, unless one is named."""
    if config.student is None:
        return find_model(config.teachers[0], "--teacher")
    return find_model(config.student, "--student")


def named_run(config: DistillConfig, stage: str) -> dict[str, Any]:
    """The settings of the trainer, with a name of its own for the log of this stage where there is
    one: W&B and others would else put stages under the same name."""
    given = dict(config.training or {})
    if given.get("report_to") not in (None, "none"):
        given["run_name"] = f"{given.get('run_name') or Path(config.output_dir).name}-{stage}"
    return given


def numbered(name: str, number: int) -> str:
    """A file or folder of a round. The first has no number: most runs have no other."""
    return name if number == 1 else f"{name}-{number}"


def of_round(name: str, number: int) -> str:
    """In words, as `numbered`."""
    return name if number == 1 else f"{name}, round {number}"


def last_logged(log: Sequence[Mapping[str, Any]], name: str, text: str) -> str:
    """The last logged value of a metric, in words."""
    values = [entry[name] for entry in log if name in entry]
    return text.format(values[-1]) if values else f"no {name} logged"


def _name_of(model: str) -> str:
    """Of a hub id, a folder or a file, or of a column of answers."""
    if model.startswith("column:"):
        return f"the column {model.removeprefix('column:')!r}"
    return Path(model).name.removesuffix(".gguf")
