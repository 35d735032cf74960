"""Answers of a model in this process."""

from __future__ import annotations

import copy

import pytest
import torch

from plad_fast.data.prompts import Prompt
from plad_fast.data.text_ids import TextIds
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.local_model import LocalModel, end_tokens, prompt_ids
from plad_fast.pairs.generation.refill import Row
from plad_fast.pairs.generation.sampling import Sampling
from tests.support.tokenizer_families import load, single_bytes, unigram

# First numbers of prompt "a" under seed 3.

PROMPTS = [Prompt(f"p{i}", "word " * (i % 4 + 1) + str(i)) for i in range(9)]


@pytest.fixture
def model(tiny_model, tiny_tokenizer):
    return LocalModel(copy.deepcopy(tiny_model), tiny_tokenizer, "tiny")


def answers(model, prompts, **options):
    sampling = Sampling(**{"max_new_tokens": 12, **options})
    return {a.prompt_id: a for batch in model.generate(prompts, sampling) for a in batch}


def test_answers_do_not_depend_on_the_batch(model):
    expected = answers(model, PROMPTS, batch_size=1)
    assert len({a.text for a in expected.values()}) == len(PROMPTS)
    assert answers(model, PROMPTS, batch_size=4) == expected
    assert answers(model, PROMPTS[::-1], batch_size=3) == expected
    assert answers(model, PROMPTS[2:5]) == {p.id: expected[p.id] for p in PROMPTS[2:5]}
    assert answers(model, PROMPTS, seed=1) != expected


@pytest.mark.parametrize("refill", [True, False])
def test_more_samples_add_to_those_that_fewer_give(model, refill):
    model = LocalModel(model.model, model.tokenizer, "tiny", refill=refill)
    several = {}
    for batch in model.generate(PROMPTS, Sampling(max_new_tokens=12, n=3, batch_size=4)):
        several |= {(a.prompt_id, a.sample): a.text for a in batch}
    assert several.keys() == {(p.id, k) for p in PROMPTS for k in range(3)}
    assert len(set(several.values())) == 3 * len(PROMPTS)
    one = answers(model, PROMPTS)
    assert {p.id: several[p.id, 0] for p in PROMPTS} == {i: a.text for i, a in one.items()}
    wanted = [(PROMPTS[2], 1), (PROMPTS[5], 2)]
    some = [a for batch in model.generate_samples(wanted, Sampling(12, n=3)) for a in batch]
    assert {(a.prompt_id, a.sample): a.text for a in some} == {
        (p.id, k): several[p.id, k] for p, k in wanted
    }


def test_greedy_is_transformers_own(model, tiny_tokenizer):
    prompt = Prompt("p", "greedy")
    text = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "greedy"}], add_generation_prompt=True, tokenize=False
    )
    assert text.count(tiny_tokenizer.bos_token) == 1
    ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.model.generate(ids["input_ids"], do_sample=False, max_new_tokens=12)
    new = tiny_tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers(model, [prompt], temperature=0)["p"].text == new.strip()


def test_the_models_own_generation_settings_do_not_interfere(model):
    expected = answers(model, PROMPTS, temperature=0)
    own = model.model.generation_config
    own.update(repetition_penalty=5.0, suppress_tokens=list(range(100)), do_sample=True, top_k=1)
    assert answers(model, PROMPTS, temperature=0) == expected
    assert model.model.generation_config is own


@pytest.mark.parametrize("chat", [True, False])
def test_plain_prompts_get_bos_once_and_no_template(model, tiny_tokenizer, chat):
    """By a model without a template, and by a chat model that is to go on from plain text."""
    plain = copy.deepcopy(tiny_tokenizer)
    if chat:
        plain.chat_template = None
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    plain_model = LocalModel(model.model, plain, "plain", chat=chat, refill=False)
    answers(plain_model, [Prompt("p", "Hi")], max_new_tokens=1)
    assert seen == [[[plain.bos_token_id, *plain("Hi", add_special_tokens=False)["input_ids"]]]]


def test_finish_reason_and_text(model, tiny_tokenizer):
    # Half of the vocabulary ends an answer: some stop early, some at once, none runs on.
    ends = list(range(100, 262))
    model.model.generation_config.eos_token_id = ends
    stopped = answers(model, PROMPTS, max_new_tokens=40)
    assert {a.finish_reason for a in stopped.values()} == {"stop"}
    assert all(a.n_tokens < 40 and a.text == a.text.strip() for a in stopped.values())

    model.model.generation_config.eos_token_id = None
    cut = answers(model, PROMPTS, max_new_tokens=3, temperature=0)
    assert all((a.finish_reason, a.n_tokens) == ("length", 3) for a in cut.values())
    for prompt_id, answer in cut.items():
        assert "<|" not in answer.text, prompt_id


