"""Cases for sets of processes: `PLaDTrainer` under DDP and accelerate's FSDP2.

A case leaves what the first process found; the test compares it with a training in one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, AutoTokenizer

from plad_fast.errors import UsageError
from plad_fast.models.wrappers import gathered
from plad_fast.training.config import PLaDConfig
from tests.support.trainings import InOrder

BATCH = 4
"""Rows of all processes together, so that the batches are the same ones for any number of them."""


@contextlib.contextmanager
def fresh_accelerator(fsdp):
    """accelerate's state as at the start of a program, and FSDP2 on the CPU.

    accelerate takes FSDP on accelerators only and, on the CPU, runs DDP without a word. Named after
    a device of which torch has none here, the processes get what they would on one.
    """
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    original = AcceleratorState.__init__

    def initialise(self, *args, **kwargs):
        if AcceleratorState._shared_state:
            return original(self, *args, **kwargs)
        PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_NPU
        return original(self, *args, **kwargs)

    if fsdp:
        AcceleratorState.__init__ = initialise
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def record_dtypes(trainer):
    """The dtypes in which losses, log-probabilities and counts reach the metrics."""
    dtypes = set()
    for meter in (trainer._train_meter, trainer._eval_meter):

        def add(rows, add=meter.add):
            dtypes.add(str(rows.dtype))
            add(rows)

        meter.add = add
    return dtypes


def train(folder: Path, name: str, *, fsdp=False, zero=None, tied=False, resume=None, **options):
    rows = json.loads((folder / "rows.json").read_text())
    change = options.pop("change", None)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if fsdp:
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    if zero:
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        options["deepspeed"] = ZERO_CONFIG
    rows = options.pop("rows", rows)
    with fresh_accelerator(fsdp):
        load = functools.partial(
            AutoModelForCausalLM.from_pretrained, folder / ("tied" if tied else "model")
        )
        model = None if zero == "loaded in parts" else load()
        args = PLaDConfig(
            **{
                "output_dir": str(folder / f"{name}-{world}"),
                "per_device_train_batch_size": BATCH // world,
                "per_device_eval_batch_size": 2,
                "learning_rate": 0.05,
                "lr_scheduler_type": "constant",
                "optim": "sgd",
                "max_grad_norm": 0.0,
                "max_steps": 2,
                "logging_steps": 1,
                "save_strategy": "no",
                "use_cpu": True,
                "disable_tqdm": True,
                "sft_weight": 0.0,  # as `tests.support.trainings.build` has them
                "length_normalization": 0.0,
                **options,
            }
        )
        model = load() if model is None else model
        if zero == "loaded in parts":
            assert not model.lm_head.weight.numel()
        if change is not None:
            change(model)
        trainer = InOrder(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows[:7],  # the last batch is filled up with repeated rows
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
        kind = str(trainer.accelerator.distributed_type)
        dtypes = record_dtypes(trainer)
        trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
        evaluated = trainer.evaluate()
    with gathered(trainer.model):
        names = [name for name, _ in trainer.model.named_parameters()]
        # FSDP2 leaves its last modules whole, and rounded, after an evaluation; not in here.
        state = trainer.model.state_dict()
        weights = {
            name: (w.full_tensor() if hasattr(w, "full_tensor") else w).detach().clone()
            for name, w in ((name, state[name]) for name in names)
        }
    return {
        "kind": kind,
        "weights": weights,
        "dtypes": sorted(dtypes),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "logged": next(e for e in reversed(trainer.state.log_history) if "loss" in e),
        "evaluated": evaluated,
        "best": trainer.state.best_model_checkpoint,
        "step": trainer.state.global_step,
    }


def rows_with_an_inactive_share(folder: Path) -> list[dict]:
    """Of every four rows the last two have no gradient: with two processes, all of one's."""
    rows = json.loads((folder / "rows.json").read_text())
    return [
        {**row, "chosen_score": 1.0 if i % 4 < 2 else -1.0, "rejected_score": 0.0}
        for i, row in enumerate(rows)
    ]


