"""TRL's trainers with this library's loss against the same trainers without it."""

from __future__ import annotations

import copy
import importlib
import math
import operator
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

import plad_fast
from plad_fast.errors import UsageError

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 15):
    pytest.skip("the integration is for TRL 1.15 and newer", allow_module_level=True)

from plad_fast.integrations.trl import pair_rows as _pair_rows  # noqa: E402
from plad_fast.integrations.trl.use import use_plad_fast  # noqa: E402
from plad_fast.losses.objective import Objective  # noqa: E402
from tests.models.test_encoder_decoder import make_model as make_encoder_decoder  # noqa: E402
from tests.support.tiny_configs import causal_lm_families, make_causal_lm  # noqa: E402

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
OF_PAIRS = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
OF_PAIRS |= {"logps/chosen", "logps/rejected"}


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


@pytest.fixture
def build(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Makes a trainer of a kind; its model is a copy, and its reference another model."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def make(
        kind="dpo", *, model=None, reference=None, own_reference=False, peft=None, rows=PAIRS,
        cls=None, with_eval=False, **options,
    ):  # fmt: skip
        name = kind.upper()
        if kind == "dpo":
            trainer_class, config_class = trl.DPOTrainer, trl.DPOConfig
        else:
            module = pytest.importorskip(f"trl.experimental.{kind}")
            trainer_class = getattr(module, f"{name}Trainer")
            config_class = getattr(module, f"{name}Config")
        extra = {}
        torch.manual_seed(0)
        if kind == "dpo" and peft is None and not own_reference:
            extra["ref_model"] = moved(copy.deepcopy(reference or tiny_model))
        if peft is not None:
            extra["peft_config"] = peft
        data = datasets.Dataset.from_list(rows)
        return (cls or trainer_class)(
            model=copy.deepcopy(tiny_model if model is None else model),
            args=config_class(**{**DEFAULTS, "output_dir": str(tmp_path / "run"), **options}),
            train_dataset=data,
            eval_dataset=data if with_eval else None,
            processing_class=tiny_tokenizer,
            callbacks=[Gradients()],
            **extra,
        )

    return make


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


# The losses themselves are compared with TRL's in tests/losses/test_golden_trl.py.
DPO_CASES = [
    {},
    {"loss_type": ["robust"], "label_smoothing": 0.2, "gradient_accumulation_steps": 2},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.4], "precompute_ref_log_probs": True},
    {
        **{"f_divergence_type": "js_divergence", "loss_type": ["exo_pair"]},
        **{"label_smoothing": 0.01, "gradient_checkpointing": True},
        **{"padding_free": True, "max_length": 12},
    },
    {"loss_type": ["hinge"], "beta": 0.5, "truncation_mode": "keep_end", "max_length": 9},
    {
        **{"loss_type": ["sigmoid_norm", "bco_pair"]},
        **{"sync_ref_model": True, "ref_model_sync_steps": 1},
    },
    {"ld_alpha": 0.3},
    {"ld_alpha": 0.0, "loss_type": ["ipo", "sft"], "precompute_ref_log_probs": True},
    {"use_weighting": True, "beta": 0.7},
    {
        "use_weighting": True,
        "ld_alpha": 0.3,
        "loss_type": ["ipo", "robust"],
        "label_smoothing": 0.1,
    },
    {"use_weighting": True, "loss_type": ["sigmoid_norm"], "gradient_checkpointing": True},
    {"ld_alpha": 0.6, "loss_type": ["hinge", "apo_zero"], "loss_weights": [0.5, 2.0]},
]


def said(options):
    return ",".join(f"{name}={value}" for name, value in options.items()) or "default"


