"""The recipe's stages on their own, for models and pairs that come from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plad_fast._devices import require_one_gpu
from plad_fast._packages import require_packages, versions
from plad_fast._recipe_data import answer_columns, load_recipe_prompts, write_jsonl
from plad_fast._records import model_digest
from plad_fast._template_options import refuse_template_options
from plad_fast.chat import as_conversation
from plad_fast.errors import UsageError
from plad_fast.evaluation import comparison_table, write_metrics
from plad_fast.held_out import (
    HeldOut,
    calibration_file,
    draw_plots,
    evaluate_models,
    example_answers,
    margin_unit,
    scorer_file,
    student_files,
)
from plad_fast.losses import get_loss
from plad_fast.pairs import (
    Prompt,
    Sampling,
    discard_answers,
    joined,
    open_local_model,
    stored_answers,
    teacher_fingerprint,
)
from plad_fast.pairs.tables import read_table
from plad_fast.recipe import OFFLINE_TEACHER, DistillConfig, flag
from plad_fast.recipe_scoring import JUDGE_STORE, held_out_scoring
from plad_fast.recipe_texts import select_pairs
from plad_fast.report import write_report
from plad_fast.students import load_tokenizer, offline_teacher_path
from plad_fast.training import is_trained, train_model

_COUNTS = ("batch_size", "micro_batch_size", "max_tokens_per_batch")


def pair_models(
    config: DistillConfig, *, teacher: str, student: str, overwrite: bool = False
) -> Path:
    """Answer the prompts with both models; write `<output_dir>/pairs.jsonl`. Resumable.

    Under `torchrun` or `accelerate launch` the processes share the prompts of local models, and
    the pairs are those of a single process, but for rounding: see `LocalModel.generate`.

    Args:
        config: prompts, sampling, scoring and output folder; what trains plays no part.
        teacher: see `pairs.sources`.
        student: hub id, folder or .gguf file.
        overwrite: discard the answers and scores stored there.

    Raises:
        UsageError: from loading, generation, scoring or storing, and when no pair is left.
    """
    config = replace(config, teacher=teacher)
    folder = Path(config.output_dir)
    prompts = load_recipe_prompts(config)
    columns = answer_columns(config)
    verdicts = folder / "verdicts.jsonl"
    scorer = config.open_scorer(verdicts=verdicts)
    if scorer is not None:
        scorer.check(prompts)
    source = _resolve(student)
    tokenizer = load_tokenizer(source)
    # Made now, so that what is wrong with an endpoint's settings is found out before any work.
    opened = [config.open_teacher(precision=config.precision, columns=columns)]
    endpoint = getattr(opened[0], "endpoint", None)
    sampling = Sampling(
        config.max_new_tokens,
        temperature=config.teacher_temperature,
        seed=config.seed,
        n=config.teacher_samples,
        batch_size=config.generation_batch_size,
    )
    teacher_made_by = teacher_fingerprint(teacher, base_url=config.base_url, columns=columns)
    if config.has_local_teacher:
        teacher_made_by["precision"] = config.precision
    teacher_answers = stored_answers(
        opened.pop,  # nothing holds the teacher when the student is loaded
        prompts,
        folder / "teacher.jsonl",
        sampling,
        fingerprint=teacher_made_by,
        overwrite=overwrite,
    ).answers
    student_answers = stored_answers(
        lambda: open_local_model(source, "student", precision=config.precision),
        prompts,
        folder / "student.jsonl",
        replace(
            sampling,
            temperature=config.student_temperature,
            top_p=config.top_p,
            n=config.student_samples,
            # Another stream of random numbers, or equal models would give equal answers.
            seed=config.seed + 1,
        ),
        fingerprint={
            "student": student,
            "weights": model_digest(source),
            "precision": config.precision,
        },
        overwrite=overwrite,
    ).answers
    path = folder / "pairs.jsonl"

    def write() -> str:
        scores = folder / "scores.jsonl"
        if overwrite:
            discard_answers(scores)
            discard_answers(verdicts)
        rows, report = select_pairs(
            config,
            scorer,
            prompts,
            teacher_answers,
            student_answers,
            tokenizer=tokenizer,
            scores_path=scores,
        )
        write_jsonl(path, rows)
        return str(report)

    with joined() as ranks:
        report = ranks.from_first(write)
        if ranks.rank == 0:
            if endpoint is not None:
                print(f"teacher: {endpoint.usage}")
            print(f"{report}\npairs: {path}", flush=True)
    return path


def train_on_pairs(
    model: str,
    pairs: str,
    *,
    output_dir: str,
    loss: str = "plad_ranking",
    epochs: float = 1.0,
    learning_rate: float = 2e-5,
    **options: Any,
) -> Path:
    """Train a model on a file of pairs; make `output_dir`. Resumable.

    Args:
        model: hub id, folder or .gguf file.
        pairs: JSONL, JSON, CSV or Parquet in the standard preference format.
        options: of `train_model`, and `saves_per_stage`.

    Raises:
        UsageError: from reading the pairs or from the training, and where the folder holds
            anything but the model that this very training made.
    """
    require_one_gpu()
    spec = get_loss(loss)
    positive = {"epochs": epochs, "learning_rate": learning_rate}
    positive |= {k: v for k, v in options.items() if k in _COUNTS}
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UsageError(f"{flag(name)} must be positive, got {value}")
    rows = read_pairs(pairs)
    if "beta" not in spec.options:
        options.pop("beta", None)
    done_before = is_trained(Path(output_dir))
    log = train_model(
        _resolve(model),
        rows,
        Path(output_dir),
        loss=loss,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=options.pop("batch_size", 8),
        saves=options.pop("saves_per_stage", 2),
        **options,
    )
    if done_before:
        print("done before, with the same settings and pairs", flush=True)
    last: Mapping[str, Any] = next((entry for entry in reversed(log) if "nll" in entry), {})
    shown = ("loss", "nll", "ranking_accuracy", "margin", "active_pairs")
    metrics = ", ".join(f"{name} {last[name]:.3f}" for name in shown if name in last)
    print(f"{metrics}\nmodel: {output_dir}", flush=True)
    return Path(output_dir)


def evaluate_on_pairs(
    students: Mapping[str, Path],
    pairs: str,
    config: DistillConfig,
    *,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Compare students on held-out pairs whose chosen answers are the teacher's. Resumable.

    Writes `metrics.json`, plots and `report.html` into the output folder.

    Args:
        students: name -> folder, the baseline first.
        pairs: file in the standard preference format.
        config: sampling, length normalisation and output folder.
        overwrite: discard the answers and scores stored there.
        command: what the report says to run again.

    Raises:
        UsageError: from reading the pairs, loading, or generation; names that cannot be told apart
            as files; and stored answers of other models, pairs or settings.
    """
    require_packages("rouge_score", "matplotlib")
    _check_names(list(students))
    folder = Path(config.output_dir)
    held_out = _held_out(read_pairs(pairs))
    for name, path in students.items():
        # A wrong path is found before another student is run.
        if path.is_dir() and not (path / "config.json").is_file():
            raise UsageError(
                f"--student {name}={path} is no folder of a model, which has a config.json; check "
                "the path"
            )
        load_tokenizer(path)
    scoring = held_out_scoring(config, folder)
    if overwrite:
        for name in students:
            _discard_student(name, folder)
        for scorer in scoring["scorers"].values():
            discard_answers(scorer_file(scorer.name, folder))
        discard_answers(folder / JUDGE_STORE)
    results, outputs = evaluate_models(
        students,
        held_out,
        folder,
        sampling=Sampling(
            config.max_new_tokens,
            temperature=config.student_temperature,
            top_p=config.top_p,
            seed=config.seed + 1,
            batch_size=config.generation_batch_size,
        ),
        length_normalization=config.length_normalization,
        max_length=config.max_length,
        precision=config.precision,
        **scoring,
    )
    write_metrics(results, folder / "metrics.json")
    drawn = draw_plots(
        results,
        outputs,
        students,
        folder / "plots",
        length_normalization=config.length_normalization,
    )
    write_report(
        folder / "report.html",
        title=f"Evaluation of {', '.join(students)}",
        config={"students": {k: str(v) for k, v in students.items()}, "pairs": pairs},
        stages=[],
        metrics=results,
        plots=drawn,
        examples=example_answers(held_out, outputs),
        margin_unit=margin_unit(config.length_normalization),
        command=command,
        versions=versions(),
    )
    print(f"{comparison_table(results)}\n\nreport: {folder / 'report.html'}", flush=True)
    return results


