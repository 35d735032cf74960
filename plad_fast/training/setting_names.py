"""What settings of transformers' trainer, of TRL and of axolotl are called here.

Nothing of transformers is imported: a command line is read without it.
"""

from __future__ import annotations

from fnmatch import fnmatch

_LAUNCHED = (
    "start the command with `accelerate launch --config_file FILE -m plad_fast`; "
    "see docs/multi-gpu.md"
)
# Patterns of names of the trainer -> the flag that sets it, or a sentence; "" where the program
# decides.
_TAKEN = {
    "output_dir": "--output-dir",
    "loss": "--loss",
    "beta": "--beta",
    "loss_args": "--loss-args",
    "sft_weight": "--sft-weight",
    "length_normalization": "--length-normalization",
    "rank_end_token": "--rank-end-token",
    "learning_rate": "--learning-rate",
    "num_train_epochs": "--epochs",
    "max_steps": "--epochs",
    "per_device_train_batch_size": "--batch-size and --micro-batch-size",
    "gradient_accumulation_steps": "--batch-size and --micro-batch-size",
    "auto_find_batch_size": "--max-tokens-per-batch",
    "max_tokens_per_batch": "--max-tokens-per-batch",
    "max_length": "--max-length",
    "seed": "--seed",
    "[bf]*16": "--precision",
    "[bf]*16_full_eval": "--precision",
    "*_checkpointing": "--gradient-checkpointing",
    "save_st*": "--saves-per-stage",
    "eval_st*": "--eval-pairs and --eval-steps of `plad-fast train`",
    "*_best_model*": "--eval-pairs and --metric-for-best-model of `plad-fast train`",
    "push_to_hub*": "--push-to-hub",
    "hub_*": "--push-to-hub",
    **dict.fromkeys(
        ("use_cpu", "no_cuda", "use_mps_device", "save_*", "do_*", "resume_from_checkpoint"), ""
    ),
    **dict.fromkeys(("overwrite_output_dir", "remove_unused_columns", "reference_cache"), ""),
    **dict.fromkeys(("ignore_data_skip", "restore_callback*", "enable_jit_checkpoint"), ""),
    **dict.fromkeys(("fsdp*", "deepspeed"), _LAUNCHED),
    **dict.fromkeys(("ddp_*", "local_rank", "*_config", "debug"), ""),
    **dict.fromkeys(("greater_is_better", "eval_on_start", "eval_delay", "label_names"), ""),
}
# Those of the others -> flags, of which a command may have one.
_ELSEWHERE = {
    **dict.fromkeys(
        ("model", "student", "model_name_or_path", "model_name", "base_model"),
        ("--model", "--student"),
    ),
    **dict.fromkeys(
        ("dataset", "datasets", "dataset_name", "data", "train_file"), ("--pairs", "--prompts")
    ),
    **dict.fromkeys(("eval_dataset", "test_datasets", "eval_file"), ("--eval-pairs",)),
    **dict.fromkeys(("val_size", "val_set_size"), ("--validation", "--eval-pairs")),
    **dict.fromkeys(("output", "out", "outdir"), ("--output-dir",)),
    "lr": ("--learning-rate",),
    "num_epochs": ("--epochs",),
    **dict.fromkeys(("max_seq_length", "sequence_len", "cutoff_len"), ("--max-length",)),
    **dict.fromkeys(("loss_type", "pref_loss", "rl"), ("--loss",)),
    **dict.fromkeys(("rl_beta", "pref_beta"), ("--beta",)),
    **dict.fromkeys(("rpo_alpha", "pref_ftx"), ("--sft-weight",)),
    "simpo_gamma": ("--loss-args '{\"gamma\": ...}'",),
    **dict.fromkeys(("early_stopping_patience", "early_stopping_steps"), ("--patience",)),
    **dict.fromkeys(("use_peft", "lora_rank"), ("--lora-r",)),
    **dict.fromkeys(("lora_target", "lora_target_modules"), ("--lora-targets",)),
    **dict.fromkeys(("qlora", "quantization_bit"), ("--load-in-4bit",)),
    "optimizer": ("--training optim=...",),
    "lr_scheduler": ("--training lr_scheduler_type=...",),
    "warmup_ratio": (
        "--training warmup_steps=..., below 1 a share of the steps (transformers 4: warmup_ratio)",
    ),
}
# Of the trainer, and free to be set.
_FREE = (
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "report_to"),
    *("run_name", "logging_steps", "logging_strategy", "logging_first_step", "disable_tqdm"),
    *("neftune_noise_alpha", "data_seed", "dataloader_num_workers", "per_device_eval_batch_size"),
    *("attention", "truncation_side", "layout", "disable_dropout"),
)


def advice(name: str) -> str | None:
    """What to do in place of giving the trainer a setting; None if it may be given."""
    taken = next((use for pattern, use in _TAKEN.items() if fnmatch(name, pattern)), None)
    if taken is None:
        return None
    return f"use {taken}" if taken.startswith("--") else taken or "the command decides it itself"


def spellings(name: str) -> list[str]:
    """Flags, with words behind them, that may be meant by a name of another program or of the
    trainer: "--learning-rate", "--training optim=..."."""
    found = list(_ELSEWHERE.get(name, ()))
    if name in _FREE:
        found.append(f"--training {name}=...")
    use = advice(name) or ""
    return [*found, use.removeprefix("use ")] if use.startswith("use --") else found
