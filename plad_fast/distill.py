"""The recipe of the PLaD paper, stage by stage, in a folder that survives being killed.

teacher's answers -> fine-tuning -> student's samples -> pairs -> calibration -> evaluation

PLaD, Zhang et al. 2024, arXiv 2406.02886, section 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast._devices import autocast_dtype, best_device, require_one_gpu
from plad_fast._packages import require_packages, versions
from plad_fast._recipe_data import (
    load_recipe_prompts,
    prompts_digest,
    read_jsonl,
    split_prompts,
    write_jsonl,
)
from plad_fast.errors import UsageError
from plad_fast.evaluation import (
    StudentOutputs,
    comparison_table,
    write_atomically,
    write_metrics,
)
from plad_fast.held_out import (
    HeldOut,
    draw_plots,
    evaluate_models,
    example_answers,
    margin_unit,
)
from plad_fast.pairs import (
    Answer,
    LocalModel,
    Sampling,
    as_messages,
    as_response,
    build_pairs,
    stored_answers,
)
from plad_fast.recipe import OFFLINE_TEACHER, DistillConfig
from plad_fast.report import write_report
from plad_fast.run_folder import RunFolder
from plad_fast.students import drop_layers, load_model, load_tokenizer, offline_teacher_path
from plad_fast.training import train_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SFT, PLAD = "SFT student", "PLaD student"
_LAYERS_KEPT = 0.9


def distill(config: DistillConfig, *, overwrite: bool = False, command: str = "") -> dict[str, Any]:
    """Run the recipe, or what is left of it, and return the metrics.

    Args:
        config: the settings. A folder made with others is refused.
        overwrite: start anew in a folder of an earlier run.
        command: what the report says to run again.

    Raises:
        UsageError: bad input, found before long work where it can be.
    """
    require_packages("transformers", "datasets", "accelerate", "rouge_score", "matplotlib")
    require_one_gpu()
    run = _Distillation(config, overwrite, command)
    try:
        return run.run()
    finally:
        run.folder.close()


class _Distillation:
    def __init__(self, config: DistillConfig, overwrite: bool, command: str) -> None:
        self.config = config
        self.command = command
        self.prompts = load_recipe_prompts(config)
        self.train, self.held_out = split_prompts(self.prompts, config.held_out, config.seed)
        self.sft_prompts = self.train[: max(1, round(len(self.train) * config.sft_share))]
        # Samples for prompts that fine-tuning has seen come out too close to the teacher's answers.
        self.pair_prompts = self.train[len(self.sft_prompts) :] or self.train
        self.teacher_source = (
            str(offline_teacher_path()) if config.teacher == OFFLINE_TEACHER else config.teacher
        )
        self._teacher: PreTrainedModel | None = None
        settings = {
            **config.results_settings(),
            "prompts_digest": prompts_digest(self.prompts),
        }
        self.folder = RunFolder(config.output_dir, settings, overwrite=overwrite)
        write_atomically(self.folder / "config.json", json.dumps(config.as_dict(), indent=2))

    def run(self) -> dict[str, Any]:
        print(
            f"{len(self.prompts)} prompts: {len(self.train)} to train on "
            f"({len(self.sft_prompts)} of them for fine-tuning), {len(self.held_out)} held out; "
            f"run folder {self.folder.path}",
            flush=True,
        )
        stages = (
            ("student", self._make_student),
            ("teacher's answers", self._answer),
            ("fine-tuning", self._fine_tune),
            ("student's samples", self._sample),
            ("pairs", self._pair),
            ("calibration", self._calibrate),
            ("evaluation", self._evaluate),
        )
        for name, run in stages:
            self.folder.stage(name, run)
        # Cheap, and made of what the stages left: done again by every run.
        results = self._report()
        print(f"\n{comparison_table(results)}\n\nreport: {self.folder / 'report.html'}", flush=True)
        return results

    def _make_student(self) -> str:
        """First, because it finds out whether the models can be loaded at all."""
        config = self.config

        def fill(folder: Path) -> None:
            model = self._load_teacher() if config.student is None else load_model(config.student)
            tokenizer = load_tokenizer(config.student or self.teacher_source)
            layers = config.student_layers
            if layers is None and config.student is None:
                layers = max(1, round(_LAYERS_KEPT * model.config.num_hidden_layers))
            if layers is not None:
                model = drop_layers(model, layers if isinstance(layers, int) else list(layers))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        path = self.folder.make_folder("student", fill)
        depth = json.loads((path / "config.json").read_text()).get("num_hidden_layers", "?")
        return f"{depth} layers, from {config.student or 'the teacher'}"

    def _answer(self) -> str:
        finished = self._finished_teacher_answers()
        self._teacher = None
        if not finished:
            raise UsageError(
                f"the teacher finished none of its {len(self.prompts)} answers within "
                f"--max-new-tokens {self.config.max_new_tokens}; raise it, or ask for short answers"
            )
        return f"{len(finished)} of {len(self.prompts)} answers finished, the others are dropped"

    def _fine_tune(self) -> str:
        tokenizer = load_tokenizer(self.folder / "student")
        answers = self._finished_teacher_answers()
        rows = []
        for prompt in self.sft_prompts:
            if prompt.id in answers:
                content = as_messages(tokenizer, prompt.content)
                chosen = as_response(content, answers[prompt.id].text)
                rows.append({"prompt": content, "chosen": chosen})
        if not rows:
            raise UsageError(
                "the teacher finished no answer to a fine-tuning prompt; raise --max-new-tokens or "
                "--sft-share"
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

    def _sample(self) -> str:
        samples = self._samples()
        return f"{len(samples)} samples at temperature {self.config.student_temperature:g}"

    def _pair(self) -> str:
        tokenizer = load_tokenizer(self.folder / "sft")
        parts = []
        for name, prompts in (("train", self.pair_prompts), ("held-out", self.held_out)):
            try:
                pairs, report = build_pairs(
                    prompts, self._teacher_answers(), self._samples(), tokenizer=tokenizer
                )
            except UsageError as error:
                raise UsageError(f"{name} prompts: {error}") from None
            write_jsonl(self.folder / "pairs" / f"{name}.jsonl", pairs)
            parts.append(f"{name}: {report}")
        return "; ".join(parts)

    def _calibrate(self) -> str:
        config = self.config
        log = self._train(
            "sft",
            read_jsonl(self.folder / "pairs" / "train.jsonl"),
            "plad",
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

    def _report(self) -> dict[str, Any]:
        config = self.config
        results, outputs = self._measure()
        write_metrics(results, self.folder / "metrics.json")
        drawn = draw_plots(
            results,
            outputs,
            {"fine-tuning": self.folder / "sft", "calibration": self.folder / "plad"},
            self.folder / "plots",
            length_normalization=config.length_normalization,
        )
        held_out = self._held_out_data()
        write_report(
            self.folder / "report.html",
            title=f"Distillation of {Path(self.teacher_source).stem}",
            config=config.as_dict(),
            stages=[{"name": name, **stage} for name, stage in self.folder.stages.items()],
            metrics=results,
            plots=drawn,
            examples=example_answers(held_out, outputs),
            margin_unit=margin_unit(config.length_normalization),
            command=self.command,
            versions=versions(),
        )
        return results

    def _measure(self) -> tuple[dict[str, Any], list[StudentOutputs]]:
        return evaluate_models(
            {SFT: self.folder / "sft", PLAD: self.folder / "plad"},
            self._held_out_data(),
            self.folder / "evaluation",
            sampling=self._student_sampling(),
            length_normalization=self.config.length_normalization,
            max_length=self.config.max_length,
            precision=self.config.precision,
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
            **options,
        )

    def _load_teacher(self) -> PreTrainedModel:
        """Loaded once for the student and the answers: a GGUF file takes its time."""
        if self._teacher is None:
            self._teacher = load_model(self.teacher_source)
        return self._teacher

    def _teacher_answers(self) -> dict[str, Answer]:
        def load() -> LocalModel:
            dtype = autocast_dtype(self.config.precision)
            model = self._load_teacher().to(device=best_device(), dtype=dtype)
            return LocalModel(model, load_tokenizer(self.teacher_source), "teacher")

        sampling = Sampling(
            self.config.max_new_tokens,
            temperature=self.config.teacher_temperature,
            seed=self.config.seed,
            batch_size=self.config.generation_batch_size,
        )
        path = self.folder / "answers" / "teacher.jsonl"
        fingerprint = {"teacher": self.config.teacher}
        return stored_answers(load, self.prompts, path, sampling, fingerprint=fingerprint).first

    def _finished_teacher_answers(self) -> dict[str, Answer]:
        answers = self._teacher_answers()
        return {k: a for k, a in answers.items() if a.finish_reason == "stop" and a.text}

    def _samples(self) -> dict[str, Answer]:
        def load() -> LocalModel:
            dtype = autocast_dtype(self.config.precision)
            model = load_model(self.folder / "sft", dtype=dtype, device=best_device())
            return LocalModel(model, load_tokenizer(self.folder / "sft"), SFT)

        path = self.folder / "answers" / "student.jsonl"
        sampling = self._student_sampling()
        prompts = [*self.pair_prompts, *self.held_out]
        return stored_answers(load, prompts, path, sampling, fingerprint={"student": SFT}).first

    def _student_sampling(self) -> Sampling:
        return Sampling(
            self.config.max_new_tokens,
            temperature=self.config.student_temperature,
            top_p=self.config.top_p,
            seed=self.config.seed + 1,  # another stream than the teacher's
            batch_size=self.config.generation_batch_size,
        )

    def _held_out_data(self) -> HeldOut:
        answers = self._finished_teacher_answers()
        prompts = [p for p in self.held_out if p.id in answers]
        texts = {p.id: answers[p.id].text for p in prompts}
        return HeldOut(prompts, texts, read_jsonl(self.folder / "pairs" / "held-out.jsonl"))


def _last(log: Sequence[Mapping[str, Any]], name: str, text: str) -> str:
    """The last logged value of a metric, in words."""
    values = [entry[name] for entry in log if name in entry]
    return text.format(values[-1]) if values else f"no {name} logged"
