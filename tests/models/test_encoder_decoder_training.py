"""Encoder-decoder students are trained, scored and asked as decoders are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from plad_fast.cli import main
from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.prompts import Prompt
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model
from plad_fast.models.head import backbone_hidden, causal_lm_logprobs
from plad_fast.models.loading import load_model
from plad_fast.models.response_scores import score_pairs
from plad_fast.models.sharing import prepare
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from tests.support.encoder_decoders import (
    GROUPS,
    SEQ_2_SEQ,
    adapt,
    collate,
    make_model,
    own_logprobs,
    tokenizer_like_t5,
)
from tests.support.recipe_runs import arguments
from tests.support.trainings import PAIRS, assert_same_weights, build, last_log, weights


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    """Like T5's: EOS behind every text, nothing in front, no chat template."""
    return tokenizer_like_t5(tiny_tokenizer)


def make_trainer(name, tokenizer, folder, rows=PAIRS, model=None, **options):
    model = make_model(name).train() if model is None else model
    return build(None, tokenizer, folder, rows, model=model, **options)


def test_the_trainer_encodes_every_prompt_once(tokenizer, tmp_path, monkeypatch):
    """Eight pairs: a step and an evaluation encode eight rows each, and the reference did."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    options = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    trainer = make_trainer("t5", tokenizer, tmp_path, eval_rows=PAIRS, loss="dpo", **options)
    seen = []
    trainer.model.get_encoder().register_forward_hook(lambda m, a, out: seen.append(len(out[0])))
    trainer.train()
    trainer.evaluate()
    assert seen == [8, 8]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t5", {"loss": "plad_ranking", "beta": 40.0, "sft_weight": 0.3}),
        ("t5_v1_1", {"loss": "dpo", "beta": 0.3}),
        # One group in memory at a time, which pads and normalises otherwise.
        ("bart", {"loss": "plad_ranking", "beta": 40.0, "max_tokens_per_batch": 1}),
    ],
    ids=["ranking", "dpo", "budget"],
)
def test_first_step_equals_the_naive_loss(name, options, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    trainer = make_trainer(name, tokenizer, tmp_path, per_device_train_batch_size=8, **options)
    if options["loss"] == "dpo":  # by one that differs, or every margin is zero
        with torch.no_grad():
            trainer.model.lm_head.weight += 0.1
    start = copy.deepcopy(trainer.model)
    trainer.train()

    rows = tokenize_dataset(PAIRS, tokenizer, max_length=64, encoder_decoder=True)
    logps = own_logprobs(start, rows)
    s = torch.stack([each.sum() for each in logps]).view(-1, 2)
    nll = -s[:, 0].sum() / sum(map(len, logps[::2]))
    margins = s[:, 0] - s[:, 1]
    if options["loss"] == "dpo":
        reference = own_logprobs(make_model(name), rows)
        r = torch.stack([each.sum() for each in reference]).view(-1, 2).detach()
        loss = -nn.functional.logsigmoid(0.3 * (margins - r[:, 0] + r[:, 1])).mean()
    else:
        loss = torch.relu(40.0 - margins).mean() + options.get("sft_weight", 0.0) * nll
    loss.backward()
    with torch.no_grad():
        for parameter in start.parameters():
            parameter -= 0.05 * parameter.grad
    assert last_log(trainer)["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_weights(weights(trainer), dict(start.named_parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_scores_equal_the_models_own(name, tokenizer):
    model = make_model(name)
    scores = score_pairs(model, tokenizer, PAIRS, batch_size=3, progress=False)
    rows = tokenize_dataset(PAIRS, tokenizer, max_length=64, encoder_decoder=True)
    expected = [each.sum().item() for each in own_logprobs(model, rows)]
    assert scores["chosen"].tolist() == pytest.approx(expected[::2], rel=1e-5)
    assert scores["rejected"].tolist() == pytest.approx(expected[1::2], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "task"),
    [("t5_v1_1", ""), ("bart", ""), ("bart", None), ("bart", "CAUSAL_LM"), ("t5_v1_1", SEQ_2_SEQ)],
)
def test_answers_are_those_of_generate(name, task, tokenizer):
    """In batches of prompts of several lengths, without prompt or start token in them; under
    adapters too, whatever task they name."""
    model = make_model(name)
    with torch.no_grad():  # some answers end, some do not
        if name == "bart":
            model.final_logits_bias[0, 2] = 3.5
        else:
            model.lm_head.weight[2] *= 3
    if task != "":
        model = adapt(model, task_type=task)
    prompts = [Prompt(str(i), text) for i, text in enumerate(["a", "bcd", "efghijklmno", "pq"])]
    sampling = Sampling(max_new_tokens=12, temperature=0, batch_size=4)
    answers = {
        answer.prompt_id: answer
        for batch in LocalModel(model, tokenizer, "student").generate(prompts, sampling)
        for answer in batch
    }
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt.content)["input_ids"]])
        expected = base_model(model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            num_beams=1, forced_eos_token_id=None,
            use_cache=False,  # of this T5, generate makes one with too few layers
        )[0, 1:]  # fmt: skip
        text = tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert answers[prompt.id].text == text
        assert answers[prompt.id].n_tokens == len(expected)
    assert len({answer.n_tokens for answer in answers.values()}) > 1


def test_a_prompt_that_the_encoder_has_no_room_for_is_refused(tokenizer):
    """Whatever the length of an answer, which has positions of its own."""
    model = LocalModel(make_model("bart"), tokenizer, "bart")
    says = r"prompt 'p' has 9\d+ tokens, and the encoder has 96 positions; drop"
    with pytest.raises(UsageError, match=says):
        model.generate([Prompt("p", "a" * 97)], Sampling(max_new_tokens=96))


def test_a_first_token_that_the_model_forces_is_kept(tokenizer):
    """As models of many languages do with the mark of the one to write in."""
    model = make_model("bart")
    [forced] = tokenizer("Q", add_special_tokens=False)["input_ids"]
    sampling, prompts = Sampling(max_new_tokens=4, temperature=0), [Prompt("1", "abc")]
    for wanted in (None, forced):
        model.generation_config.forced_bos_token_id = wanted
        [[answer]] = LocalModel(model, tokenizer, "bart").generate(prompts, sampling)
        assert answer.text.startswith("Q") == (wanted is not None)


@pytest.mark.usefixtures("no_plots")
def test_distill_a_t5_of_a_decoder_only_teacher(tokenizer, tiny_teacher, tmp_path, capsys):
    """The recipe from pairs to report; the student loses decoder layers and keeps its encoder."""
    student, model = tmp_path / "t5", make_model("t5_v1_1")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 4  # a random one hardly ends
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    folder = tmp_path / "run"
    assert main(arguments(tiny_teacher, folder, "--student", str(student))) == 0
    assert "1 layers" in capsys.readouterr().out
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "plad")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 1)
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [
        json.loads(line) for line in (folder / "pairs" / "held-out.jsonl").read_text().splitlines()
    ]
    chosen, rejected = (
        [
            each.mean().item()
            for each in own_logprobs(
                model.eval(),
                tokenize_dataset(
                    [{"prompt": row["prompt"], "completion": row[side]} for row in rows],
                    tokenizer,
                    max_length=1024,
                    encoder_decoder=True,
                ),
            )
        ]
        for side in ("chosen", "rejected")
    )
    margin = (sum(chosen) - sum(rejected)) / len(rows)
    assert metrics["students"][1]["margin"]["mean"] == pytest.approx(margin, rel=1e-4)


@pytest.mark.parametrize("task", [None, SEQ_2_SEQ])
def test_checkpoint_of_adapters_loads_onto_its_base(task, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    make_model("t5_v1_1").save_pretrained(tmp_path / "base")
    model = adapt(load_model(tmp_path / "base"), task_type=task)
    options = {"loss": "sft", "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer("t5", tokenizer, tmp_path, model=model, **options)
    trainer.train()
    loaded = load_model(tmp_path / "run" / "checkpoint-1")
    assert isinstance(loaded, transformers.T5ForConditionalGeneration)
    batch = collate(loaded, GROUPS)
    ours = causal_lm_logprobs(loaded, batch).token_logprobs
    torch.testing.assert_close(ours, causal_lm_logprobs(model.eval(), batch).token_logprobs)


def test_noise_on_embeddings_is_refused_in_words_that_lead_out(tokenizer, tmp_path, monkeypatch):
    """It would reach neither half of some models: transformers puts it on a third module."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    options = {"loss": "sft", "neftune_noise_alpha": 5.0}
    with pytest.raises(UsageError, match="leave neftune_noise_alpha out, as for an encoder-decod"):
        make_trainer("t5", tokenizer, tmp_path, **options)
    with pytest.raises(UsageError, match="T5ForConditionalGeneration; leave it out"):
        make_trainer("t5", tokenizer, tmp_path, layout="padded", **options)


