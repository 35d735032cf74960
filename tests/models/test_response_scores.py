"""Log-probabilities of pairs, against those of the model's full logits."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import transformers

from plad_fast.data.text_ids import TextIds
from plad_fast.errors import UsageError
from plad_fast.models.adapters import steady_length
from plad_fast.models.response_scores import score_pairs, score_with_ends
from plad_fast.training.config import PLaDConfig
from plad_fast.training.trainer import PLaDTrainer
from tests.support.tiny_models import longrope_llama

PAIRS = [
    {"id": "a", "prompt": "Say hello: ", "chosen": "hello", "rejected": "hm"},
    {"id": "b", "prompt": "1, 2, 3, ", "chosen": "4", "rejected": "a much longer answer"},
    {
        "id": "c",
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hi there"}],
        "rejected": [{"role": "assistant", "content": "No"}],
    },
]


def naive_logps(model, tokenizer, prompt, response):
    """Of every token of the response."""
    group = TextIds(tokenizer).encode(prompt, [response], max_length=1000)
    prompt_ids, [response_ids] = group["prompt_ids"], group["response_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0].double()
    rows = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(response_ids)[:, None])[:, 0]


def naive_logp(model, tokenizer, prompt, response, alpha):
    logps = naive_logps(model, tokenizer, prompt, response)
    return float(logps.sum() / len(logps) ** alpha)


@pytest.mark.parametrize(("alpha", "batch_size"), [(0.0, 1), (1.0, 2), (0.5, 8)])
def test_score_pairs_agrees_with_full_logits(tiny_model, tiny_tokenizer, alpha, batch_size):
    scores = score_pairs(
        tiny_model,
        tiny_tokenizer,
        PAIRS,
        length_normalization=alpha,
        batch_size=batch_size,
        progress=False,
    )
    for side in ("chosen", "rejected"):
        expected = [
            naive_logp(tiny_model, tiny_tokenizer, pair["prompt"], pair[side], alpha)
            for pair in PAIRS
        ]
        assert scores[side].dtype == np.float64
        np.testing.assert_allclose(scores[side], expected, rtol=1e-4)


@pytest.mark.parametrize("length", [None, 8, 500])
def test_rows_whose_numbers_depend_on_their_batch_are_told(
    length, tiny_model, tiny_tokenizer, tmp_path, caplog
):
    vocab = tiny_model.config.vocab_size
    model = tiny_model if length is None else longrope_llama(length, vocab_size=vocab)
    assert steady_length(model) == (length or math.inf)
    score_pairs(model, tiny_tokenizer, PAIRS, progress=False)
    data = {"train_dataset": PAIRS, "processing_class": tiny_tokenizer}
    PLaDTrainer(model, PLaDConfig(str(tmp_path), report_to=[], use_cpu=True), **data)
    told = [record.getMessage() for record in caplog.records if "frequencies" in record.message]
    places = ["the pairs", "the rows of train_dataset"] if length == 8 else []
    assert [text.partition(" have a sequence of ")[0] for text in told] == places


def test_ends_are_the_last_tokens_of_responses(tiny_model, tiny_tokenizer):
    rows = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]
    means, ends = score_with_ends(tiny_model, tiny_tokenizer, rows)
    expected = [naive_logps(tiny_model, tiny_tokenizer, *row) for row in rows]
    np.testing.assert_allclose(means, [logps.mean() for logps in expected], rtol=1e-4)
    np.testing.assert_allclose(ends, [logps[-1] for logps in expected], rtol=1e-4)


def test_score_pairs_refuses_what_the_model_has_no_weights_for(tiny_tokenizer):
    """Token ids beyond the embeddings, and more tokens than learned positions."""
    config = transformers.GPT2Config(
        vocab_size=262, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(UsageError, match=r"pair number 1: 22 tokens, .* 16 positions"):
        score_pairs(model, tiny_tokenizer, [good, {**good, "chosen": "a" * 19}], progress=False)
    assert score_pairs(model, tiny_tokenizer, [good], progress=False)["chosen"][0] < 0
    model.resize_token_embeddings(250)
    with pytest.raises(UsageError, match=r"pair number 0: .* token id 261, .* 0 to 249"):
        score_pairs(model, tiny_tokenizer, [{**good, "chosen": "\u00ad"}], progress=False)


def test_score_pairs_hands_tools_to_the_chat_template(tiny_model, tiny_tokenizer):
    """As the training does; the rendered prompt given as text has the same score."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if tools %}t{% endif %}" + tokenizer.chat_template
    messages = [{"role": "user", "content": "hi"}]
    row = {"prompt": messages, "chosen": "a", "rejected": "b"}
    rendered = "t<|bos|><|user|>hi<|end|><|assistant|>"
    scores = score_pairs(
        tiny_model, tokenizer, [row, {**row, "tools": [{"name": "f"}]}], progress=False
    )
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    answer = tokenizer("a<|end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = tiny_model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
    expected = sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(answer))
    assert scores["chosen"][1] == pytest.approx(expected, rel=1e-4)
    assert scores["chosen"][0] != pytest.approx(expected, rel=1e-4)


def test_score_pairs_restores_the_mode_and_leaves_no_gradient(tiny_model, tiny_tokenizer):
    model = copy.deepcopy(tiny_model).train()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    score_pairs(model, tiny_tokenizer, PAIRS, progress=False)
    assert seen
    assert not any(seen)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_score_pairs_reports_a_diverged_model(tiny_model, tiny_tokenizer):
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"3 of 3 pairs .* pair a; the model has diverged"):
        score_pairs(model, tiny_tokenizer, PAIRS, progress=False)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "no pairs to score"),
        (PAIRS, {"batch_size": 0}, "batch_size is 0"),
        (PAIRS, {"max_length": 12}, "1 of 3 pairs .* max_length=12 tokens, the first is pair b"),
    ],
)
def test_score_pairs_refuses(tiny_model, tiny_tokenizer, pairs, options, message):
    with pytest.raises(UsageError, match=message):
        score_pairs(tiny_model, tiny_tokenizer, pairs, progress=False, **options)
