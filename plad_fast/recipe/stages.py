"""The recipe's stages on their own, for models and pairs that come from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from plad_fast.data.locks import held_folder
from plad_fast.data.records import model_digest
from plad_fast.errors import UsageError
from plad_fast.models.devices import require_one_gpu
from plad_fast.models.loading import check_loadable, find_model, load_tokenizer
from plad_fast.pairs.generation.answering import discard_answers, stored_answers
from plad_fast.pairs.generation.ranks import joined
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.sources import open_local_model, teacher_fingerprint
from plad_fast.pairs.scoring.judge import Judge
from plad_fast.pairs.scoring.trials import try_endpoints
from plad_fast.recipe.data_checks import check_rows, require_learnable
from plad_fast.recipe.dependencies import STAGES
from plad_fast.recipe.inputs import (
    answer_columns,
    dropped_file,
    load_recipe_prompts,
    prompts_digest,
    read_pairs,
    show_findings,
    show_pairs,
)
from plad_fast.recipe.pair_settings import PairSettings
from plad_fast.recipe.settings import DistillConfig, expanded
from plad_fast.recipe.stage_folder import claim_folder, held_by_first, record_rows
from plad_fast.recipe.texts import select_pairs
from plad_fast.recipe.training_checks import check_training
from plad_fast.training.train import discard_training, is_trained, train_model

# The endpoint's address is among what the teacher is known by.
_OF_PAIRS = (
    *(f.name for f in fields(PairSettings) if f.metadata["affects_results"]),
    *("max_new_tokens", "teacher_temperature", "student_temperature", "top_p", "seed"),
)


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
        UsageError: from loading, generation, scoring or storing; when no pair is left; where other
            prompts, models or settings, or another command, have made the folder, and while another
            process is at work in it.
    """
    with held_by_first(Path(config.output_dir)):
        return _pair_models(replace(config, teacher=teacher), teacher, student, overwrite)


def _pair_models(config: DistillConfig, teacher: str, student: str, overwrite: bool) -> Path:
    folder = Path(config.output_dir)
    prompts = load_recipe_prompts(config)
    columns = answer_columns(config)
    verdicts = folder / "verdicts.jsonl"
    scorer = config.open_scorer(verdicts=verdicts)
    if scorer is not None:
        scorer.check(prompts)
    source = find_model(student, "--student")
    check_loadable(source)
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
    path, scores = folder / "pairs.jsonl", folder / "scores.jsonl"
    stores = folder / "teacher.jsonl", folder / "student.jsonl"
    try_endpoints(
        teacher=opened[0],
        sampling=sampling,
        answers=stores[0],
        judge=scorer,
        overwrite=overwrite,
    )
    student_made_by = {
        "student": student,
        "weights": model_digest(source),
        "precision": config.precision,
    }
    settings: dict[str, Any] = {
        **{name: getattr(config, name) for name in _OF_PAIRS if name != "base_url"},
        **{f"teacher's {name}": value for name, value in teacher_made_by.items()},
        **{f"student's {name}": value for name, value in student_made_by.items()},
        "prompts": prompts_digest(prompts),
    }

    def discard(_: Mapping[str, Any]) -> None:
        discard_answers(*stores, scores, verdicts)

    def has_fewer_prompts(found: Mapping[str, Any]) -> bool:
        first = prompts_digest(prompts[: int(found["prompts"].split()[0])])
        others = {**found, "prompts": settings["prompts"]}
        return found["prompts"] == first and others == json.loads(json.dumps(settings))

    def claim() -> None:
        claim_folder(
            folder,
            "pairs",
            settings,
            results=[path.name, dropped_file(path).name],
            overwrite=overwrite,
            discard=discard,
            extends=has_fewer_prompts,
            of_results=STAGES["pairs"],
        )
        if scorer is not None:
            for store in (scores, getattr(scorer, "store", None)):
                if store is not None:
                    set_aside(store, scorer.settings())

    with joined() as ranks:
        ranks.from_first(claim)
    teacher_answers = stored_answers(
        opened.pop,  # nothing holds the teacher when the student is loaded
        prompts,
        stores[0],
        sampling,
        fingerprint=teacher_made_by,
        to_the_end=True,
    ).answers
    student_answers = stored_answers(
        lambda: open_local_model(source, "student", precision=config.precision),
        prompts,
        stores[1],
        replace(
            sampling,
            temperature=config.student_temperature,
            top_p=config.top_p,
            n=config.student_samples,
            # Another stream of random numbers, or equal models would give equal answers.
            seed=config.seed + 1,
        ),
        fingerprint=student_made_by,
    ).answers

    def write() -> str:
        rows, report = select_pairs(
            config,
            scorer,
            prompts,
            teacher_answers,
            student_answers,
            tokenizer=tokenizer,
            scores_path=scores,
            path=path,
        )
        record_rows(folder, path.name)
        show_pairs(rows, report, path, for_training=False)  # others may be joined to them
        return str(report)

    with joined() as ranks:
        report = ranks.from_first(write)
        if ranks.rank == 0:
            if endpoint is not None:
                print(f"teacher: {endpoint.usage}")
            if isinstance(scorer, Judge):
                print(f"judge: {scorer.spent()}")
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
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Train a model on a file of pairs; make `output_dir`. Resumable.

    Args:
        model: hub id, folder or .gguf file.
        pairs: JSONL, JSON, CSV or Parquet in the standard preference format.
        overwrite: remove a model that an earlier training made there, and its checkpoints, first. A
            folder with anything else in it is refused.
        options: of `train_model`, whose defaults they have, and `saves_per_stage`.

    Raises:
        UsageError: a setting out of range, or one that the loss does not have; from reading the
            pairs or from the training, and where the folder holds anything but the model that
            this very training made.
    """
    require_one_gpu()
    given = {"loss": loss, "epochs": epochs, "learning_rate": learning_rate}
    check_training({**given, **options})
    source = find_model(model, "--model")
    rows = read_pairs(pairs)
    findings = check_rows(rows)
    show_findings(findings)
    require_learnable(findings, "give other --pairs")
    folder = Path(expanded(output_dir))
    # One that is not there is made at the end; its checkpoints are locked until then.
    with held_folder(folder) if folder.exists() else nullcontext():
        if overwrite:
            if Path(source).expanduser().resolve() == folder.resolve():
                raise UsageError(
                    f"--model and --output-dir are both {folder}, and --overwrite would remove the "
                    "model before it is read; choose another --output-dir"
                )
            check_loadable(source)  # a mistyped --model costs nobody the model that is there
            discard_training(folder)
        done_before = is_trained(folder)
        log = train_model(
            source,
            rows,
            folder,
            loss=loss,
            epochs=epochs,
            learning_rate=learning_rate,
            saves=options.pop("saves_per_stage", DistillConfig.saves_per_stage),
            **options,
        )
    if done_before:
        print("done before, with the same settings and pairs", flush=True)
    last: Mapping[str, Any] = next((entry for entry in reversed(log) if "nll" in entry), {})
    shown = ("loss", "nll", "ranking_accuracy", "margin", "active_pairs")
    metrics = ", ".join(f"{name} {last[name]:.3f}" for name in shown if name in last)
    print(f"{metrics}\nmodel: {folder}", flush=True)
    return folder
