"""What a launcher asks for, held against a training before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import DeepSpeedPlugin

from plad_fast.errors import UsageError, reported_as
from plad_fast.losses.registry import get_loss, read_loss_args
from plad_fast.models.devices import autocast_dtype
from plad_fast.models.team import size
from plad_fast.training.checkpoints import trainer_state

_AUTOMATIC = {
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--batch-size",
    "gradient_clipping": "--training max_grad_norm=...",
}
"""Of DeepSpeed's settings, which the Trainer fills in."""

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "no"}


def check_launch(
    batch_sizes: Mapping[str, int],
    settings: Mapping[str, Any],
    *,
    validates: bool = False,
    has_reference: bool = False,
) -> None:
    """Raises UsageError where the processes of this run cannot train so, or what `accelerate
    launch` has put into the environment contradicts the settings.

    Args:
        batch_sizes: flag -> rows in an optimizer step.
        settings: `loss`, `loss_args`, `micro_batch_size`, `max_tokens_per_batch`, `precision` and
            `load_in_4bit` that `train_model` will get.
        validates: whether it will get a validation.
        has_reference: whether the rows have `reference_logps`.
    """
    loss, precision, gpus = settings["loss"], settings["precision"], torch.cuda.device_count()
    if size() == 1 and gpus > 1:  # the Trainer would spread a batch over all of them
        raise UsageError(
            f"{gpus} GPUs are visible and a process uses one; start a process for each, with "
            f"torchrun --nproc-per-node {gpus} -m plad_fast ..., or choose a GPU, for example "
            "with CUDA_VISIBLE_DEVICES=0 before the command"
        )
    for flag, batch_size in batch_sizes.items():
        split_batch(batch_size, settings["micro_batch_size"], flag)
    asked, own = _variable("MIXED_PRECISION", "no"), _DTYPES[autocast_dtype(precision)]
    if asked not in ("no", own):
        raise UsageError(
            f"the launcher asks for mixed_precision {asked}, and --precision {precision} is "
            f"{own} here; set mixed_precision to no, and --precision decides"
        )
    if (compiler := _variable("DYNAMO_BACKEND", "no")) != "no":
        raise UsageError(
            f"the launcher asks for dynamo_backend {compiler}, and the loss would be compiled "
            "again for every step; set it to no"
        )
    wrapper = sharded_by()
    if wrapper == "FSDP":
        _require("fsdp_version", os.environ.get("FSDP_VERSION", "1"), "2")
        kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
        _require("fsdp_state_dict_type", kind, "FULL_STATE_DICT")
    if wrapper == "DeepSpeed":
        _check_deepspeed(settings["max_tokens_per_batch"], own, validates=validates)
    if wrapper and settings["load_in_4bit"]:
        raise UsageError(
            f"--load-in-4bit: {wrapper} does not shard weights of four bits; leave it out, or "
            "train with DDP (torchrun)"
        )
    options = read_loss_args(loss, settings["loss_args"]) or {}
    compares = get_loss(loss).needs_reference_for(options)
    if wrapper and compares and not has_reference:
        raise UsageError(
            f"--loss {loss} compares with the model before training, and one that {wrapper} shards "
            "is not whole in any process; train with DDP (torchrun), or add reference_logps to the "
            "pairs (plad_fast.training.add_reference_logps)"
        )


def _check_deepspeed(max_tokens_per_batch: int | None, own: str, *, validates: bool) -> None:
    if max_tokens_per_batch is not None:
        raise UsageError(
            "--max-tokens-per-batch makes several backwards a step, and DeepSpeed counts them; "
            "pass --max-tokens-per-batch none, and a --micro-batch-size that fits"
        )
    if validates:
        raise UsageError(
            "--validation takes a whole model in every process, which DeepSpeed does not leave; "
            "pass --validation 0, or train with DDP (torchrun) or FSDP2"
        )
    with reported_as(
        "the launcher's settings of DeepSpeed cannot be read; mend them", "accelerate"
    ):
        plugin = DeepSpeedPlugin()
    if plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise UsageError(
            "the launcher leaves zero3_save_16bit_model off (in a file of DeepSpeed's own: "
            "stage3_gather_16bit_weights_on_model_save), and checkpoints would have no model; "
            "set it to true"
        )
    asked = plugin.deepspeed_config
    for name, decides in _AUTOMATIC.items():
        if (found := asked.get(name)) != "auto":
            raise UsageError(
                f"{name} is {'not set' if found is None else found} for DeepSpeed, and {decides} "
                "decides; leave it out of accelerate's file, and set it to auto in one of "
                "DeepSpeed's own"
            )
    for name in ("fp16", "bf16"):
        if asked.get(name, {}).get("enabled", "auto") not in ("auto", name == own):
            raise UsageError(
                f"the launcher's file of DeepSpeed decides {name}.enabled, and --precision is "
                f"{own} here; set it to auto"
            )


def require_own_kind(checkpoint: Path, micro_batch_size: int) -> None:
    """Raises UsageError for a checkpoint that another wrapper has saved than this run's, for one of
    DeepSpeed in another number of processes, and where transformers 4 would go on with other rows
    at once than these."""
    kinds = {"FSDP": "pytorch_model_fsdp*", "DeepSpeed": "global_step*"}
    saved = next((name for name, files in kinds.items() if any(checkpoint.glob(files))), "")
    if saved != sharded_by():
        raise UsageError(
            f"{checkpoint} was saved under {saved or 'neither FSDP nor DeepSpeed'}, and this run "
            f"is under {sharded_by() or 'neither'}; start it as before, or delete "
            f"{checkpoint.parent} to train from the beginning"
        )
    shares = len([*checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")])
    if shares and shares != size():
        raise UsageError(
            f"{checkpoint} was saved by {shares} processes, whose shares DeepSpeed does not divide "
            f"among {size()}; start {shares} again, or delete {checkpoint.parent} to train from "
            "the beginning"
        )
    rows = trainer_state(checkpoint)["train_batch_size"]
    if transformers.__version__.startswith("4.") and rows != micro_batch_size:
        raise UsageError(
            f"{checkpoint} was saved with {rows} rows at once in each process, which transformers "
            f"{transformers.__version__} keeps, and now there are {micro_batch_size}; start as "
            "many processes with the same --micro-batch-size, or install transformers 5"
        )


def split_batch(
    batch_size: int, micro_batch_size: int | None, flag: str = "--batch-size"
) -> tuple[int, int]:
    """Rows at once in every process of this run, and how often they have them in a step.

    Raises UsageError where they do not make up the batch of `flag`.
    """
    count = size()
    if batch_size % count:
        raise UsageError(
            f"{flag} {batch_size} is no multiple of the {count} processes, which share it; choose "
            "another, or start fewer processes"
        )
    micro = micro_batch_size or batch_size // count
    if batch_size % (micro * count):
        of_all = f" in each of {count} processes" if count > 1 else ""
        raise UsageError(f"--micro-batch-size {micro}{of_all} must divide {flag} {batch_size}")
    return micro, batch_size // (micro * count)


def sharded_by() -> str:
    """What the launcher has shard the model: "FSDP", "DeepSpeed", or ""."""
    names = ("FSDP", "DeepSpeed")
    return next((name for name in names if _variable(f"USE_{name.upper()}") == "true"), "")


def _variable(name: str, default: str = "false") -> str:
    """What `accelerate launch` has set."""
    return os.environ.get(f"ACCELERATE_{name}", default).lower()


def _require(name: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise UsageError(f"the launcher asks for {name} {found}, and this takes {wanted}; set it")
