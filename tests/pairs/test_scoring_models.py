"""Likelihoods and rewards of models."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch

from plad_fast.data.chat import render_prompt
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.models.response_scores import score_pairs
from plad_fast.pairs.build import as_response
from plad_fast.pairs.scoring.models import Likelihood, RewardModel
from plad_fast.pairs.scoring.scorers import open_scorer
from plad_fast.pairs.scoring.stored import stored_scores

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
PROMPTS = [
    Prompt("a", "Say something", "the cat sat down"),
    Prompt("b", CHAT, "hello there"),
]
ITEMS = [
    (PROMPTS[0], "the cat"),
    (PROMPTS[1], "a rather long answer, which stands in one batch with short ones"),
    (PROMPTS[0], "dogs"),
    (PROMPTS[0], "down sat the cat"),
]


def naive_mean_logp(model, tokenizer, prompt, text):
    content = prompt.content
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    head = tokenizer(render_prompt(tokenizer, content), add_special_tokens=False)["input_ids"]
    tail = tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0].double()
    rows = logits[len(head) - 1 : -1].log_softmax(-1)
    return float(rows.gather(1, torch.tensor(tail)[:, None]).mean())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihood_is_the_mean_of_the_models_own_log_softmax(
    tiny_model, tiny_tokenizer, batch_size
):
    """Prompts with three answers and with one, so that groups of two sizes run."""
    scorer = Likelihood((tiny_model, tiny_tokenizer), batch_size=batch_size)
    expected = [naive_mean_logp(tiny_model, tiny_tokenizer, *item) for item in ITEMS]
    assert scorer.score(ITEMS) == pytest.approx(expected, rel=1e-4)
    assert scorer.score([]) == []


def test_likelihood_after_plain_text_is_that_of_the_text_as_pairs_have_it(
    tiny_model, tiny_tokenizer
):
    """Without a chat template an answer does not run into the last word of its prompt."""
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    prompt = Prompt("p", "hello there")
    pair = {"prompt": prompt.content, "chosen": as_response(prompt.content, "no"), "rejected": "x"}
    options = {"length_normalization": 1.0, "progress": False}
    expected = score_pairs(tiny_model, plain, [pair], **options)["chosen"]
    found = Likelihood((tiny_model, plain)).score([(prompt, "no")])
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


def test_scores_of_other_weights_are_refused(tiny_teacher, tmp_path):
    """A folder keeps its name when its model is trained anew."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher, folder)
    path = tmp_path / "scores.jsonl"
    stored_scores(Likelihood(str(folder)), ITEMS, path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UsageError, match="weights was"):
        stored_scores(Likelihood(str(folder)), ITEMS, path)


@pytest.fixture(scope="module")
def classifier(tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        num_labels=3,
        id2label={0: "bad", 1: "fair", 2: "good"},
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config)  # in training mode


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_rewards_are_the_logits_of_each_conversation_alone(
    classifier, tiny_tokenizer, pad_token_id
):
    """Decoders find the last token by the config's pad token, which many reward models lack."""
    model = copy.deepcopy(classifier)
    model.config.pad_token_id = pad_token_id
    options = {"label": "good", "batch_size": 4}
    rewards = RewardModel((model, tiny_tokenizer), **options).score(ITEMS)
    for (prompt, text), reward in zip(ITEMS, rewards, strict=True):
        content = prompt.content
        content = CHAT if content is CHAT else [{"role": "user", "content": content}]
        turns = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in content)
        ids = tiny_tokenizer(f"<|bos|>{turns}<|assistant|>{text}<|end|>", add_special_tokens=False)
        with torch.no_grad():
            logits = copy.deepcopy(model).eval()(torch.tensor([ids["input_ids"]])).logits
        assert reward == pytest.approx(float(logits[0, 2]), abs=1e-5)
    assert model.training
    assert model.config.pad_token_id == pad_token_id


def test_a_reward_model_is_loaded_from_its_folder(
    classifier, tiny_tokenizer, tiny_teacher, tmp_path
):
    classifier.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    scorer = open_scorer(f"reward:{tmp_path}", label=2, device="cpu")
    given = RewardModel((classifier, tiny_tokenizer), label=2)
    assert scorer.score(ITEMS) == pytest.approx(given.score(ITEMS))
    assert scorer.settings()["label"] == 2
    with pytest.raises(UsageError, match=r"several labels; .*: 0 bad, 1 fair, 2 good"):
        open_scorer(f"reward:{tmp_path}", device="cpu").score(ITEMS)
    # transformers would give a causal language model a random head, and a warning.
    with pytest.raises(UsageError, match=r"no weights for score\.weight, which would be random"):
        open_scorer(f"reward:{tiny_teacher}", device="cpu").score(ITEMS)


def test_a_label_is_chosen_by_the_name_of_the_scorer(classifier, tiny_tokenizer, tmp_path):
    folder = tmp_path / "model"
    classifier.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    good = RewardModel((classifier, tiny_tokenizer), label=2).score(ITEMS)
    for label in ("good", "2"):
        scorer = open_scorer(f"reward:{folder}#{label}", device="cpu")
        scorer.check(PROMPTS)
        assert scorer.score(ITEMS) == pytest.approx(good)
    assert open_scorer(f"reward:{folder}#bad").name == "reward model#bad"
    (tmp_path / "odd#name").mkdir()
    (tmp_path / "odd#name" / "config.json").write_text("{}")  # else it is no model's folder
    assert open_scorer(f"reward:{tmp_path}/odd#name").settings()["label"] is None
    for spec in (f"reward:{folder}#", "reward:#good"):
        with pytest.raises(UsageError, match="write reward:MODEL#LABEL"):
            open_scorer(spec)


def test_wrong_reward_models_are_found_before_any_work(
    classifier, tiny_tokenizer, tiny_teacher, tmp_path, monkeypatch
):
    """By their config, without their weights."""
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", None)
    classifier.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    RewardModel(str(tmp_path), label="fair").check(PROMPTS)
    for spec, says in [
        (f"{tmp_path}", r"several labels; name one, as in reward:.*#good: 0 bad, 1 fair, 2 good"),
        (f"{tmp_path}#fine", "no label 'fine'; name one"),
        (f"{tmp_path}#3", "no label 3; name one"),
        (f"{tiny_teacher}", "is a LlamaForCausalLM and no reward model"),
    ]:
        with pytest.raises(UsageError, match=says):
            open_scorer(f"reward:{spec}").check(PROMPTS)
    with pytest.raises(UsageError, match="several labels"):
        RewardModel((classifier, tiny_tokenizer)).check(PROMPTS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["OurReward"]}))
    RewardModel(str(tmp_path), label=0).check(PROMPTS)
    # A type without a sequence classifier.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UsageError, match="of type 'clip', of which transformers has no"):
        RewardModel(str(tmp_path)).check(PROMPTS)


def test_broken_rewards_and_long_answers_are_refused(classifier, tiny_tokenizer):
    model = copy.deepcopy(classifier)
    with torch.no_grad():
        model.score.weight[0, 0] = math.nan
    scorer = RewardModel((model, tiny_tokenizer), label=0)
    with pytest.raises(UsageError, match="gave nan for an answer to prompt 'a'"):
        scorer.score(ITEMS)
    with pytest.raises(UsageError, match=r"'b' has .* tokens .* 128 positions"):
        scorer.score([*ITEMS, (PROMPTS[1], "x" * 128)])
