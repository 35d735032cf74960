"""Evaluation and report of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plad_fast.errors import UsageError
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.report.write import write_results
from plad_fast.evaluation.run_students import evaluate_models
from plad_fast.evaluation.students import StudentOutputs
from plad_fast.pairs.generation.answer_rows import row_id
from plad_fast.recipe.data_checks import show_findings
from plad_fast.recipe.doctor import versions
from plad_fast.recipe.inputs import data_of_run
from plad_fast.recipe.run import SFT, Run, numbered, of_round
from plad_fast.recipe.validation import validation_table, verdict
from plad_fast.training.trained_folders import log_history


@dataclass(frozen=True)
class Outcome:
    """What came out of a run whose stages before the evaluation are done."""

    run: Run

    def report(self, command: str) -> dict[str, Any]:
        config, texts = self.run.config, self.run.texts
        results, outputs = self.measure()
        files = {
            of_round("training pairs", number): texts.pairs_file(numbered("train", number))
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
            self.run.folder.path,
            results,
            outputs,
            self._held_out(),
            title=self._title(),
            config=config.as_dict() | config.results_settings(),
            length_normalization=config.alpha,
            trainings={
                of_round("preference training", number)
                if number
                else "fine-tuning": self.run.folder / folder
                for number, folder in enumerate(self.run.students)
            },
            stages=[{"name": name, **stage} for name, stage in self.run.folder.stages.items()],
            data=data,
            about=self._about(),
            validations=self.validations(),
            command=command,
            versions=versions(),
        )
        return results

    def _title(self) -> str:
        config = self.run.config
        sources = [self.run.teacher.source] if config.has_local_teacher else config.teachers
        teacher = " and ".join(map(_name_of, sources))
        into = "" if config.student is None else f" into {_name_of(self.run.student_source)}"
        return f"Distillation of {teacher}{into}"

    def _about(self) -> str:
        """What the students were trained on, so that nobody takes the whole gain for the
        ranking's."""
        answers, last = self.run.texts.best_teacher_answers(), list(self.run.students.values())[-1]
        tuned_on = {prompt.id for prompt in self.run.prompts.sft if prompt.id in answers}
        pairs = self.run.texts.pairs("train")
        are_new = tuned_on.isdisjoint(prompt.id for prompt in self.run.prompts.pairs)
        return (
            f"The {SFT} was fine-tuned on {len(tuned_on)} of the teacher's answers; the {last} is "
            f"that student trained further on {len(pairs)} pairs"
            + " of other prompts, and owes part of any gain to the answers to these" * are_new
            + "."
        )

    def measure(self) -> tuple[dict[str, Any], list[StudentOutputs]]:
        return evaluate_models(
            {name: self.run.folder / folder for folder, name in self.run.students.items()},
            self._held_out(),
            self.run.folder / "evaluation",
            samples=self.samples_of_pairs(),
            others_aside=True,
            **self.run.evaluation,
        )

    def samples_of_pairs(self) -> dict[str, Path]:
        """Those of the SFT student that the held-out pairs reject, where an evaluation needs no
        more of them."""
        return {} if self.run.config.calibration_samples else {SFT: self.run.texts.samples_file()}

    def validations(self, *rounds: int) -> list[tuple[str, list[list[str]]]]:
        """What the validation of each of these rounds, or of all, kept and why, with its table."""
        students, found = list(self.run.students.items()), []
        for number in rounds or range(1, self.run.config.rounds + 1):
            log = log_history(self.run.folder / students[number][0])
            if told := verdict(log, students[number - 1][1]):
                found.append((told, validation_table(log)))
        return found

    def _held_out(self) -> HeldOut:
        answers = self.run.texts.best_teacher_answers()
        prompts = [p for p in self.run.prompts.held_out if p.id in answers]
        texts = {p.id: answers[p.id].text for p in prompts}
        pairs = self.run.texts.pairs("held-out")
        by_row = {row_id(p.id, 0): p.id for p in prompts}
        for number, pair in enumerate(pairs, start=1):
            if pair.get("id") not in by_row:
                raise UsageError(
                    f"{self.run.texts.pairs_file('held-out')}, row {number}: its id, "
                    f"{pair.get('id')!r}, is not that of a held-out prompt that the teacher "
                    "answered; put it right, or delete the file to have it made again"
                )
        return HeldOut(prompts, texts, pairs, [by_row[pair["id"]] for pair in pairs])


def _name_of(model: str) -> str:
    """Of a hub id, a folder or a file."""
    return Path(model).name.removesuffix(".gguf")