@pytest.mark.parametrize("options", DPO_CASES, ids=said)
def test_dpo_steps_are_those_of_trl(build, options):
    """Loss, every gradient, metrics and the trained weights, over three steps."""
    _, fast = compare("dpo", build, **options)
    assert fast._head_loss.layout == "shared"


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("kind", ["dpo", "cpo", "orpo"])
def test_router_losses_are_those_of_trl(build, mixture, kind, layout):
    """Whatever the layout: tokens count as in TRL's padded rows."""
    options = {"router_aux_loss_coef": 0.7} if kind == "dpo" else {}
    plain, fast = compare(kind, build, model=mixture, reference=mixture, layout=layout, **options)
    assert fast._head_loss.layout == layout
    if kind == "dpo":
        for expected, found in zip(*(t.state.log_history for t in (plain, fast)), strict=True):
            if "aux_loss" in expected:
                assert found["aux_loss"] == pytest.approx(expected["aux_loss"], 1e-5)
                assert expected["aux_loss"] > 0.1
    gates = [name for name in gradients(fast)[0] if "gate" in name]
    assert gates


@pytest.fixture
def mixture(tiny_tokenizer):
    """A Mixtral whose config asks for its router loss."""
    model = make_causal_lm("mixtral", causal_lm_families()["mixtral"])
    model.resize_token_embeddings(len(tiny_tokenizer))
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.3
    return model


class Schedule(TrainerCallback):
    """Changes a trainer's own options before every step, as a schedule of beta does."""

    def __init__(self, trainer, change):
        self.trainer, self.change = trainer, change

    def on_step_begin(self, args, state, control, **kwargs):
        self.change(self.trainer, state.global_step)


def strengthen(trainer, step):
    trainer.beta = 0.1 + step


def weigh_otherwise(trainer, step):
    trainer.ld_alpha = [None, 0.4, 1.0][step]


def change_the_loss(trainer, step):
    trainer.loss_types[:] = ["sigmoid", "hinge", "ipo"][step : step + 1]


def smooth_less(trainer, step):
    trainer.label_smoothing, trainer.cpo_alpha = 0.2 / (step + 1), 1.0 + step


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dpo", change_the_loss),
        ("dpo", weigh_otherwise),
        ("cpo", smooth_less),
        ("orpo", strengthen),
    ],
)
def test_options_that_change_between_steps_count_as_in_trl(kind, change, build):
    plain, fast = build(kind), use_plad_fast(build(kind))
    for trainer in (plain, fast):
        trainer.add_callback(Schedule(trainer, change))
        trainer.train()
    require_equal_steps(plain, fast)


def test_options_set_on_the_trainer_go_before_its_arguments(build):
    plain, fast = build(), build()
    plain.beta = fast.beta = 1.0
    fast = use_plad_fast(fast)
    for trainer in (plain, fast):
        trainer.train()
    require_equal_steps(plain, fast)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("dpo", {"loss_type": ["sigmoid", "bco_pair"]}), ("orpo", {})],
)
def test_a_loss_is_probed_before_the_first_step_only(kind, options, build, monkeypatch):
    """On a GPU a probe waits for the device."""
    trainer, steps, probe = use_plad_fast(build(kind, **options)), [], Objective._probe

    def spy(*arguments):
        steps.append(trainer.state.global_step)
        probe(*arguments)

    monkeypatch.setattr(Objective, "_probe", spy)
    trainer.train()
    assert trainer.state.global_step == 3
    assert not any(steps)


def test_an_option_that_becomes_unknown_is_refused_at_the_step(build):
    trainer = use_plad_fast(build())
    later = Schedule(trainer, lambda t, step: t.loss_types.__setitem__(0, "aot" if step else "ipo"))
    trainer.add_callback(later)
    with pytest.raises(UsageError, match="loss_type 'aot' does not work here"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_other_layouts_give_the_same_step(build, layout):
    _, fast = compare("dpo", build, layout=layout, loss_type=["ipo"])
    assert fast._head_loss.layout == layout


def test_evaluation_and_all_metrics_are_those_of_trl(build, tiny_model, tiny_tokenizer):
    """With a model that says one letter, and is right at times; the last evaluation
    batch is a smaller one."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.lm_head.weight *= 0.1
        model.lm_head.weight[tiny_tokenizer.convert_tokens_to_ids("e")] *= 200
    plain, _ = compare("dpo", build, model=model, with_eval=True, metrics="all")
    assert any(log.get("mean_token_accuracy") for log in plain.state.log_history)


def test_adapters_are_trained_against_the_model_without_them(build):
    """The reference is the model with its adapters off, and no second copy of it exists."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_alpha=64, init_lora_weights=False
    )
    _, fast = compare("dpo", build, peft=config)
    assert fast.ref_model is None
    assert all("lora" in name for name in gradients(fast)[0])


