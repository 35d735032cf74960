"""The recipe's stages on their own, for models and pairs that come from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.locks import held_folder
from plad_fast.data.places import expanded as expanded_path
from plad_fast.data.places import is_there
from plad_fast.data.records import ELSEWHERE
from plad_fast.data.rows import require_pairs
from plad_fast.data.store import fingerprint_of, has_rows
from plad_fast.errors import UsageError
from plad_fast.losses.objective import check_settings
from plad_fast.losses.registry import get_loss
from plad_fast.models.loading import check_loadable, find_model, load_tokenizer
from plad_fast.pairs.build import PairReport
from plad_fast.recipe.cards import describe_training, training_summary
from plad_fast.recipe.data_checks import check_overlap, check_rows, require_learnable, show_findings
from plad_fast.recipe.dependencies import bound_settings, stage_settings
from plad_fast.recipe.fields import checked, flag
from plad_fast.recipe.hub import check_push, push
from plad_fast.recipe.inputs import (
    dropped_file,
    load_recipe_prompts,
    read_jsonl,
    read_pairs,
    show_pairs,
    stream_pairs,
)
from plad_fast.recipe.run_folder import RunFolder, Stage
from plad_fast.recipe.setting_checks import (
    check_adapters,
    expanded,
    require_outside,
    require_with,
)
from plad_fast.recipe.settings import DistillConfig, TrainConfig
from plad_fast.recipe.teachers import require_tools
from plad_fast.recipe.texts import RecipeTexts
from plad_fast.training.launch import check_launch
from plad_fast.training.train import adapters_and_arguments, train_model
from plad_fast.training.trained_folders import discard_training, is_trained

if TYPE_CHECKING:
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint

LOOKED_AT = 10_000
"""The first pairs, for findings, where not all are held."""

MADE_BY_PAIRS = (
    r"(pairs|dropped|teacher|student|scores|verdicts)\b.*\.jsonl?|parts|plad-fast-error\.log|"
    r"\..+\.tmp"
)
"""Pattern of the names in the folder of `plad-fast pairs`; what else lies there is the user's."""


def pair_models(config: DistillConfig, *, overwrite: bool = False) -> Path:
    """Answer the prompts with both models; write `<output_dir>/pairs.jsonl`. Resumable.

    Several processes (`plad_fast.models.led`) share the prompts of local models, and the pairs are
    those of a single process, but for rounding: see `LocalModel.generate`.

    Args:
        config: teacher, student, prompts, sampling, scoring and output folder; what trains plays no
            part. In a folder made with others, what depends on what has changed is made anew; one
            with answers of another teacher is refused.
        overwrite: start anew in a folder of earlier pairs.

    Raises:
        UsageError: no student is named; from loading, generation, scoring or storing; when no pair
            is left; where another command has made the folder, and while another process is at
            work in it.
    """
    texts, rows, report = pair_folder(config, {}, overwrite=overwrite)
    path = texts.pairs_file("pairs")
    show_pairs(rows, report, path, for_training=False)  # others may be joined to them
    spent = "".join(f"{name}: {usage}\n" for name, usage in texts.usage().items())
    print(f"{spent}pairs: {path}", flush=True)
    return path


def pair_folder(
    config: DistillConfig, endpoints: dict[str, Endpoint], *, overwrite: bool = False
) -> tuple[RecipeTexts, list[dict[str, Any]], PairReport]:
    """What `pair_models` makes, without a word on the pairs; `endpoints` as in `Teachers`."""
    if config.student is None:
        raise UsageError("pairs are made of two models; name the second with --student")
    path, prompts = Path(config.output_dir), load_recipe_prompts(config)
    if overwrite:
        require_outside(path, config)
    source = find_model(config.student, "--student")
    check_loadable(source)
    tokenizer = load_tokenizer(source)
    require_tools(config, prompts, tokenizer)
    texts = RecipeTexts(config, prompts, answers=path, pairs=path, endpoints=endpoints)
    of_samples = [texts.samples_file(1, turn) for turn in config.sample_turns]
    file = texts.pairs_file("pairs")
    folder = RunFolder(
        path,
        bound_settings(config, texts.teachers.made_by),
        command="pairs",
        overwrite=overwrite,
        is_bound=lambda: has_answers(path),
        made=MADE_BY_PAIRS,
        check=lambda: texts.try_endpoints(texts.scorer, overwrite=overwrite),
    )
    with closing(folder):
        # Also where all pairs are made: what could not be answered is asked for again.
        texts.teachers.ask()
        samples = texts.samples_in_turn(prompts, [(source, "student")], made_by=config.student)
        drawn = {name: getattr(config, name) for name in ("teacher_samples", "student_samples")}
        scored = {} if texts.scorer is None else texts.scorer.settings()
        folder.stage(
            Stage(
                "pairs",
                lambda: str(texts.make_pairs(prompts, samples, tokenizer, "pairs")[1]),
                stage_settings(
                    config, "pairs", prompts=prompts, references=True, **drawn, **scored
                ),
                reads=[store.name for store in (*texts.teachers.stores, *of_samples)],
                makes=[file.name, dropped_file(file).name],
            )
        )
        rows = texts.pairs("pairs")
        unit = "pairs" if config.select == "all" else "prompts"
        return texts, rows, PairReport(len(rows), read_jsonl(dropped_file(file)), unit)


