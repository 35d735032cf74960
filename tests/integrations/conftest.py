"""Trainers of TRL on the tiny model."""

from __future__ import annotations

import copy

import pytest
import torch


@pytest.fixture
def build(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Makes a trainer of a kind; its model is a copy, and its reference another model."""
    import datasets
    import trl

    from tests.support.trl_trainers import DEFAULTS, PAIRS, Gradients, moved

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
