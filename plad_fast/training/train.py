"""One training of a saved model, which goes on where a killed run stopped."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback

from plad_fast.data.file_states import require_whole
from plad_fast.data.locks import locked
from plad_fast.data.records import digest, model_digest
from plad_fast.data.streams import StreamedRows
from plad_fast.errors import UsageError
from plad_fast.losses.registry import get_loss
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.loading import (
    check_loadable,
    end_loading_in_parts,
    has_own_weights,
    load_model,
    load_tokenizer,
    place_of,
)
from plad_fast.models.lora import Lora, load_with_lora
from plad_fast.models.team import rank, require_seen, together
from plad_fast.training.arguments import of_weights, training_arguments
from plad_fast.training.checkpoints import (
    Checkpoints,
    has_ended,
    newest_checkpoint,
    trainer_state,
)
from plad_fast.training.config import PLaDConfig
from plad_fast.training.launch import require_own_kind, split_batch
from plad_fast.training.setup import BASE
from plad_fast.training.signals import deferred_signals
from plad_fast.training.trained_folders import (
    LOGS,
    RECORD,
    TOKENS,
    checkpoints_of,
    discard_checkpoints,
    found_record,
    is_trained,
    log_history,
    publish,
    remove_training,
    require_ours,
    require_record,
    write_record,
)
from plad_fast.training.trainer import PLaDTrainer
from plad_fast.training.validation import Validation, Validator

_WARMUP_SHARE = 0.1
_EVALUATIONS = 10  # of a training, where nothing else is said
# transformers 5 has another name for it.
_CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PLaDConfig, "activation_checkpointing")
    else "gradient_checkpointing"
)
_NOTICE = "{}: saving a checkpoint after this step, then ending; once more ends at once"


def train_model(
    source: str | Path,
    rows: Sequence[Mapping[str, Any]] | StreamedRows,
    output: Path,
    *,
    loss: str,
    epochs: float,
    learning_rate: float,
    batch_size: int = 4,
    micro_batch_size: int | None = None,
    max_tokens_per_batch: int | None = 4096,
    saves: int = 4,
    seed: int = 0,
    precision: str = "auto",
    max_length: int = 1024,
    gradient_checkpointing: bool = False,
    beta: float | None = None,
    loss_args: str | None = None,
    sft_weight: float | None = None,
    length_normalization: float | None = None,
    rank_end_token: bool = False,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: str | None = None,
    lora_dropout: float = 0.0,
    load_in_4bit: bool = False,
    merge: bool = False,
    training: Mapping[str, Any] | None = None,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
    eval_steps: int | None = None,
    metric_for_best_model: str = "loss",
    validation: Validation | None = None,
    replace: bool = False,
    base: str | None = None,
) -> list[dict[str, Any]]:
    """Train the model in `source` on preference rows and save it in `output`.

    The defaults are those of `DistillConfig`, that is, of the command line.

    Checkpoints lie in `<output>.checkpoints` until the model is saved: the newest two, each three
    times the size of the weights, and for a moment a third. The newest that is as it was written is
    resumed from. Further ones are made at least ten minutes apart, and at the end of the step
    at which Ctrl-C, SIGTERM or SIGHUP comes, whose usual effect comes after that.

    Linear schedule, a tenth of it warm-up; AdamW without weight decay; gradients clipped at norm 1,
    unless `training` says otherwise; trained parameters in float32.

    A training that goes on prints from which step. A run at W&B or SwanLab ends with the training
    that began it.

    The processes of a run (`plad_fast.models.led`) share every step, and the weights are those of a
    single one but for rounding.

    Args:
        source: folder of the model and its tokenizer, a hub id, a .gguf file, or "offline" (see
            `load_model`); adapters of PEFT are merged into their base model first.
        rows: of the standard preference format; `rejected` is not needed for loss "sft". The token
            ids of streamed ones are kept in a file beside the checkpoints until the end.
        output: folder to make. If this very training made it before, it is left alone.
        loss, beta, loss_args, sft_weight, length_normalization, rank_end_token: see `PLaDConfig`,
            which ranks end tokens unless told otherwise.
        batch_size: rows in an optimizer step, of all processes together.
        micro_batch_size: rows in memory at once, in each process; with their number it divides the
            batch size.
        max_tokens_per_batch: tokens in memory at once, of those rows; see `PLaDConfig`.
        saves: checkpoints in the course of the training.
        seed: of the order of the rows and of dropout.
        precision: "float32", "bfloat16" autocast, or "auto".
        max_length: tokens of prompt and response.
        gradient_checkpointing: compute activations again in the backward rather than keep them.
        lora_r: rank of adapters, which are trained in place of the weights; None trains these. The
            folder then holds the adapters, and names `source` as their base. Frozen weights are
            in the dtype of `precision`.
        lora_alpha, lora_targets, lora_dropout, load_in_4bit: see `Lora`; None for 2 * lora_r, and
            for all linear layers but the head. Losses that compare responses train without dropout.
        merge: the folder holds the whole model instead, in float32.
        training: further settings by the names of `transformers.TrainingArguments` and
            `PLaDConfig`; see `training_arguments`.
        eval_rows: rows to measure every `eval_steps` steps (None: ten times), and after the last
            one; the checkpoint with the best `metric_for_best_model` becomes the model.
        validation: keeps the model that does best by it, measured before the training and at the
            `saves`, that before the training included, and ends one that only gets worse. Default:
            the model of the last step.
        replace: a model that another training made, and checkpoints of one, are no error. The model
            stays until the new one is trained.
        base: what adapters call `source`, in place of its absolute path: a path from their own
            folder that begins with a dot, so that both can be moved.

    Returns:
        The trainer's log history.

    Raises:
        UsageError: the folder holds something else, or a damaged model, or checkpoints of another
            training lie beside it, or another process trains there; a dropout that would not act;
            and from loading, from `Lora`, `training_arguments` or the trainer.
    """
    lora, arguments = adapters_and_arguments(
        {
            "loss": loss,
            "lora_r": lora_r,
            "lora_alpha": lora_alpha,
            "lora_targets": lora_targets,
            "lora_dropout": lora_dropout,
            "load_in_4bit": load_in_4bit,
            "training": training,
            "eval_pairs": eval_rows,
        }
    )
    source = place_of(source)
    sft_weight, length_normalization = get_loss(loss).terms(sft_weight, length_normalization)
    micro, accumulated = split_batch(batch_size, micro_batch_size)
    objective = {
        "loss": loss,
        "beta": beta,
        "loss_args": loss_args,
        "sft_weight": sft_weight,
        "length_normalization": length_normalization,
        "rank_end_token": rank_end_token,
    }
    # What the weights depend on; what is in memory at once changes no more than their rounding.
    record: dict[str, Any] = {
        "source": model_digest(source),
        "rows": f"{len(rows)} rows, "
        + (rows.digest if isinstance(rows, StreamedRows) else digest(list(rows))),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "precision": precision,
        "max_length": max_length,
        **objective,
        **({} if lora is None else {**lora.settings(), "merge": merge}),
        **({"training": of_weights(arguments)} if of_weights(arguments) else {}),
    }
    if validation is not None:
        record["validation"] = {**validation.settings(), "checks": saves}
    if eval_rows is not None:
        record |= {
            "eval_pairs": f"{len(eval_rows)} rows, {digest(list(eval_rows))}",
            "eval_steps": eval_steps,
            "metric_for_best_model": metric_for_best_model,
        }
    if is_trained(output):  # a run may be killed between this and its own record of it
        if not replace or found_record(output) == record:
            require_record(output, record)
            # Of a run --overwrite would remove all.
            anew = f"delete {output}" if replace else "pass --overwrite"
            require_whole(output, f"{anew} to have it trained again")
            discard_checkpoints(output)
            return log_history(output)
        require_ours(output)
    check_loadable(source)
    checkpoints = checkpoints_of(output)
    checkpoints.mkdir(parents=True, exist_ok=True)
    with locked(checkpoints):
        last = _resumable(checkpoints, record, replace=replace)
        write_record(checkpoints, record)
        # The Trainer would take a step too many from a checkpoint of the last one.
        patience = None if validation is None else validation.patience
        if last is None or not has_ended(last, patience):
            if last is not None:
                require_own_kind(last, micro)
                state = trainer_state(last)
                reached = f"step {state['global_step']} of {state['max_steps']}"
                print(f"continues from {reached}", flush=True)
            steps = max(1, math.ceil(math.ceil(len(rows) / batch_size) * epochs))
            options: dict[str, Any] = {
                **objective,
                "max_length": max_length,
                "num_train_epochs": epochs,
                "learning_rate": learning_rate,
                "lr_scheduler_type": "linear",
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": accumulated,
                "max_tokens_per_batch": max_tokens_per_batch,
                _CHECKPOINTING: gradient_checkpointing,
                "bf16": autocast_dtype(precision) == torch.bfloat16,
                "seed": seed,
                "save_steps": max(1, math.ceil(steps / saves)),
                "logging_steps": max(1, steps // 20),
            }
            if not {"warmup_steps", "warmup_ratio"} & arguments.keys():
                options["warmup_steps"] = round(_WARMUP_SHARE * steps)
            if eval_rows is not None:
                options |= {
                    "eval_strategy": "steps",
                    "eval_steps": eval_steps or math.ceil(steps / _EVALUATIONS),
                    "metric_for_best_model": metric_for_best_model,
                }
            options |= {"output_dir": str(checkpoints), **arguments}
            if isinstance(rows, StreamedRows):
                rows.tokens = checkpoints / f"{TOKENS}-{digest(record)}.arrow"
            run = _Run(source, rows, eval_rows, lora, validation, checkpoints, digest(record))
            step, *_ = together(run.go, last, options)
            last = checkpoints / f"checkpoint-{step}"  # saved at the end
        publish(last, output, source, merge=merge, base=base)
        discard_checkpoints(output)
    return log_history(output)


def adapters_and_arguments(settings: Mapping[str, Any]) -> tuple[Lora | None, dict[str, Any]]:
    """What a training's settings say of these, by the names of the command line, before a model or
    a row is read; UsageError as from `Lora` and `training_arguments`, and for a dropout that would
    not act."""
    lora = Lora.of(settings)
    evaluates = settings.get("eval_pairs") is not None
    arguments = training_arguments(settings.get("training"), evaluates=evaluates)
    compares = not get_loss(settings["loss"]).is_likelihood
    if lora and lora.dropout and compares and arguments.get("disable_dropout", True):
        raise UsageError(
            f"--lora-dropout {lora.dropout}: loss {settings['loss']} compares responses, without "
            "dropout; leave it out, or add --training disable_dropout=false"
        )
    return lora, arguments


def _resumable(checkpoints: Path, record: Mapping[str, Any], *, replace: bool) -> Path | None:
    """The checkpoint to go on from; those of another training are removed, or refused."""
    # A training that was refused leaves its record alone, which keeps nobody from another.
    names = {entry.name for entry in checkpoints.iterdir()} - {RECORD, LOGS}
    if any(not name.startswith(".") for name in names):
        if replace and found_record(checkpoints) not in (None, record):
            remove_training(checkpoints)
        else:
            require_record(checkpoints, record)
    return newest_checkpoint(checkpoints, digest(record))


@dataclass(frozen=True)
class _Run:
    """What every process of a run has of a training."""

    source: str | Path
    rows: Sequence[Mapping[str, Any]] | StreamedRows
    eval_rows: Sequence[Mapping[str, Any]] | None
    lora: Lora | None
    validation: Validation | None
    checkpoints: Path
    training: str

    def go(self, last: Path | None, options: Mapping[str, Any]) -> int:
        """Trains to the end, from a checkpoint if there is one; the number of the last step."""
        require_seen(self.checkpoints / RECORD)
        trainer = _trainer(self.source, self.rows, self.eval_rows, self.lora, **options)
        if self.validation is not None:
            trainer.add_callback(Validator(self.validation, trainer))
        open_before = _open_runs()
        with deferred_signals(_NOTICE if rank() == 0 else "") as asked:
            trainer.add_callback(Checkpoints(self.checkpoints, self.training, asked))
            try:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
            finally:
                for logger in _open_runs() - open_before:
                    sys.modules[logger].finish()
                end_loading_in_parts()
        step = trainer.state.global_step
        del trainer
        gc.collect()  # a Trainer refers to itself; its optimizer is twice the model
        return step


def _open_runs() -> set[str]:
    """W&B and SwanLab, where a run of theirs is open: another training would go on logging in it,
    under its name."""
    wandb, swanlab = (sys.modules.get(name) for name in ("wandb", "swanlab"))
    # Either may be a folder of its logs that Python takes for a package.
    of_wandb, of_swanlab = getattr(wandb, "run", None), getattr(swanlab, "get_run", lambda: None)()
    found = {"wandb": of_wandb, "swanlab": of_swanlab}
    return {name for name, run in found.items() if run is not None}


def _trainer(
    source: str | Path,
    rows: Sequence[Mapping[str, Any]] | StreamedRows,
    eval_rows: Sequence[Mapping[str, Any]] | None,
    lora: Lora | None,
    **options: Any,
) -> PLaDTrainer:
    """A trainer with the settings that all trainings share."""
    shared = {
        "use_cpu": best_device() == "cpu",
        "dataloader_pin_memory": False,
        "disable_tqdm": False,
        "save_strategy": "steps",
        "save_total_limit": None,  # `Checkpoints` sees to it
    }
    config = PLaDConfig(**{**shared, **options})
    if not has_own_weights(source):
        end_loading_in_parts()
    if lora is None:
        model: Any = load_model(source, dtype=torch.float32, merge_adapters=True)
    else:
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        model = load_with_lora(source, lora, dtype=dtype, seed=config.seed)
    trainer = PLaDTrainer(
        model,
        config,
        train_dataset=rows if isinstance(rows, StreamedRows) else list(rows),
        eval_dataset=None if eval_rows is None else list(eval_rows),
        processing_class=load_tokenizer(source),
        reference_model=None if lora is None else BASE,
    )
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress)
    return trainer


class _Progress(ProgressCallback):
    """The bar of the Trainer with the latest metrics behind it, instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        shown = (("nll", "nll"), ("ranking_accuracy", "ranked"), ("active_pairs", "active"))
        metrics = {label: f"{logs[name]:.2f}" for name, label in shown if name in logs}
        if metrics:
            self.training_bar.set_postfix(metrics)
