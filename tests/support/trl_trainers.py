"""Small trainers of TRL, with this library's loss and without it, and how their steps compare."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from plad_fast.integrations.trl.use import use_plad_fast

# A common beginning longer than the prompt, one response that continues the other, an empty
# prompt but for BOS, and lengths that differ: no batch is a rectangle.
PAIRS = [
    {"prompt": "a", "chosen": "yes indeed, it is so", "rejected": "no"},
    {"prompt": "a longer prompt", "chosen": "not at all", "rejected": "not at all, never"},
    {"prompt": "", "chosen": "certainly", "rejected": "nn"},
    {"prompt": "c", "chosen": "ok", "rejected": "okay"},
    {"prompt": "dddd", "chosen": "fine, then", "rejected": "x"},
    {"prompt": "e?", "chosen": "e!", "rejected": "e."},
]


KEPT = {
    "dpo": {"loss", "grad_norm", "num_tokens", "logits/chosen", "logits/rejected"},
    "cpo": {"loss", "grad_norm", "nll_loss"},
    "orpo": {"loss", "grad_norm", "nll_loss", "log_odds_ratio", "log_odds_chosen"},
}


ALL = {
    "dpo": {"entropy", "mean_token_accuracy"},
    "cpo": {"logits/chosen", "logits/rejected"},
    "orpo": {"logits/chosen", "logits/rejected"},
}


OF_PAIRS = {
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    *("logps/chosen", "logps/rejected"),
}


DEFAULTS = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 1e6,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "gradient_checkpointing": False,
}


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append(grads)


def moved(model):
    """The model with all weights a little off."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def gradients(trainer):
    callbacks = trainer.callback_handler.callbacks
    return next(cb for cb in callbacks if isinstance(cb, Gradients)).steps


@torch.no_grad()
def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def require_equal_steps(plain, fast):
    """Gradients of every step, and the weights in the end."""
    theirs, ours = gradients(plain), gradients(fast)
    assert len(theirs) == len(ours) == plain.state.global_step
    for step, (expected, found) in enumerate(zip(theirs, ours, strict=True)):
        assert found.keys() == expected.keys()
        assert any(grad.norm() > 1e-6 for grad in expected.values())
        for name, grad in expected.items():
            if name.endswith("k_proj.bias"):  # attention does not depend on it: rounding alone
                assert max(grad.norm(), found[name].norm()) < 1e-6
                continue
            assert relative(found[name], grad) < 1e-5, (step, name)
    trained = dict(fast.model.named_parameters())
    for name, weight in plain.model.named_parameters():
        assert relative(trained[name], weight) < 1e-5, name


def compare(kind, build, *, with_eval=False, layout="auto", metrics="fast", **options):
    """Trains with TRL's loss and with ours; returns both trainers."""
    plain = build(kind, with_eval=with_eval, **options)
    fast = use_plad_fast(
        build(kind, with_eval=with_eval, **options), layout=layout, metrics=metrics
    )
    for trainer in (plain, fast):
        trainer.train()
        if with_eval:
            trainer.evaluate()
    require_equal_steps(plain, fast)
    logs = [[log for log in t.state.log_history if "train_loss" not in log] for t in (plain, fast)]
    kept = KEPT[kind] | OF_PAIRS | (ALL[kind] if metrics == "all" else set())
    for expected, found in zip(*logs, strict=True):
        prefix = "eval_" if "eval_loss" in expected else ""
        for name in kept - ({"grad_norm"} if prefix else set()):
            # A reward is a small difference of log-probabilities of about -50, in float32.
            assert found[prefix + name] == pytest.approx(expected[prefix + name], 1e-5, 2e-5), name
    return plain, fast


def first_log(trainer):
    trainer.train()
    return trainer.state.log_history[0]


def without_last_prompt(data):
    last = len(data) - 1
    return data.map(
        lambda row, i: {"prompt_ids": row["prompt_ids"] if i < last else []}, with_indices=True
    )


class Schedule(TrainerCallback):
    """Changes a trainer's own options before every step, as a schedule of beta does."""

    def __init__(self, trainer, change):
        self.trainer, self.change = trainer, change

    def on_step_begin(self, args, state, control, **kwargs):
        self.change(self.trainer, state.global_step)
