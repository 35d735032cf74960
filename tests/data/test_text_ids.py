"""Log-probabilities of responses are those of the whole text, whatever the tokenizer does to it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from plad_fast.data.text_ids import TextIds
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.models.response_scores import score_responses
from tests.support.tokenizer_families import (
    CASES,
    TEMPLATES,
    byte_level,
    load,
    word_piece,
)

USER = [{"role": "user", "content": "What is the sky?"}]
THOUGHT = "<think>\nhm\n</think>\n\nblue"


def says(text, **more):
    return [{"role": "assistant", "content": text, **more}]


ROWS = [
    ("The sky is", [" blue", " green"]),
    ("Answer:\n", ["blue", "green"]),
    ("Answer: ", ["blue", " green"]),
    ("2 + 2 = 4 ", ["", "so"]),
    (USER, ["blue", "green and\n\nblue"]),
    ([*USER, *says("blue"), *USER], ["\nblue", "  return x\n"]),
]


@pytest.fixture(scope="module", params=CASES)
def tokenizer(request):
    return CASES[request.param]()


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def whole_ids(tokenizer, prompt, response):
    """Ids of the text that a model is to have written in the end, tokenised in one go."""
    if isinstance(prompt, str):
        return tokenizer(prompt + response + tokenizer.eos_token)["input_ids"]
    text = tokenizer.apply_chat_template([*prompt, *says(response)], tokenize=False)
    ids = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
    return ids if ids[-1] in tokenizer.added_tokens_decoder else [*ids, tokenizer.eos_token_id]


def shared_start(lists):
    return next((i for i, ids in enumerate(zip(*lists, strict=False)) if len(set(ids)) > 1), 10**6)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_log_probabilities_are_those_of_the_whole_text(tokenizer, model, row):
    prompt, responses = ROWS[row]
    wholes = [whole_ids(tokenizer, prompt, response) for response in responses]
    head = TextIds(tokenizer).prompt(prompt)
    # What all sequences have in common is given; the rest is what a response is made of.
    start = min(shared_start([head, ids]) for ids in wholes)
    start = min(start, len(head))
    exact = copy.deepcopy(model).double()
    expected = []
    for ids in wholes:
        with torch.no_grad():
            logps = exact(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        taken = logps.gather(1, torch.tensor(ids[1:])[:, None]).flatten()
        expected.append(taken[start - 1 :].sum().item())

    group = TextIds(tokenizer).encode(prompt, responses, max_length=256)
    assert [group["prompt_ids"] + ids for ids in group["response_ids"]] == wholes
    assert len(group["prompt_ids"]) == start
    assert bool(group["moved"]) == (start < len(head))
    [found] = score_responses(model, tokenizer, [(prompt, responses)], progress=False)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    data = tokenize_dataset([{"prompt": prompt, "responses": responses}], tokenizer, max_length=256)
    assert data[0]["prompt_ids"] == group["prompt_ids"]
    assert data[0]["response_ids"] == group["response_ids"]


def test_one_warning_tells_of_prompts_whose_end_changes(caplog):
    tokenizer = load(byte_level(), TEMPLATES["nemotron"], eos="<|im_end|>")
    rows = [{"prompt": USER, "chosen": "blue", "rejected": THOUGHT}] * 3
    with caplog.at_level(logging.WARNING, logger="plad_fast.data.tokenization"):
        tokenize_dataset(rows, tokenizer, max_length=256, name="train_dataset")
        tokenize_dataset([{"prompt": "sky?", "chosen": " x"}], tokenizer, max_length=256)
    [record] = caplog.records
    assert "train_dataset: in 3 of 3 rows" in record.getMessage()
    assert repr("\n") in record.getMessage()


def test_a_prompt_that_melts_into_its_answer_is_refused():
    tokenizer = load(byte_level(), bos=False)
    assert len(tokenizer("user")["input_ids"]) == 1
    with pytest.raises(UsageError, match="first token of the prompt"):
        TextIds(tokenizer).encode("us", ["er"], max_length=64)
    with pytest.raises(UsageError, match="row 1: the first token"):
        tokenize_dataset([{"prompt": "us", "chosen": "er"}], tokenizer, max_length=64)


def test_an_end_whose_text_is_no_token_is_added_as_one():
    """A slow tokenizer that splits special tokens, or one whose EOS is a plain word."""
    tokenizer = load(word_piece())
    tokenizer.split_special_tokens = True
    end = tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert end != [tokenizer.eos_token_id]
    [ids] = TextIds(tokenizer).encode("sky", [" is"], max_length=64)["response_ids"]
    assert ids == [*tokenizer(" is", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_a_scorer_warns_once_whatever_its_batches(caplog, monkeypatch, tiny_model, tiny_tokenizer):
    monkeypatch.setattr("plad_fast.models.response_scores._TOLD", set())
    with caplog.at_level(logging.WARNING, logger="plad_fast.data.tokenization"):
        for _ in range(2):
            rows = [([{"role": "user", "content": "<|end|>"}], ["a"])]
            score_responses(tiny_model, tiny_tokenizer, rows, progress=False)
    [record] = caplog.records
    assert "the prompts to score: 1 of 1 rows hold special tokens" in record.getMessage()