def test_end_tokens_include_the_mark_that_closes_a_turn(model, tiny_tokenizer):
    # A base model's config names the EOS of pre-training, its new template ends turns otherwise.
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|pad|>"
    model.model.generation_config.eos_token_id = 7
    end = tiny_tokenizer.eos_token_id
    assert end_tokens(model.model, tokenizer) == {7, tokenizer.eos_token_id, end}
    # A template without such a mark ends in EOS.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert end_tokens(model.model, tokenizer) == {7, tokenizer.eos_token_id}


def test_mode_is_restored_module_by_module(model):
    model.model.train()
    frozen = model.model.model.layers[0].eval()
    answers(model, PROMPTS[:1], max_new_tokens=1)
    assert model.model.training
    assert model.model.model.layers[1].mlp.training
    assert not frozen.training
    assert not frozen.mlp.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_too_long_prompts_are_refused_before_anything_is_generated(model, monkeypatch):
    monkeypatch.setattr(model.model, "forward", None)
    prompts = [Prompt("short", "a"), Prompt("long", "a" * 250)]
    with pytest.raises(UsageError) as caught:
        model.generate(prompts, Sampling(max_new_tokens=10))
    for part in ("1 of 2", "'long' has 254 tokens", "256 positions", "leaves 246"):
        assert part in str(caught.value)


def test_prompts_that_do_not_fit_the_model_are_refused(model, tiny_tokenizer):
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    chat = Prompt("c", [{"role": "user", "content": "a"}])
    with pytest.raises(UsageError, match=r"prompt 'c': .*no chat template"):
        LocalModel(model.model, plain, "tiny").generate([chat], Sampling())
    plain.add_tokens(["<|extra|>"])
    with pytest.raises(UsageError, match="token 262, but model tiny knows 262 tokens"):
        LocalModel(model.model, plain, "tiny").generate([Prompt("p", "<|extra|>")], Sampling())


@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_is_reported_with_the_prompt(model, temperature):
    with torch.no_grad():
        model.model.lm_head.weight[5] = torch.nan
    with pytest.raises(UsageError, match=r"model tiny: it produced NaN .* for prompt 'p8'"):
        answers(model, PROMPTS[8:], temperature=temperature)


@pytest.mark.parametrize(
    "text", ["if x != y :", "Bonjour ! Ca va ?", "the word 'social'", "do n't"]
)
@pytest.mark.parametrize("backend", [unigram, single_bytes])
def test_an_answer_keeps_its_spaces(backend, text, tiny_model):
    """Whatever the tokenizer says of cleaning up."""
    tokenizer = load(backend())
    tokenizer.clean_up_tokenization_spaces = True
    row = Row("p", [1], 0)
    row.tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    answer = LocalModel(tiny_model, tokenizer, "m")._finish(row, {tokenizer.eos_token_id})
    assert (answer.text, answer.finish_reason) == (text, "stop")


def test_an_answer_keeps_the_marks_of_its_thought_and_loses_other_special_tokens(tiny_model):
    tokenizer = load(single_bytes())
    said = "<think>hm</think>ok<tool_call>{}</tool_call>"
    row = Row("p", [1], 0)
    row.tokens = tokenizer(f"<s>{said}<|ad_hoc|>", add_special_tokens=False)["input_ids"]
    assert LocalModel(tiny_model, tokenizer, "m")._finish(row, set()).text == said


def test_a_model_is_asked_what_a_student_is_trained_on(tiny_tokenizer):
    """Special tokens in a prompt are text there as here."""
    content = [{"role": "user", "content": "a<|end|>b"}]
    group = TextIds(tiny_tokenizer).encode(content, ["c"], max_length=99)
    asked = prompt_ids(tiny_tokenizer, [Prompt("p", content), Prompt("q", "a<|end|>b")])
    assert asked == {"p": group["prompt_ids"], "q": group["prompt_ids"]}
    chat = [*content, {"role": "assistant", "content": "so"}]
    with pytest.raises(UsageError, match="prompt 'p': the prompt ends in an assistant message"):
        prompt_ids(tiny_tokenizer, [Prompt("p", chat)])