def test_the_head_of_the_reference_is_checked_too(build, tiny_model):
    """Its logits are not what its head and its configuration say."""
    reference = copy.deepcopy(tiny_model)
    reference.lm_head.register_forward_hook(lambda module, args, logits: logits * 0.5)
    trainer = build(reference=reference)
    with pytest.raises(UsageError, match="logits"):
        use_plad_fast(trainer)


def test_an_adapter_that_was_trained_before_is_its_own_reference(build, tiny_model):
    """TRL keeps its first state as a second adapter, which the loss switches to and back."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(tiny_model), config)
    _, fast = compare("dpo", build, model=model, own_reference=True)
    assert "ref" in fast.model.peft_config


@pytest.mark.parametrize(("kind", "metrics"), [("dpo", "fast"), ("dpo", "all"), ("cpo", "all")])
def test_autocast_is_that_of_the_trainer(build, tiny_model, kind, metrics):
    """bf16, TRL's default: both round, each in its own order. The logits are large, and so are
    their means: rounding these to bf16, or a sum of them, would show."""
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight += 3 * torch.randn_like(weight) + torch.randn_like(weight[0])
    options = {"model": model, "bf16": True, "max_steps": 1}
    plain = first_log(build(kind, **options))
    fast = first_log(use_plad_fast(build(kind, **options), metrics=metrics))
    for name in KEPT[kind] | OF_PAIRS | (ALL[kind] if metrics == "all" else set()):
        near = 0.02 if name == "grad_norm" else 2e-3
        assert fast[name] == pytest.approx(plain[name], rel=near, abs=2e-3), name
    exact = first_log(use_plad_fast(build(kind, **{**options, "bf16": False})))
    assert fast["logps/chosen"] != exact["logps/chosen"]


def first_log(trainer):
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("kind", ["dpo", "cpo"])
def test_softcapped_logits_are_those_of_trl(build, tiny_model, kind):
    """Gemma 2 has windows, a cap on its logits and tied embeddings."""
    from tests.support.tiny_models import SHARED

    torch.manual_seed(0)
    model = SHARED["gemma2"]()
    model.resize_token_embeddings(tiny_model.config.vocab_size)
    _, fast = compare(kind, build, model=model, reference=model, metrics="all")
    assert fast._head_loss.layout == "shared"


CPO_CASES = [
    {"loss_type": "simpo", "cpo_alpha": 0.5, "metrics": "all", "gradient_checkpointing": True},
    {"loss_type": "ipo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"loss_type": "hinge", "beta": 0.3, "cpo_alpha": 0.0},
    {"loss_type": "alphapo", "alpha": 0.2, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", CPO_CASES, ids=said)
def test_cpo_steps_are_those_of_trl(build, options):
    compare("cpo", build, **options)


@pytest.mark.parametrize(("layout", "metrics"), [("auto", "all"), ("padded", "fast")])
def test_orpo_steps_are_those_of_trl(build, layout, metrics):
    """Its regulariser counts the prompt too, which the other losses leave out."""
    compare("orpo", build, layout=layout, metrics=metrics, with_eval=True)


@pytest.fixture(params=["t5", "bart"])
def two_halves(request, tiny_tokenizer):
    """A small encoder-decoder model for the tiny tokenizer."""
    model = make_encoder_decoder(request.param)
    model.resize_token_embeddings(len(tiny_tokenizer))
    model.config.pad_token_id = model.config.decoder_start_token_id = tiny_tokenizer.pad_token_id
    return model


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cpo", {"loss_type": "sigmoid", "metrics": "all"}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5, "max_completion_length": 9}),
        ("orpo", {"metrics": "all"}),
    ],
    ids=str,
)
def test_encoder_decoder_steps_are_those_of_trl(build, two_halves, kind, options):
    _, fast = compare(kind, build, model=two_halves, with_eval=True, **options)
    assert fast._head_loss.layout == "encoder_decoder"


@pytest.mark.filterwarnings("ignore:.*return_outputs")
def test_encoder_decoder_predictions_are_those_of_trl(build, two_halves):
    plain, fast = (build("cpo", model=two_halves, with_eval=True) for _ in range(2))
    expected, found = (t.predict(t.eval_dataset) for t in (plain, use_plad_fast(fast)))
    assert found.predictions == pytest.approx(expected.predictions, 1e-4, 2e-5)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], 1e-5)


EMPTY = {"prompt": "p" * 80, "chosen": "ok", "rejected": "no way"}  # the prompt fills max_length


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cpo", {"loss_type": "simpo", "alpha": 0.25, "cpo_alpha": 0.0}),
        ("cpo", {"loss_type": "ipo"}),
        ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.5}),
        ("orpo", {}),
    ],
)
def test_an_empty_response_is_worth_nothing_in_the_metrics(build, kind, options):
    """Its log-probability is 0, a sum and a mean; the other pair's numbers are TRL's."""
    common = {**options, "max_length": 40, "max_steps": 1, "learning_rate": 0.0}
    alone = build(kind, rows=PAIRS[:1], **common)
    both = use_plad_fast(build(kind, rows=[EMPTY, PAIRS[0]], **common))
    expected, found = first_log(alone), first_log(both)
    halves = OF_PAIRS | ({"log_odds_chosen"} if kind == "orpo" else set())
    for name in halves - {"rewards/accuracies"}:
        assert found[name] == pytest.approx(expected[name] / 2, 1e-5, 1e-6), name
    if kind == "orpo":
        ratio = (expected["log_odds_ratio"] - math.log(2)) / 2
        assert found["log_odds_ratio"] == pytest.approx(ratio, 1e-5)
    else:
        assert found["nll_loss"] == pytest.approx(expected["nll_loss"], 1e-5)
    assert all(math.isfinite(value) for value in found.values())


LONG = {"prompt": "p", "chosen": "a" * 90, "rejected": "b" * 99}


@pytest.mark.parametrize(
    ("kind", "row", "options"),
    [
        ("cpo", EMPTY, {"loss_type": "simpo", "max_length": 40}),
        ("orpo", EMPTY, {"max_length": 40}),
        # TRL's p ** -alpha of a sum of hundreds of nats is infinite, and margins are NaN.
        ("cpo", LONG, {"alpha": 0.5}),
    ],
    ids=["simpo-empty", "orpo-empty", "alphapo-long"],
)
def test_metrics_of_extreme_responses_are_finite(build, kind, row, options):
    trainer = use_plad_fast(build(kind, rows=[row] * 2, max_steps=1, **options))
    assert all(math.isfinite(value) for value in first_log(trainer).values())


@pytest.mark.filterwarnings("ignore:.*return_outputs")
@pytest.mark.parametrize("kind", ["dpo", "cpo", "orpo"])
def test_predictions_are_those_of_trl(build, kind):
    """Of `predict`, and those that `compute_metrics` gets; DPO's are logits, the others' means."""
    plain, fast = build(kind, with_eval=True), build(kind, with_eval=True)
    made = []
    for trainer in (plain, use_plad_fast(fast, metrics="all" if kind == "dpo" else "fast")):
        trainer.compute_metrics = lambda seen: {"mean": seen.predictions.mean()}
        made.append((trainer.predict(trainer.eval_dataset), trainer.evaluate()))
    (expected, their_log), (found, our_log) = made
    assert found.predictions == pytest.approx(expected.predictions, 1e-4, 2e-5)
    assert (found.label_ids == expected.label_ids).all()
    for ours, theirs, names in (
        (found.metrics, expected.metrics, {"test_loss", "test_mean"}),
        (our_log, their_log, {"eval_loss", "eval_mean"}),
    ):
        assert ours.keys() == theirs.keys() >= names
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], 1e-5, 2e-5), name


def test_logits_are_not_computed_where_nobody_asks(build):
    trainer = use_plad_fast(build("cpo", with_eval=True))
    trainer.evaluate()
    assert "eval_logits/chosen" not in trainer.state.log_history[-1]
    trainer.compute_metrics = lambda seen: {}
    trainer.evaluate()
    assert "eval_logits/chosen" in trainer.state.log_history[-1]


def test_common_beginnings_run_through_the_model_once(build):
    """What a step needs: the padded rows of TRL have more than twice the tokens of ours."""
    trainer = use_plad_fast(build(rows=[dict(row, prompt="x" * 40) for row in PAIRS]))
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = _pair_rows.pair_batch(
        inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], layout="shared"
    )
    assert batch["input_ids"].numel() * 2 < inputs["input_ids"].numel()
    assert batch["targets"].numel() == inputs["completion_mask"].sum()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("dpo", "auto"), ("dpo", "packed"), ("dpo", "padded"), ("cpo", "auto"), ("orpo", "auto")],
)
def test_the_first_batch_says_once_what_is_saved(build, kind, layout, capfd):
    trainer = use_plad_fast(build(kind, max_steps=3, with_eval=True), layout=layout)
    trainer.train()
    trainer.evaluate()
    [line] = [text for text in capfd.readouterr().out.splitlines() if "plad_fast in" in text]
    assert f"plad_fast in {kind.upper()}Trainer: loss {kind}, " in line
    assert {"auto": "shared"}.get(layout, layout) + " rows" in line
    places, tokens, share, scored = map(
        int, re.findall(r"(\d+)(?: tokens| run|% saved| reach)", line)
    )
    assert share == round(100 * (1 - tokens / places))
    assert (share == 0) == (layout == "padded")
    assert 0 < scored < places


def test_left_padding_is_refused():
    ids, mask = torch.ones(2, 3).long(), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(UsageError, match="padding on the right"):
        _pair_rows.pair_batch(ids, mask, mask, layout="shared")


REFUSED = [
    ({"args.use_liger_kernel": True}, "use_liger_kernel"),
    ({"args.torch_compile": True}, "torch_compile"),
    ({"args.neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    ({"args.activation_offloading": True}, "activation_offloading"),
    ({"args.metric_for_best_model": "eval_entropy"}, "metric_for_best_model"),
    ({"args.truncation_mode": "keep_end", "args.loss_type": ["ipo"]}, "keep_end"),
    ({"use_weighting": "yes"}, "use_weighting"),
    ({"use_weighting": True, "loss_types": ["sft"]}, "use_weighting=True fails in TRL"),
    ({"ld_alpha": 1.5}, "ld_alpha"),
    ({"ld_alpha": 0.5, "loss_types": ["sft"]}, "ld_alpha=0.5 has no effect"),
    ({"loss_types": ["aot"]}, "aot"),
    ({"label_smoothing": 0.1}, "label_smoothing"),
    ({"accelerator.state.parallelism_config": object()}, "parallelism"),
    ({"accelerator.state.distributed_type": DistributedType.FSDP}, "FSDP"),
]
MODELS = [
    ({"aux_loss_enabled": True}, "LlamaForCausalLM has none"),
    ({"_is_vlm": True}, "vision"),
    ({"model.config.is_encoder_decoder": True}, "encoder-decoder"),
    ({"model.hf_device_map": {"model": 0, "lm_head": 1}}, "device_map"),
    ({"model.peft_config": {"p": SimpleNamespace(is_prompt_learning=True)}}, "learns a prompt"),
]


def require_refused(trainer, cases, monkeypatch):
    """Each by itself; without them the trainer is taken."""
    for settings, name in cases:
        with monkeypatch.context() as patch:
            for path, value in settings.items():
                owner, _, attribute = f".{path}".rpartition(".")
                owner = operator.attrgetter(owner[1:])(trainer) if owner else trainer
                patch.setattr(owner, attribute, value, raising=False)
            with pytest.raises(UsageError, match=name):
                use_plad_fast(trainer)
    assert not hasattr(trainer, "_head_loss")
    use_plad_fast(trainer)


def test_options_that_are_not_supported_are_refused_by_name(build, monkeypatch):
    require_refused(build(), REFUSED, monkeypatch)
    best = {"args.metric_for_best_model": "logits/chosen"}
    require_refused(build("cpo"), [(best, "metric_for_best_model")], monkeypatch)


def test_models_that_are_not_supported_are_refused(build, monkeypatch):
    require_refused(build(), MODELS, monkeypatch)


@pytest.mark.parametrize(
    ("name", "value"),
    [("impl", 3), ("scratch_mib", -3), ("scratch_mib", 0), ("scratch_mib", 1.5)],
)
def test_arguments_are_checked_before_the_trainer_is_changed(name, value):
    trainer = object.__new__(trl.DPOTrainer)
    with pytest.raises(UsageError, match=rf"{name}.*{value}"):
        use_plad_fast(trainer, **{name: value})
    assert type(trainer) is trl.DPOTrainer


def test_the_backend_and_its_memory_may_be_chosen(build):
    trainer = build(max_steps=1)
    with pytest.raises(UsageError, match="tritn"):
        use_plad_fast(trainer, impl="tritn")
    use_plad_fast(trainer, impl="torch", scratch_mib=2).train()


def test_a_trl_that_lacks_a_method_is_refused(build, monkeypatch):
    trainer = build()
    monkeypatch.delattr(trl.DPOTrainer, "_compute_loss")
    with pytest.raises(UsageError, match=f"{re.escape(trl.__version__)} has no _compute_loss"):
        use_plad_fast(trainer)


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_without_a_prompt_are_found_before_training(build, held_out):
    """For losses that divide by length; the last row is looked at as the first is."""
    trainers = [build(loss_type=[name], with_eval=True) for name in ("ipo", "sigmoid")]
    name = "eval_dataset" if held_out else "train_dataset"
    for trainer in trainers:
        setattr(trainer, name, without_last_prompt(getattr(trainer, name)))
    by_length, other = trainers
    if held_out:
        by_length.eval_dataset = {"pairs": by_length.eval_dataset}
    with pytest.raises(UsageError, match=r"no prompt token.* ipo"):
        use_plad_fast(by_length)
    assert use_plad_fast(other)


def without_last_prompt(data):
    last = len(data) - 1
    return data.map(
        lambda row, i: {"prompt_ids": row["prompt_ids"] if i < last else []}, with_indices=True
    )


@pytest.mark.parametrize("kind", ["dpo", "cpo", "orpo"])
def test_tokens_that_the_model_lacks_are_refused_before_training(build, tiny_model, kind):
    """With the row where the rows lie ready, else with the batch."""
    small = copy.deepcopy(tiny_model)
    small.resize_token_embeddings(250)  # the tokenizer's last bytes are beyond them
    rows = [*PAIRS, {"prompt": "p", "chosen": "\u00ad", "rejected": "x"}]
    with pytest.raises(UsageError, match=r"train_dataset, row 7: the chosen has the token id 261"):
        use_plad_fast(build(kind, model=small, reference=small, rows=rows))
    trainer = build(kind, model=small, reference=small, rows=rows, per_device_train_batch_size=7)
    trainer.train_dataset = trainer.train_dataset.with_transform(lambda batch: batch)
    with pytest.raises(UsageError, match=r"a batch has the token id 261"):
        use_plad_fast(trainer).train()


def test_what_a_collator_brings_is_refused_with_its_batch(build):
    """The integration does not call a collator that is not TRL's: it may count, or draw."""
    refusals = {}
    for case in ("prompt", "entry"):
        trainer = build(loss_type=["ipo"], per_device_train_batch_size=6)
        trl_collator = trainer.data_collator

        def collate(rows, case=case, trl_collator=trl_collator):
            batch = trl_collator(rows)
            return {**batch, "weights": torch.ones(6)} if case == "entry" else batch

        trainer.data_collator = collate
        if case == "prompt":
            trainer.train_dataset = without_last_prompt(trainer.train_dataset)
        with pytest.raises(UsageError) as caught:
            use_plad_fast(trainer).train()
        refusals[case] = str(caught.value)
    assert "no prompt token" in refusals["prompt"]
    assert "weights" in refusals["entry"]


