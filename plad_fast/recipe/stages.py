"""The recipe's stages on their own, for models and pairs that come from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.locks import held_folder
from plad_fast.data.places import expanded as expanded_path
from plad_fast.data.places import is_there
from plad_fast.data.records import ELSEWHERE, as_json
from plad_fast.errors import UsageError
from plad_fast.models.loading import check_loadable, find_model, load_tokenizer
from plad_fast.pairs.generation.answering import discard_answers
from plad_fast.recipe.cards import describe_training, training_summary
from plad_fast.recipe.data_checks import check_overlap, check_rows, require_learnable, show_findings
from plad_fast.recipe.dependencies import STAGES
from plad_fast.recipe.hub import check_push, push
from plad_fast.recipe.inputs import (
    dropped_file,
    load_recipe_prompts,
    prompts_digest,
    read_pairs,
    show_pairs,
    stream_pairs,
)
from plad_fast.recipe.settings import SELECTION, DistillConfig, check_training, expanded
from plad_fast.recipe.stage_folder import claim_folder, record_rows
from plad_fast.recipe.teachers import require_tools
from plad_fast.recipe.texts import RecipeTexts
from plad_fast.training.launch import check_launch
from plad_fast.training.train import adapters_and_arguments, train_model
from plad_fast.training.trained_folders import discard_training, is_trained

if TYPE_CHECKING:
    from plad_fast.pairs.build import PairReport
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint

LOOKED_AT = 10_000
"""The first pairs, for findings, where not all are held."""

# The endpoint's address is among what the teacher is known by.
OF_PAIRS = (
    *("teacher", "teacher_samples", "student_samples", *SELECTION),
    *("max_new_tokens", "teacher_temperature", "student_temperature", "top_p", "seed"),
)


def pair_models(config: DistillConfig, *, overwrite: bool = False) -> Path:
    """Answer the prompts with both models; write `<output_dir>/pairs.jsonl`. Resumable.

    Several processes (`plad_fast.models.led`) share the prompts of local models, and the pairs are
    those of a single process, but for rounding: see `LocalModel.generate`.

    Args:
        config: teacher, student, prompts, sampling, scoring and output folder; what trains plays no
            part.
        overwrite: discard the answers and scores stored there.

    Raises:
        UsageError: no student is named; from loading, generation, scoring or storing; when no pair
            is left; where other prompts, models or settings, or another command, have made the
            folder, and while another process is at work in it.
    """
    with held_folder(Path(config.output_dir)):
        texts, rows, report = pair_folder(config, {}, overwrite=overwrite)
        path = texts.pairs_file("pairs")
        show_pairs(rows, report, path, for_training=False)  # others may be joined to them
        spent = "".join(f"{name}: {usage}\n" for name, usage in texts.usage().items())
        print(f"{spent}{report}\npairs: {path}", flush=True)
    return path


def pair_folder(
    config: DistillConfig, endpoints: dict[str, Endpoint], *, overwrite: bool = False
) -> tuple[RecipeTexts, list[dict[str, Any]], PairReport]:
    """What `pair_models` makes, in a folder that the caller holds; `endpoints` as in `Teachers`."""
    if config.student is None:
        raise UsageError("pairs are made of two models; name the second with --student")
    folder = Path(config.output_dir)
    prompts = load_recipe_prompts(config)
    source = find_model(config.student, "--student")
    check_loadable(source)
    tokenizer = load_tokenizer(source)
    require_tools(config, prompts, tokenizer)
    texts = RecipeTexts(config, prompts, answers=folder, pairs=folder, endpoints=endpoints)
    texts.try_endpoints(texts.scorer, overwrite=overwrite)
    path = texts.pairs_file("pairs")
    student_made_by = texts.student_made_by(config.student, source)
    settings: dict[str, Any] = {
        **{name: getattr(config, name) for name in OF_PAIRS},
        **{f"teacher's {name}": value for name, value in texts.teachers.made_by.items()},
        **{f"student's {name}": value for name, value in student_made_by.items()},
        "prompts": prompts_digest(prompts),
    }

    def discard(_: Mapping[str, Any]) -> None:
        discard_answers(
            *texts.stores, folder / "student.jsonl", *folder.glob("student.turn?.jsonl")
        )

    def has_fewer_prompts(found: Mapping[str, Any]) -> bool:
        if "prompts" not in found:  # made in parts, which have records of their own
            return False
        first = prompts_digest(prompts[: int(found["prompts"].split()[0])])
        others = {**found, "prompts": settings["prompts"]}
        return found["prompts"] == first and others == as_json(settings)

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
    texts.teachers.ask()
    student = (source, "student")
    samples = texts.samples_in_turn(prompts, [student], made_by=config.student)
    rows, report = texts.make_pairs(prompts, samples, tokenizer, "pairs")
    record_rows(folder, path.name)
    return texts, rows, report


def train_on_pairs(
    model: str,
    pairs: str,
    *,
    output_dir: str,
    loss: str = "plad_ranking",
    epochs: float = 1.0,
    learning_rate: float = 2e-5,
    eval_pairs: str | None = None,
    tokens_on_disk: bool = False,
    push_to_hub: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Train a model on a file of pairs; make `output_dir`, with a model card in it. Resumable.

    Args:
        model: hub id, folder or .gguf file.
        pairs: JSONL, JSON, CSV or Parquet in the standard preference format.
        eval_pairs: likewise; see `eval_rows` of `train_model`.
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
    check_training(given)
    lora, _ = adapters_and_arguments(given)
    source = find_model(model, "--model")
    if push_to_hub is not None:
        has_adapters = lora is not None and not options.get("merge")
        is_here = is_there(expanded_path(source))
        check_push(push_to_hub, adapters_on=source if has_adapters and is_here else None)
    rows = stream_pairs(pairs) if tokens_on_disk else read_pairs(pairs)
    looked_at = [*islice(rows, LOOKED_AT if tokens_on_disk else None)]
    if eval_pairs is not None:
        options["eval_rows"] = read_pairs(eval_pairs)
    compared = [looked_at[0], *options.get("eval_rows", [])[:1]]
    names = ("loss_args", "micro_batch_size", "max_tokens_per_batch", "precision", "load_in_4bit")
    check_launch(
        {"--batch-size": options.get("batch_size", DistillConfig.batch_size)},
        loss=loss,
        has_reference=all("reference_logps" in row for row in compared),
        **{name: options.get(name, getattr(DistillConfig, name)) for name in names},
    )
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
    describe_training(folder, model, pairs, eval_pairs, log)
    if push_to_hub is not None:
        print(f"pushed: {push(folder, push_to_hub)}", flush=True)
    return folder
