"""What `use_plad_fast` takes, and what it refuses by name."""

from __future__ import annotations

import copy
import importlib
import operator
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

import plad_fast
from plad_fast.errors import UsageError

pytest.importorskip("trl", "1.15")

import trl

from plad_fast.integrations.trl.use import use_plad_fast
from tests.support.trl_trainers import PAIRS, Schedule, without_last_prompt


def test_an_option_that_becomes_unknown_is_refused_at_the_step(build):
    trainer = use_plad_fast(build())
    later = Schedule(trainer, lambda t, step: t.loss_types.__setitem__(0, "aot" if step else "ipo"))
    trainer.add_callback(later)
    with pytest.raises(UsageError, match="loss_type 'aot' does not work here"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_the_head_of_the_reference_is_checked_too(build, tiny_model):
    """Its logits are not what its head and its configuration say."""
    reference = copy.deepcopy(tiny_model)
    reference.lm_head.register_forward_hook(lambda module, args, logits: logits * 0.5)
    trainer = build(reference=reference)
    with pytest.raises(UsageError, match="logits"):
        use_plad_fast(trainer)


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
    """Only this integration names it; tests/system/test_imports.py computes without it."""
    package = Path(plad_fast.__file__).parent
    imports = re.compile(r"^\s*(import|from) trl\b", re.MULTILINE)
    users = {path.name for path in package.rglob("*.py") if imports.search(path.read_text())}
    assert users == {"use.py", "trainers.py"}


def test_without_trl_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "plad_fast.integrations.trl.use")
    with pytest.raises(ImportError, match="pip install -U trl"):
        importlib.import_module("plad_fast.integrations.trl.use")
