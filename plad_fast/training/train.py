"""One training of a saved model, which goes on where a killed run stopped."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME

from plad_fast.data.files import publish_folder, write_atomically
from plad_fast.data.locks import locked
from plad_fast.data.manifest import require_whole, write_manifest
from plad_fast.data.records import digest, model_digest, require_equal
from plad_fast.errors import UsageError
from plad_fast.losses.registry import get_loss
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.loading import check_loadable, load_model, load_tokenizer
from plad_fast.training.checkpoints import (
    LOG,
    OF_TRAINING,
    RECORD,
    Checkpoints,
    has_ended,
    newest_checkpoint,
    remove_checkpoints,
    remove_model,
    require_ours,
)
from plad_fast.training.signals import deferred_signals

if TYPE_CHECKING:
    from plad_fast.training.trainer import PLaDTrainer

_WARMUP_SHARE = 0.1
_REFERENCE = "reference"  # see `PLaDConfig.reference_cache`
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

    Args:
        source: folder of the model and its tokenizer, a hub id, or a .gguf file; adapters of PEFT
            are merged into their base model first, and all of its weights are trained.
        rows: of the standard preference format; `rejected` is not needed for loss "sft".
        output: folder to make. If this very training made it before, it is left alone.
        loss, beta, loss_args, sft_weight, length_normalization: see `PLaDConfig`.
        batch_size: rows in an optimizer step.
        micro_batch_size: rows in memory at once; it divides the batch size.
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
    micro = micro_batch_size or batch_size
    if batch_size % micro:
        raise UsageError(f"--micro-batch-size {micro} must divide --batch-size {batch_size}")
    # What the weights depend on; what is in memory at once changes no more than their rounding.
    record = {
        "source": model_digest(source),
        "rows": f"{len(rows)} rows, {digest(list(rows))}",
        "loss": loss,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "precision": precision,
        "max_length": max_length,
        "beta": beta,
        "loss_args": loss_args,
        "sft_weight": sft_weight,
        "length_normalization": length_normalization,
    }
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    if is_trained(output):  # a run may be killed between this and its own record of it
        if not replace or _found_record(output) == record:
            _require_record(output, record)
            # Of a run --overwrite would remove all.
            anew = f"delete {output}" if replace else "pass --overwrite"
            require_whole(output, f"{anew} to have it trained again")
            discard_checkpoints(output)
            return log_history(output)
        require_ours(output)
    check_loadable(source)
    checkpoints.mkdir(parents=True, exist_ok=True)
    with locked(checkpoints):
        # A training that was refused leaves its record alone, which keeps nobody from another.
        names = {entry.name for entry in checkpoints.iterdir()} - {RECORD}
        if any(not name.startswith(".") for name in names):
            if replace and _found_record(checkpoints) not in (None, record):
                _remove_training(checkpoints)
            else:
                _require_record(checkpoints, record)
        training = digest(record)
        last = newest_checkpoint(checkpoints, training)
        write_atomically(checkpoints / RECORD, json.dumps(record, indent=1))
        # The Trainer would take a step too many from a checkpoint of the last one.
        if last is None or not has_ended(last):
            steps = max(1, math.ceil(math.ceil(len(rows) / batch_size) * epochs))
            trainer = _trainer(
                source,
                rows,
                output_dir=str(checkpoints),
                loss=loss,
                beta=beta,
                loss_args=loss_args,
                sft_weight=sft_weight,
                length_normalization=length_normalization,
                max_length=max_length,
                num_train_epochs=epochs,
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=round(_WARMUP_SHARE * steps),
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=batch_size // micro,
                max_tokens_per_batch=max_tokens_per_batch,
                **_checkpointing(gradient_checkpointing),
                bf16=autocast_dtype(precision) == torch.bfloat16,
                seed=seed,
                save_steps=max(1, math.ceil(steps / saves)),
                logging_steps=max(1, steps // 20),
            )
            with deferred_signals(_NOTICE) as asked:
                trainer.add_callback(Checkpoints(checkpoints, training, asked))
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
            last = checkpoints / f"checkpoint-{trainer.state.global_step}"  # saved at the end
            del trainer
            gc.collect()  # a Trainer refers to itself; its optimizer is twice the model
        _publish(last, output)
        discard_checkpoints(output)
    return log_history(output)


def _publish(checkpoint: Path, output: Path) -> None:
    """Makes the model's folder of the training's last checkpoint."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns(*OF_TRAINING))
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    (partial / LOG).write_text(json.dumps(state["log_history"], indent=1), encoding="utf-8")
    shutil.copy(checkpoint.with_name(RECORD), partial / RECORD)
    write_manifest(partial)
    if is_trained(output):  # to be replaced, as was found before
        remove_model(output)
    publish_folder(partial, output)


def discard_training(output: Path) -> None:
    """Removes a model that a training made, and the checkpoints of one beside it.

    Raises:
        UsageError: the folder holds something else, or another process trains there; nothing is
            removed.
    """
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    if is_trained(output):
        require_ours(output)
    with locked(checkpoints) if checkpoints.is_dir() else contextlib.nullcontext():
        if is_trained(output):
            remove_model(output)
        discard_checkpoints(output)


def discard_checkpoints(output: Path) -> None:
    """Removes what a training left beside its model, and nothing that others put there."""
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    if not (checkpoints / RECORD).is_file():  # which goes last
        return
    with contextlib.suppress(OSError):  # the next call removes the rest
        _remove_training(checkpoints)
        for path in [*checkpoints.glob(f".{RECORD}.*"), checkpoints / RECORD]:
            path.unlink(missing_ok=True)
        checkpoints.rmdir()


def _remove_training(checkpoints: Path) -> None:
    remove_checkpoints(checkpoints)
    shutil.rmtree(checkpoints / _REFERENCE, ignore_errors=True)


def _trainer(source: str | Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> PLaDTrainer:
    """What does not change from one training to another."""
    from plad_fast.training.trainer import PLaDConfig, PLaDTrainer

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


def _checkpointing(wanted: bool) -> dict[str, bool]:
    """The Trainer's setting, which transformers 5 calls by another name."""
    from plad_fast.training.trainer import PLaDConfig

    new = hasattr(PLaDConfig, "activation_checkpointing")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True} if wanted else {}


def is_trained(output: Path) -> bool:
    """Whether there is something at the place of a trained model."""
    return output.exists() and not (output.is_dir() and not any(output.iterdir()))


def _require_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises UsageError unless the training of this record made the folder."""
    found = _found_record(folder)
    if found is None:
        is_there = (folder / RECORD).exists()
        what = f"a damaged {RECORD}" if is_there else f"no record of a training ({RECORD})"
        advice = "choose another --output-dir" + ", or pass --overwrite to replace it" * is_there
        raise UsageError(f"{folder} is there already and has {what}; {advice}")
    advice = "choose another --output-dir, or pass --overwrite to replace it"
    require_equal(found, json.loads(json.dumps(record)), folder, advice)


def _found_record(folder: Path) -> dict[str, Any] | None:
    """The record of the training that made a folder; None where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def log_history(model_folder: Path) -> list[dict[str, Any]]:
    """The log of the training that made a folder of `train_model`; empty if there is none."""
    path = model_folder / LOG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


class _Progress(ProgressCallback):
    """The bar of the Trainer with the latest metrics behind it, instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        shown = (("nll", "nll"), ("ranking_accuracy", "ranked"), ("active_pairs", "active"))
        metrics = {label: f"{logs[name]:.2f}" for name, label in shown if name in logs}
        if metrics:
            self.training_bar.set_postfix(metrics)
