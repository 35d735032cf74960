"""TRL's trainers with this library's loss against the same trainers without it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.15")

import datasets
import trl

from plad_fast.integrations.trl.use import use_plad_fast
from plad_fast.losses.objective import Objective
from tests.support.encoder_decoders import make_model as make_encoder_decoder
from tests.support.tiny_configs import causal_lm_families, make_causal_lm
from tests.support.trl_trainers import (
    ALL,
    DEFAULTS,
    KEPT,
    OF_PAIRS,
    PAIRS,
    Gradients,
    Schedule,
    compare,
    first_log,
    gradients,
    moved,
    require_equal_steps,
)

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


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("dpo", "shared"), ("dpo", "padded"), ("cpo", "packed"), ("orpo", "shared")],
)
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
    ("kind", "options", "two_halves"),
    [
        ("cpo", {"loss_type": "sigmoid", "metrics": "all"}, "t5"),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5, "max_completion_length": 9}, "bart"),
        ("orpo", {"metrics": "all"}, "t5"),
    ],
    ids=str,
    indirect=["two_halves"],
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