def _check_settings(given: Mapping[str, Any]) -> None:
    """By the names of `DistillConfig` and `TrainConfig`; any but `loss` may be missing or None.
    UsageError with the flag's name for a value out of range, an option that the loss does not have,
    or one that would do nothing."""
    for field in (*fields(DistillConfig), *fields(TrainConfig)):
        if given.get(field.name) is not None:
            checked(field, given[field.name])
    check_settings(given["loss"], given, flag)
    check_adapters(given)
    require_with("eval_pairs", given, ("eval_split", "eval_steps", "metric_for_best_model"))


def has_answers(folder: Path) -> bool:
    """Whether a teacher has answered in a folder of `plad-fast pairs`, or in a part of it."""
    stores = chain(folder.glob("teacher*.jsonl"), folder.glob("parts/*/teacher*.jsonl"))
    return any(fingerprint_of(store) is not None and has_rows(store) for store in stores)


def train_on_pairs(
    model: str,
    pairs: str,
    *,
    output_dir: str,
    loss: str = "plad_ranking",
    epochs: float = 1.0,
    learning_rate: float = 2e-5,
    split: str = "train",
    eval_pairs: str | None = None,
    eval_split: str | None = None,
    tokens_on_disk: bool = False,
    push_to_hub: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Train a model on a file of pairs; make `output_dir`, with a model card in it. Resumable.

    Args:
        model: hub id, folder or .gguf file.
        pairs: JSONL, JSON, CSV or Parquet in the standard preference format.
        split: of `pairs` where they are a hub data set.
        eval_pairs, eval_split: likewise; see `eval_rows` of `train_model`.
        tokens_on_disk: hold neither pairs nor token ids in memory: the pairs are read several
            times, and their token ids lie beside the checkpoints until the end. The weights are
            those of a training that holds them.
        push_to_hub: repository to push the model to, NAME/MODEL.
        overwrite: remove a model that an earlier training made there, and its checkpoints, first. A
            folder with anything else in it is refused.
        options: of `train_model`, whose defaults they have, and `saves_per_stage`.

    Raises:
        UsageError: a setting out of range, or one that the loss does not have; from reading the
            pairs or from the training, and where the folder holds anything but the model that
            this very training made.
    """
    given = {"loss": loss, "epochs": epochs, "learning_rate": learning_rate, **options}
    given |= {} if eval_pairs is None else {"eval_pairs": eval_pairs}
    given |= {} if eval_split is None else {"eval_split": eval_split}
    _check_settings(given)
    lora, _ = adapters_and_arguments(given)
    source = find_model(model, "--model")
    if push_to_hub is not None:
        has_adapters = lora is not None and not options.get("merge")
        is_here = is_there(expanded_path(source))
        check_push(push_to_hub, adapters_on=source if has_adapters and is_here else None)
    compares, scored = not get_loss(loss).is_likelihood, get_loss(loss).needs_scores
    rows = (stream_pairs if tokens_on_disk else read_pairs)(pairs, split, with_scores=scored)
    looked_at = [*islice(rows, LOOKED_AT if tokens_on_disk else None)]
    if eval_pairs is not None:
        of_eval = eval_split or TrainConfig.eval_split
        options["eval_rows"] = read_pairs(eval_pairs, of_eval, with_scores=scored)
    compared = [looked_at[0], *options.get("eval_rows", [])[:1]]
    # Before the model, which may have to be downloaded.
    of_training, of_evaluation = (
        require_pairs(rows_read, compares=compares, with_scores=scored, name=str(file))
        for rows_read, file in ((looked_at, pairs), (options.get("eval_rows", ()), eval_pairs))
    )
    if compares and of_evaluation not in (0, of_training):
        raise UsageError(
            f"the rows of --pairs have {of_training} responses each, those of --eval-pairs "
            f"{of_evaluation}; make them equal"
        )
    defaults = {field.name: field.default for field in fields(DistillConfig)}
    settings = {**defaults, **given}
    has_reference = all("reference_logps" in row for row in compared)
    check_launch({"--batch-size": settings["batch_size"]}, settings, has_reference=has_reference)
    is_all = len(looked_at) == len(rows)
    findings = check_rows(looked_at, "pairs" if is_all else f"first {len(looked_at)} pairs")
    show_findings(findings)
    if is_all:
        require_learnable(findings, "give other --pairs")
    if eval_pairs is not None:
        show_findings(check_overlap(rows, options["eval_rows"], "rows of --eval-pairs"))
    folder = Path(expanded(output_dir))
    # One that is not there is made at the end; its checkpoints are locked until then.
    with held_folder(folder) if folder.exists() else nullcontext():
        if overwrite:
            if Path(source).expanduser().resolve() == folder.resolve():
                raise UsageError(
                    f"--model and --output-dir are both {folder}, which --overwrite would empty "
                    f"before it is read; {ELSEWHERE}"
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
    print(f"{training_summary(log)}\nmodel: {folder}", flush=True)
    data = {"pairs": pairs, "eval_pairs": eval_pairs, "eval_split": eval_split}
    data |= {} if split == DistillConfig.split else {"split": split}
    describe_training(folder, model, data, log)
    if push_to_hub is not None:
        print(f"pushed: {push(folder, push_to_hub)}", flush=True)
    return folder