def test_options_that_are_not_known_are_refused_unless_left_alone(build, monkeypatch):
    """As a coming TRL might have them."""
    from dataclasses import dataclass

    @dataclass
    class Config(trl.DPOConfig):
        new_option: float = 0.0

    monkeypatch.setattr(trl, "DPOConfig", Config)
    assert use_plad_fast(build())
    with pytest.raises(UsageError, match=r"new_option=1\.0"):
        use_plad_fast(build(new_option=1.0))


def test_a_loss_of_the_users_own_is_not_put_out_of_use(build):
    class Mine(trl.DPOTrainer):
        def _compute_loss(self, *args, **kwargs):
            return super()._compute_loss(*args, **kwargs)

    with pytest.raises(UsageError, match="Mine has its own _compute_loss"):
        use_plad_fast(build(cls=Mine))


def test_a_subclass_keeps_its_methods_and_its_own_kind(build):
    """And the integration is applied once."""

    class Mine(trl.DPOTrainer):
        def log(self, logs, *args, **kwargs):
            super().log({**logs, "mine": 1.0}, *args, **kwargs)

    trainer = use_plad_fast(build(cls=Mine, max_steps=1))
    assert isinstance(trainer, Mine)
    trainer.train()
    assert trainer.state.log_history[0]["mine"] == 1.0
    with pytest.raises(UsageError, match="once"):
        use_plad_fast(trainer)


