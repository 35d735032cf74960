"""The recipe of the PLaD paper, stage by stage, in a folder that survives being killed.

teacher's answers -> fine-tuning
-> student's samples -> pairs -> preference training, once or in several rounds -> evaluation

PLaD, Zhang et al. 2024, arXiv 2406.02886, section 3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.checks import require_packages
from plad_fast.data.files import write_atomically
from plad_fast.data.records import digest, model_digest
from plad_fast.data.store import has_rows
from plad_fast.errors import UsageError
from plad_fast.evaluation.report.terminal import comparison_table
from plad_fast.models.gguf_files import gguf_read_once
from plad_fast.models.layer_drop import depth, drop_layers
from plad_fast.models.loading import (
    check_loadable,
    find_model,
    load_model,
    load_tokenizer,
)
from plad_fast.models.lora import Lora
from plad_fast.pairs.build import build_answers
from plad_fast.recipe.cards import describe_student
from plad_fast.recipe.data_checks import check_answers, require_learnable, show_findings
from plad_fast.recipe.dependencies import bound_settings, stage_settings
from plad_fast.recipe.hub import check_push, push
from plad_fast.recipe.inputs import RunPrompts
from plad_fast.recipe.rounds import Round
from plad_fast.recipe.run import NLL, Run, last_logged, of_round, student_source
from plad_fast.recipe.run_folder import RunFolder, Stage
from plad_fast.recipe.setting_checks import require_outside
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.sources import held_out_options
from plad_fast.recipe.teachers import require_tools
from plad_fast.recipe.texts import RecipeTexts
from plad_fast.training.launch import check_launch
from plad_fast.training.train import adapters_and_arguments
from plad_fast.training.trained_folders import log_history

if TYPE_CHECKING:
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint

_LAYERS_KEPT = 0.9
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
    adapters_and_arguments({**vars(config), "loss": "sft"})
    _check_launch(config)
    if config.push_to_hub is not None:
        has_adapters = config.lora_r is not None and not config.merge
        check_push(config.push_to_hub, adapters_on="the student" if has_adapters else None)
    config.require_room()
    if not config.has_local_teacher and config.student is None:
        raise UsageError(
            f"a student cannot be made of the teacher {' and '.join(config.teachers)}, whose "
            "weights are not here, or of several; give a model to start from with --student"
        )
    path = Path(config.output_dir)
    prompts = prompts or RunPrompts.of(config)
    if overwrite:
        require_outside(path, config)
    # Teacher, scorers and judge are made before any work, so that what is wrong with them is found.
    judges: dict[str, Endpoint] = {}
    evaluation = held_out_options(config, path / "evaluation", judges)
    for scorer in evaluation["scorers"].values():
        scorer.check([*prompts.held_out, *prompts.validation])
    source = student_source(config)
    if any(prompt.has_tools for prompt in prompts.all):
        require_tools(config, prompts.all, load_tokenizer(source))
    texts = RecipeTexts(
        config,
        prompts.all,
        answers=path / "answers",
        pairs=path / "pairs",
        endpoints=judges,
    )
    if overwrite or not (path / "student").exists():
        check_loadable(source)
        if config.has_local_teacher:
            check_loadable(find_model(config.teachers[0], "--teacher"))
    folder = RunFolder(
        path,
        bound_settings(config, texts.teachers.made_by),
        overwrite=overwrite,
        is_bound=lambda: any(map(has_rows, texts.teachers.stores)),
        made=_MADE,
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
        yield Distillation(config, prompts, texts, evaluation, folder)


class Distillation(Run):
    """The stages of a run."""

    def run(self, command: str, shares: Mapping[str, float]) -> dict[str, Any]:
        """Runs what is left of the stages, and writes the report."""
        stages = [replace(stage, share=shares.get(stage.name, 0)) for stage in self._stages()]
        self.run_stages(stages)
        # Cheap, and made of what the stages left: done again by every run.
        results = self.report(command)
        table = comparison_table(results)
        print(f"\n{table}\n\nreport: {self.folder / 'report.html'}", flush=True)
        students = [self.folder / folder for folder in self.students]
        for student in students:
            describe_student(student, self.config, log_history(student), table)
        if self.config.push_to_hub is not None:
            print(f"pushed: {push(students[-1], self.config.push_to_hub)}", flush=True)
        return results

    def prepare(self) -> dict[str, Any]:
        """Runs what is left of the stages before the pairs, and returns what the pairs and the
        preference training depend on, as JSON values. Of a run of one round."""
        *before, pairs, training, _ = self._stages()
        self.run_stages(before)
        made = [self.folder.stages[stage.name]["made"] for stage in before]
        settings = {stage.name: stage.settings for stage in (pairs, training)}
        return {"student and answers": digest(made), **settings}

    def with_settings(self, config: DistillConfig) -> Distillation:
        """The run with other settings of its stages from the samples on, but for the scorer; what
        these make takes the place of what the folder has. UsageError where the processes of this
        run cannot train so."""
        _check_launch(config)
        return replace(self, config=config, texts=self.texts.with_settings(config))

    def make_pairs(self) -> list[dict[str, Any]]:
        """Makes the pairs unless they are there, after `prepare`, and returns them."""
        self.folder.stage(Round(self, 1).stages()[1])
        return self.texts.pairs("train")

    def train_on_pairs(self) -> list[dict[str, Any]]:
        """Trains on the pairs unless that is done, after `make_pairs`, and returns the log."""
        self.folder.stage(Round(self, 1).stages()[2])
        return log_history(self.folder / "plad")

    def run_stages(self, stages: Sequence[Stage]) -> None:
        """Runs what is left of these."""
        self.folder.announce(stages)
        for stage in stages:
            self.folder.stage(stage)

    def _stages(self) -> list[Stage]:
        of = partial(stage_settings, self.config)
        source = student_source(self.config)
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
                makes=self.teacher_files,
            ),
            Stage(
                "fine-tuning",
                self._fine_tune,
                of("fine-tuning", prompts=self.prompts.sft, **self.texts.teachers.choice),
                reads=["student", *self.teacher_files],
                makes=["sft"],
            ),
            *(stage for number in rounds for stage in Round(self, number).stages()),
            Stage(
                of_round("evaluation", rounds[-1]),
                self._evaluate,
                of(
                    "evaluation",
                    prompts=self.prompts.held_out,
                    references=True,
                    **{f"settings of {name}": s.settings() for name, s in scorers.items()},
                ),
                reads=[
                    *self.students,
                    *self.teacher_files,
                    "pairs/held-out.jsonl",
                    *(f"answers/{file.name}" for file in self.samples_of_pairs().values()),
                ],
                makes=["evaluation"],
                checks_itself=True,  # stores and scores with fingerprints, also of other rounds
            ),
        ]

    @gguf_read_once()
    def _make_student(self) -> str:
        """First, because it finds out whether the models can be loaded at all."""
        config, layers = self.config, self.config.student_layers
        source = student_source(config)
        model = load_model(source, merge_adapters=True)
        if config.student is None and layers is None:
            layers = max(1, round(_LAYERS_KEPT * depth(model)))
        if layers is not None:
            model = drop_layers(model, layers)
        if (lora := Lora.of(vars(config))) is not None:
            lora.check(model)

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            load_tokenizer(source).save_pretrained(folder)

        self.folder.make_folder("student", fill)
        return f"{depth(model)} layers, from {config.student or 'the teacher'}"

    def _answer(self) -> str:
        answered = self.texts.teachers.ask()
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
                f"{self.config.max_new_tokens}; raise it in another --output-dir (or with "
                "--overwrite), or ask for short answers"
            )
        for prompts, purpose in (
            *((self.prompts.sft, "fine-tuning"), (self.prompts.pairs, "pairs")),
            *((self.prompts.held_out, "evaluation"), (self.prompts.validation, "validation")),
        ):
            if prompts and not any(prompt.id in finished for prompt in prompts):
                raise UsageError(
                    f"the teacher finished no answer to the {len(prompts)} prompts for {purpose}; "
                    "raise --max-new-tokens in another --output-dir (or with --overwrite), or give "
                    "prompts that it answers"
                )
        findings = check_answers([answer.text for answer in finished.values()], "teacher's answers")
        show_findings(findings)
        require_learnable(findings, "take another teacher, or ask other prompts")
        others = ", the others are dropped" if len(finished) < total else ""
        told = [f"{len(finished)} of {total} answers finished{others}"]
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
                "the teacher finished no answer for fine-tuning; raise --max-new-tokens in "
                "another --output-dir (or with --overwrite)"
            )
        log = self.train(
            "student",
            rows,
            "sft",
            loss="sft",
            epochs=config.sft_epochs,
            learning_rate=config.sft_learning_rate,
            batch_size=config.sft_batch_size,
            lora_dropout=config.lora_dropout,
        )
        return f"{len(rows)} answers; {last_logged(log, 'nll', NLL)}"

    def _evaluate(self) -> str:
        results, _ = self.measure()
        return f"{results['n_prompts']} prompts, {results['n_pairs']} pairs"


def _check_launch(config: DistillConfig) -> None:
    sizes = {"--batch-size": config.batch_size, "--sft-batch-size": config.sft_batch_size}
    check_launch(sizes, vars(config), validates=config.validation > 0)