def read_pairs(path: str) -> list[dict[str, Any]]:
    """Rows of a pairs file. Chat messages in CSV or JSON text are not unpacked.

    Raises:
        UsageError: no such file, damaged, empty, or without the columns that rows need.
    """
    table = read_table(path, "train")
    columns = set(table.columns)
    # Of messages and texts that begin with their prompt, both responses tell what it is.
    if not columns >= {"chosen", "rejected"} and not (
        "prompt" in columns and columns & {"chosen", "completion", "responses"}
    ):
        raise UsageError(
            f"{path} has the columns {', '.join(table.columns)}: pairs have prompt, chosen and "
            "rejected, and lists have prompt and responses"
        )
    return [dict(row) for row in table.rows]


def _check_names(names: Sequence[str]) -> None:
    """Names become names of files, on some systems without regard to case."""
    seen: dict[str, str] = {}
    for name in names:
        if any(character in name for character in "/\\:\0") or name.startswith("."):
            raise UsageError(
                f"--student {name}=...: a name must not contain / \\ or : nor start with a dot, "
                "for files are named after it; choose another"
            )
        plain = name.lower().replace(" ", "-")
        if plain in seen:
            raise UsageError(
                f"--student {seen[plain]} and --student {name} would share their files; give them "
                "names that differ in more than case and spaces"
            )
        seen[plain] = name


def _discard_student(name: str, folder: Path) -> None:
    answer_files, scores_file = student_files(name, folder)
    for file in answer_files:
        discard_answers(file)
    scores_file.unlink(missing_ok=True)
    calibration_file(name, folder).unlink(missing_ok=True)


def _held_out(rows: list[dict[str, Any]]) -> HeldOut:
    answers = {}
    for number, row in enumerate(rows):
        if row.get("rejected") is None:
            raise UsageError(f"pair {number + 1} has no rejected answer; evaluation ranks pairs")
        refuse_template_options(row, f"pair {number + 1}")
        row["id"] = str(row.get("id", number))
        # The prompt in the form in which its answers are scored: students answer that very one.
        row["prompt"], (chosen,) = as_conversation(row["prompt"], [row["chosen"]])
        answers[row["id"]] = chosen.strip()
    prompts = [Prompt(row["id"], row["prompt"], row.get("reference")) for row in rows]
    return HeldOut(prompts, answers, rows)


def _resolve(source: str) -> str:
    return str(offline_teacher_path()) if source == OFFLINE_TEACHER else source