def test_other_trainers_are_refused():
    with pytest.raises(UsageError, match="SFTTrainer"):
        use_plad_fast(object.__new__(trl.SFTTrainer))


def test_nothing_else_needs_trl():
    """A fresh process imports and computes with TRL blocked, and only this integration names it."""
    code = """
import sys
sys.modules["trl"] = None
import torch, plad_fast, plad_fast.integrations, plad_fast.losses.trl_options
problem = torch.randn(4, 3), torch.randn(5, 3), torch.zeros(4).long(), torch.tensor([0, 2, 4])
assert plad_fast.fused_linear_preference_loss(*problem).loss.isfinite()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package = Path(plad_fast.__file__).parent
    imports = re.compile(r"^\s*(import|from) trl\b", re.MULTILINE)
    users = {path.name for path in package.rglob("*.py") if imports.search(path.read_text())}
    assert users == {"use.py", "trainers.py"}


def test_without_trl_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "plad_fast.integrations.trl.use")
    with pytest.raises(ImportError, match="pip install -U trl"):
        importlib.import_module("plad_fast.integrations.trl.use")


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_trl(tiny_model, tiny_tokenizer, tmp_path):
    """The loss is computed inside DDP's forward: gradients are averaged as TRL's are."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    command = "import sys; from tests.integrations.test_trl import run_rank; run_rank(sys.argv[1])"
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(tmp_path)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


def run_rank(folder):
    """One of two processes: trains with TRL's loss and with ours, and compares."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=int(os.environ["RANK"]),
        world_size=2,
    )
    found = []
    for change in (lambda trainer: trainer, use_plad_fast):
        torch.manual_seed(0)
        trainer = trl.DPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder / "model"),
            moved(AutoModelForCausalLM.from_pretrained(folder / "model")),
            args=trl.DPOConfig(**DEFAULTS, output_dir=str(folder / "run")),
            train_dataset=datasets.Dataset.from_list(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Gradients()],
        )
        change(trainer).train()
        found.append(trainer)
    assert trainer.accelerator.num_processes == 2
    require_equal_steps(*found)
    logs = [trainer.state.log_history for trainer in found]
    for expected, ours in zip(*logs, strict=True):
        for name in (KEPT["dpo"] | OF_PAIRS) & expected.keys():
            assert ours[name] == pytest.approx(expected[name], 1e-5, 2e-5), name
    dist.barrier()
    dist.destroy_process_group()