def margin(folder: Path, name: str, **options):
    options |= {"rows": rows_with_an_inactive_share(folder), "loss": "plad_margin", "beta": 100.0}
    return train(folder, name, **options)


def refused_reference(folder: Path):
    with pytest.raises(UsageError, match=r"add them to the rows beforehand.*add_reference_logps"):
        train(folder, "refused", fsdp=True, loss="dpo")


def scale_logits(model):
    """What no name in a config tells, and the first process finds out."""

    def forward(*args, **kwargs):
        output = type(model).forward(model, *args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = forward


def refused_head(folder: Path):
    with pytest.raises(UsageError, match="does more to its logits than the fused loss"):
        train(folder, "refused-head", change=scale_logits)


def infinite_loss_in_the_last_process(folder: Path):
    rows = rows_with_an_inactive_share(folder)
    options = {"loss": "plad_margin", "beta": 100.0, "skip_inactive": False}
    rows[BATCH - 1]["chosen_score"] = math.inf
    match = rf"^process {dist.get_world_size() - 1}: the loss is inf at step 0; look for extreme"
    with pytest.raises(UsageError, match=match):
        train(folder, "infinite", rows=rows, **options)


ZERO_CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
WINDOW = {"gradient_accumulation_steps": 2, "sft_weight": 0.5}
HINGE = {
    "beta": 0.5,
    "max_steps": 4,
    "max_tokens_per_batch": 40,
    "optim": "adamw_torch",
    "learning_rate": 3e-3,
}
# Every process scores its share of the rows under the reference.
REFERENCE = {**HINGE, "loss": "dpo_hinge", "beta": 0.2, "gradient_accumulation_steps": 2}
BEST = {
    "max_steps": 3,
    "learning_rate": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}
LONG = {
    "max_steps": 4,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "sft_weight": 0.2,
}
SAVED = {**LONG, "save_strategy": "steps", "save_steps": 2}

_TRAININGS = {
    "window": (train, WINDOW),
    "tied": (train, {**WINDOW, "tied": True}),
    "hinge": (train, HINGE),
    "inactive": (margin, {"max_steps": 2}),
    "best": (train, BEST),
    "saved": (train, SAVED),
}


def _named(trainings, prefix="", **more):
    return {
        prefix + name: functools.partial(run, name=prefix + name, **options, **more)
        for name, (run, options) in trainings.items()
    }


SINGLE = _named(_TRAININGS) | _named({"reference": (train, REFERENCE)})
TRAININGS = dict(SINGLE)
RESUMED = {"saved": functools.partial(train, name="again", resume="saved-2/checkpoint-2", **LONG)}
RESUMED_ALONE = dict(RESUMED)
REFUSED = {"head": refused_head, "infinite": infinite_loss_in_the_last_process}
HAS_TRANSFORMERS_5 = int(transformers.__version__.partition(".")[0]) >= 5
"""Earlier ones configure FSDP2 otherwise."""
if HAS_TRANSFORMERS_5:
    TRAININGS |= _named(_TRAININGS, "fsdp-", fsdp=True)
    TRAININGS |= {
        "fsdp-bf16": functools.partial(train, name="fsdp-bf16", fsdp=True, bf16=True, **WINDOW),
        "fsdp-refused": refused_reference,
    }
    RESUMED["fsdp-saved"] = functools.partial(
        train, name="fsdp-again", fsdp=True, resume="fsdp-saved-2/checkpoint-2", **LONG
    )
ZERO_TRAININGS = {
    "zero-window": functools.partial(train, name="zero-window", zero="loaded whole", **WINDOW),
    "zero-tied": functools.partial(
        train, name="zero-tied", zero="loaded in parts", tied=True, **WINDOW
    ),
    "zero-inactive": functools.partial(
        margin, name="zero-inactive", zero="loaded in parts", max_steps=2
    ),
}
