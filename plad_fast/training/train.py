"""One training of a saved model, which goes on where a killed run stopped."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback

from plad_fast.data.locks import locked
from plad_fast.data.manifest import require_whole
from plad_fast.data.records import digest, model_digest
from plad_fast.losses.registry import get_loss
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.loading import check_loadable, load_model, load_tokenizer
from plad_fast.models.team import rank, require_seen, together
from plad_fast.training.checkpoints import Checkpoints, has_ended, newest_checkpoint
from plad_fast.training.config import PLaDConfig
from plad_fast.training.launch import require_own_kind, split_batch
from plad_fast.training.signals import deferred_signals
from plad_fast.training.trained_folders import (
    RECORD,
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

_WARMUP_SHARE = 0.1
# transformers 5 has another name for it.
_CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PLaDConfig, "activation_checkpointing")
    else "gradient_checkpointing"
)
_NOTICE = "{}: saving a checkpoint after this step, then ending; once more ends at once"


def train_model(
    source: str | Path,
    rows: Sequence[Mapping[str, Any]],
    output: Path,
    *,
    loss: str,
    epochs: float,
    learning_rate: float,
    batch_size: int = 4,
    micro_batch_size: int | None = None,
    max_tokens_per_batch: int | None = 4096,
    saves: int = 2,
    seed: int = 0,
    precision: str = "auto",
    max_length: int = 1024,
    gradient_checkpointing: bool = False,
    beta: float | None = None,
    loss_args: str | None = None,
    sft_weight: float | None = None,
    length_normalization: float | None = None,
    replace: bool = False,
) -> list[dict[str, Any]]:
    """Train the model in `source` on preference rows and save it in `output`.

    The defaults are those of `DistillConfig`, that is, of the command line.

    Checkpoints lie in `<output>.checkpoints` until the model is saved: the newest two, each three
    times the size of the weights, and for a moment a third. The newest that is as it was written is
    resumed from. One more is made every ten minutes, and at the end of the step at which Ctrl-C,
    SIGTERM or SIGHUP comes, whose usual effect comes after that.

    Linear schedule, a tenth of it warm-up; AdamW without weight decay; gradients clipped at norm 1;
    parameters in float32.

    The processes of a run (`plad_fast.models.led`) share every step, and the weights are those of a
    single one but for rounding.

    Args:
        source: folder of the model and its tokenizer, a hub id, or a .gguf file; adapters of PEFT
            are merged into their base model first, and all of its weights are trained.
        rows: of the standard preference format; `rejected` is not needed for loss "sft".
        output: folder to make. If this very training made it before, it is left alone.
        loss, beta, loss_args, sft_weight, length_normalization: see `PLaDConfig`.
        batch_size: rows in an optimizer step, of all processes together.
        micro_batch_size: rows in memory at once, in each process; with their number it divides the
            batch size.
        max_tokens_per_batch: tokens in memory at once, of those rows; see `PLaDConfig`.
        saves: checkpoints in the course of the training.
        seed: of the order of the rows and of dropout.
        precision: "float32", "bfloat16" autocast, or "auto".
        max_length: tokens of prompt and response.
        gradient_checkpointing: compute activations again in the backward rather than keep them.
        replace: a model that another training made, and checkpoints of one, are no error. The model
            stays until the new one is trained.

    Returns:
        The trainer's log history.

    Raises:
        UsageError: the folder holds something else, or a damaged model, or checkpoints of another
            training lie beside it, or another process trains there; and from loading or from the
            trainer.
    """
    sft_weight, length_normalization = get_loss(loss).terms(sft_weight, length_normalization)
    micro, accumulated = split_batch(batch_size, micro_batch_size)
    objective = {
        "loss": loss,
        "beta": beta,
        "loss_args": loss_args,
        "sft_weight": sft_weight,
        "length_normalization": length_normalization,
    }
    # What the weights depend on; what is in memory at once changes no more than their rounding.
    record = {
        "source": model_digest(source),
        "rows": f"{len(rows)} rows, {digest(list(rows))}",
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "precision": precision,
        "max_length": max_length,
        **objective,
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
        if last is None or not has_ended(last):
            if last is not None:
                require_own_kind(last, micro)
            steps = max(1, math.ceil(math.ceil(len(rows) / batch_size) * epochs))
            options = {
                **objective,
                "max_length": max_length,
                "num_train_epochs": epochs,
                "learning_rate": learning_rate,
                "lr_scheduler_type": "linear",
                "warmup_steps": round(_WARMUP_SHARE * steps),
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": accumulated,
                "max_tokens_per_batch": max_tokens_per_batch,
                _CHECKPOINTING: gradient_checkpointing,
                "bf16": autocast_dtype(precision) == torch.bfloat16,
                "seed": seed,
                "save_steps": max(1, math.ceil(steps / saves)),
                "logging_steps": max(1, steps // 20),
            }
            step, *_ = together(_run, source, rows, checkpoints, digest(record), last, options)
            last = checkpoints / f"checkpoint-{step}"  # saved at the end
        publish(last, output)
        discard_checkpoints(output)
    return log_history(output)


def _resumable(checkpoints: Path, record: Mapping[str, Any], *, replace: bool) -> Path | None:
    """The checkpoint to go on from; those of another training are removed, or refused."""
    # A training that was refused leaves its record alone, which keeps nobody from another.
    names = {entry.name for entry in checkpoints.iterdir()} - {RECORD}
    if any(not name.startswith(".") for name in names):
        if replace and found_record(checkpoints) not in (None, record):
            remove_training(checkpoints)
        else:
            require_record(checkpoints, record)
    return newest_checkpoint(checkpoints, digest(record))


def _run(
    source: str | Path,
    rows: Sequence[Mapping[str, Any]],
    checkpoints: Path,
    training: str,
    last: Path | None,
    options: Mapping[str, Any],
) -> int:
    """Trains to the end, in every process of a run; returns the number of the last step."""
    require_seen(checkpoints / RECORD)
    trainer = _trainer(source, rows, output_dir=str(checkpoints), **options)
    with deferred_signals(_NOTICE if rank() == 0 else "") as asked:
        trainer.add_callback(Checkpoints(checkpoints, training, asked))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    step = trainer.state.global_step
    del trainer
    gc.collect()  # a Trainer refers to itself; its optimizer is twice the model
    return step


def _trainer(source: str | Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> PLaDTrainer:
    """A trainer with the settings that all trainings share."""
    config = PLaDConfig(
        use_cpu=best_device() == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=False,
        save_strategy="steps",
        save_total_limit=None,  # `Checkpoints` sees to it
        **options,
    )
    trainer = PLaDTrainer(
        load_model(source, dtype=torch.float32, merge_adapters=True),
        config,
        train_dataset=list(rows),
        processing_class=load_tokenizer(source),
    )
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