def test_other_layouts_and_models_are_refused(tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    model = make_model("t5")
    for layout in ("shared", "packed", "padded"):
        with pytest.raises(UsageError, match=f"'{layout}'.*encoder-decoder"):
            prepare(model, layout)
    with pytest.raises(UsageError, match="needs an encoder"):
        prepare(tiny_model, "encoder_decoder")
    with pytest.raises(UsageError, match="decoder_start_token_id"):
        PreferenceCollator(0, 3, layout="encoder_decoder")
    with pytest.raises(UsageError, match="do not go together"):
        causal_lm_logprobs(model, PreferenceCollator(0, 3)(GROUPS))
    with pytest.raises(UsageError, match="do not go together"):
        causal_lm_logprobs(tiny_model, collate(model, GROUPS))
    with pytest.raises(UsageError, match="encoder-decoder"):
        backbone_hidden(model, torch.tensor([[3, 4]]))
    with pytest.raises(UsageError, match="one alone is an encoder-decoder model"):
        make_trainer(
            "t5", tokenizer, tmp_path, loss="dpo", reference_model=copy.deepcopy(tiny_model)
        )
    with pytest.raises(UsageError, match="chat template"):
        score_pairs(model, tokenizer, [{**PAIRS[0], "prompt": [{"role": "user", "content": "a"}]}])
    del model.config.decoder_start_token_id
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(UsageError, match="T5ForConditionalGeneration has no decoder_start_token"):
        make_trainer("t5", tokenizer, tmp_path, model=model, loss="sft")


def test_positions_bound_prompts_and_answers(tokenizer, tmp_path, monkeypatch):
    """Each on its own: both may have as many tokens as BART has positions."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    rows = [{"prompt": "a" * 95, "chosen": "b" * 95, "rejected": "c" * 95}]
    make_trainer("bart", tokenizer, tmp_path, rows, loss="sft")
    with pytest.raises(UsageError, match="97 tokens and the model has 96 positions"):
        make_trainer("bart", tokenizer, tmp_path, [{**rows[0], "chosen": "b" * 96}], loss="sft")
    local = LocalModel(make_model("bart"), tokenizer, "bart")
    fits, long = Prompt("1", "a" * 95), Prompt("2", "a" * 96)
    [[answer]] = local.generate([fits], Sampling(max_new_tokens=96, temperature=0))
    assert answer.n_tokens == 96
    with pytest.raises(UsageError, match="'2' has 97 tokens, and the encoder has 96"):
        local.generate([fits, long], Sampling(max_new_tokens=8))
    with pytest.raises(UsageError, match="max_new_tokens=97, and model bart has 96"):
        local.generate([fits], Sampling(max_new_tokens=97))
