"""Rows that come and go give the answers that batches of `generate` give, or are not used."""

from __future__ import annotations

import logging
import random
import re

import pytest
import torch
import transformers

from plad_fast.data.prompts import Prompt
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.refill import Row, RowDecoder, refilled, why_not_refill
from plad_fast.pairs.generation.sampling import Sampling
from tests.support.tiny_models import PADDED, SHARED, VOCAB, longrope_llama, make_model

REFILLED = [*SHARED, "gpt_neo", "bloom", "falcon_alibi"]
PLAIN = ["mamba", "recurrent_gemma"]


@pytest.fixture(scope="module")
def numbers():
    """A tokenizer whose words are the numbers of its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="2", pad_token="0")


def prompts(count, *, longest=11, at_least=1):
    draw = random.Random(0)
    lengths = [draw.randint(at_least, longest) for _ in range(count)]
    return [
        Prompt(f"p{i}", " ".join(str(draw.randint(3, VOCAB - 1)) for _ in range(length)))
        for i, length in enumerate(lengths)
    ]


def answers(model, tokenizer, asked, *, refill, **options):
    source = LocalModel(model, tokenizer, "tiny", refill=refill)
    sampling = Sampling(**{"max_new_tokens": 14, "batch_size": 3, **options})
    found = [answer for batch in source.generate(asked, sampling) for answer in batch]
    assert len(found) == len(asked) * sampling.n
    return {(a.prompt_id, a.sample): a for a in found}


@pytest.mark.parametrize("name", [*REFILLED, *PLAIN])
def test_answers_are_those_of_generate(name, numbers):
    """Every way of attending, with answers of 1 to 14 tokens, so that rows come and go."""
    if name == "recurrent_gemma" and transformers.__version__ < "5":
        pytest.skip("in transformers 4 its `generate` takes up the state of the batch before")
    model = make_model(name)
    model.generation_config.eos_token_id = list(range(2, 12))
    asked = prompts(10)
    for options in ({}, {"temperature": 0}):
        expected = answers(model, numbers, asked, refill=False, **options)
        if not options and name in REFILLED:
            assert len({a.n_tokens for a in expected.values()}) > 2
        assert answers(model, numbers, asked, refill=True, **options) == expected
    assert model.training


def test_rows_whose_frequencies_change_with_the_longest_do_not_come_and_go(numbers):
    """Kept keys would have those of before."""
    model = longrope_llama(64)
    short, long = prompts(5, longest=40), prompts(3, longest=90, at_least=70)
    asked = [*short, *(Prompt(f"long {p.id}", p.content) for p in long)]
    for options in ({"temperature": 0}, {"temperature": 0.8}):
        alone = {}
        for prompt in asked:
            alone |= answers(model, numbers, [prompt], refill=False, **options)
        assert answers(model, numbers, asked, refill=True, batch_size=2, **options) == alone


def test_a_model_over_two_devices_is_refilled_too(numbers):
    """An index of the last token would lie on the first of them, and its states on the last."""
    model = make_model("llama")
    asked = prompts(4)
    expected = answers(model, numbers, asked, refill=True)
    model.hf_device_map = {"model.layers.0": "cpu", "lm_head": "cpu:0"}
    assert isinstance(RowDecoder(model, 0)._options["logits_to_keep"], int)
    assert answers(model, numbers, asked, refill=True) == expected


@pytest.mark.parametrize("name", [*SHARED, *PADDED])
def test_which_models_are_refilled(name):
    model = make_model(name).eval()
    with torch.inference_mode():
        reason = why_not_refill(model, 0)
    assert (reason is None) == (name in REFILLED), reason


def test_a_model_that_is_not_refilled_says_so_once(numbers, caplog):
    source = LocalModel(make_model("mamba"), numbers, "tiny")
    with caplog.at_level(logging.INFO, "plad_fast"):
        for _ in range(2):
            list(source.generate(prompts(2), Sampling(2)))
    (record,) = [r for r in caplog.records if "not refilled" in r.message]
    assert record.message.startswith("tiny: batches are not refilled: MambaForCausalLM")
    assert re.search("linear_attention|do not all keep keys and values", record.message)


def test_positions_or_masks_that_are_ignored_are_found_out():
    """A model that looks like any other, and counts its own positions or sees the padding."""
    for dropped in ("position_ids", "attention_mask"):
        model = make_model("llama").eval()
        forward = model.forward

        def without(*args, dropped=dropped, forward=forward, **kwargs):
            return forward(*args, **{**kwargs, dropped: None})

        model.forward = without
        with torch.inference_mode():
            assert "gives other log-probabilities" in why_not_refill(model, 0)


def test_rows_come_and_go():
    """Newcomers that are longer and shorter than the rows there are, whose columns go with them."""
    model = make_model("llama").eval()
    draw = torch.Generator().manual_seed(1)

    def tokens(count):
        return torch.randint(3, VOCAB, (count,), generator=draw).tolist()

    def expected(rows):
        return torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])

    decoder = RowDecoder(model, 0)
    rows = [tokens(6), tokens(3)]
    with torch.inference_mode():
        torch.testing.assert_close(decoder.admit(rows, [1, 1]), expected(rows))
        for turn in range(40):
            new = tokens(len(rows))
            rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
            torch.testing.assert_close(decoder.step(new), expected(rows), rtol=1e-4, atol=1e-4)
            if turn % 4 == 3:
                decoder.keep([*range(1, len(rows))])
                del rows[0]
                rows.append(tokens(len(rows[0]) + 9 if turn == 7 else 5))
                new_logits = decoder.admit([rows[-1]], [1])
                torch.testing.assert_close(new_logits, expected(rows[-1:]))
                columns = decoder._cache.layers[0].keys.shape[2]
                assert columns == max(map(len, rows))


def test_a_prompt_is_read_once_for_its_samples():
    model = make_model("llama").eval()
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    rows = [Row("a", [5, 6, 7], k) for k in range(4)] + [Row("b", [8, 9], k) for k in range(4)]
    with torch.inference_mode():
        list(refilled(model, rows, Sampling(3, n=4, batch_size=8), set(), 0))
    assert seen == [(2, 3), (8, 1), (8, 1)]
    assert len({tuple(row.tokens) for row in rows}) == 8
