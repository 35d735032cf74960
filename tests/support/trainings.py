"""Trainings of the tiny model on a few pairs, for the tests of the trainer."""

from __future__ import annotations

import copy

import torch
from torch.utils.data import SequentialSampler

from plad_fast.training.config import PLaDConfig
from plad_fast.training.trainer import PLaDTrainer

# Lengths differ on purpose: a mean of batch means would not be the mean.
PAIRS = [
    {"prompt": "a", "chosen": "yes indeed, it is so", "rejected": "no"},
    {"prompt": "a longer prompt", "chosen": "y", "rejected": "not at all, never"},
    {"prompt": "bb", "chosen": "certainly", "rejected": "nn"},
    {"prompt": "c", "chosen": "ok", "rejected": "a rather long refusal"},
    {"prompt": "dddd", "chosen": "fine, then", "rejected": "x"},
    {"prompt": "e?", "chosen": "e!", "rejected": "e."},
    {"prompt": "f", "chosen": "ffff", "rejected": "gggggggg"},
    {"prompt": "hm", "chosen": "a", "rejected": "b"},
]
SCORED = [{**row, "chosen_score": i + 1.0, "rejected_score": -0.5} for i, row in enumerate(PAIRS)]
RANKED = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"], "zz"]} for r in PAIRS]


class InOrder(PLaDTrainer):
    """Takes the rows as they come; only transformers 5 has a setting for it."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def build(
    tiny_model,
    tiny_tokenizer,
    folder,
    rows=PAIRS,
    *,
    eval_rows=None,
    model=None,
    output=None,
    callbacks=None,
    trainer=InOrder,
    reference_model=None,
    **options,
):
    """A trainer on a copy of the tiny model; the fixture `make` calls it with the first three."""
    defaults = {
        "output_dir": str(output or folder / "run"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        # Sums without a regulariser, under which most pairs of a hinge have a gradient or none.
        "sft_weight": 0.0,
        "length_normalization": 0.0,
    }
    return trainer(
        model=copy.deepcopy(tiny_model) if model is None else model,
        args=PLaDConfig(**{**defaults, **options}),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tiny_tokenizer,
        reference_model=reference_model,
        callbacks=callbacks,
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_weights(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], **tolerance, msg=lambda m, n=name: n + m
        )


def last_log(trainer, key="loss"):
    return next(entry for entry in reversed(trainer.state.log_history) if key in entry)
