"""Models and data that cannot be trained so are refused before the first step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from plad_fast.errors import UsageError
from tests.support.trainings import PAIRS, RANKED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_16_bits_get_a_warning(dtype, make, tiny_model, caplog):
    make(model=copy.deepcopy(tiny_model).to(dtype))
    warned = "dtype=torch.float32 and set bf16=True" in caplog.text
    assert warned == (dtype != torch.float32)


@pytest.mark.parametrize(
    ("rows", "eval_rows", "options", "message"),
    [
        (None, None, {}, "nothing to train on"),
        ([{"prompt": "p", "chosen": "c"}], None, {}, "one response each"),
        (PAIRS, RANKED, {}, "train_dataset: 2, eval_dataset: 3"),
        (PAIRS, None, {"loss": "plad_margin"}, "chosen_score"),
        ([{**PAIRS[0], "prompt": "p" * 300}], None, {}, "256 positions"),
    ],
)
def test_unusable_data_is_refused(rows, eval_rows, options, message, make):
    with pytest.raises(UsageError, match=message):
        make(rows, eval_rows=eval_rows, **options)


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "reference"])
def test_token_ids_that_the_model_lacks_are_refused_before_a_step(make, tiny_model, where):
    """Of a tokenizer whose ids have gaps, or of rows that another one made; 262 are known."""
    good = {"prompt_ids": [5], "response_ids": [[7], [8]]}
    bad = {"prompt_ids": [5], "response_ids": [[7], [8, 262]]}
    options = {}
    if where == "reference":  # with fewer embeddings than the model
        options["reference_model"] = copy.deepcopy(tiny_model)
        options["reference_model"].resize_token_embeddings(100)
        options["loss"], bad = "dpo", {"prompt_ids": [5], "response_ids": [[7], [100]]}
        where = "train_dataset"
    train, held_out = ([good, bad], [good]) if where == "train_dataset" else ([good], [good, bad])
    with pytest.raises(UsageError, match=rf"{where}, row 2: the response has the token id"):
        make(train, eval_rows=held_out, **options)


def test_unusable_models_are_refused(make, tiny_model, tiny_tokenizer):
    model = copy.deepcopy(tiny_model)
    model.resize_token_embeddings(len(tiny_tokenizer) - 1)
    with pytest.raises(UsageError, match="resize_token_embeddings"):
        make(model=model)

    model = copy.deepcopy(tiny_model)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UsageError, match="Sequential"):
        make(model=model)

    model = copy.deepcopy(tiny_model)
    model.config.output_router_logits = True
    with pytest.raises(UsageError, match="router loss"):
        make(model=model)


def test_fine_tuning_keeps_dropout(make, tiny_model):
    model = copy.deepcopy(tiny_model)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    make(model=model, loss="sft")
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    make(model=model)
    assert model.model.layers[0].self_attn.attention_dropout == 0.0
