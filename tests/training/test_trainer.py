"""The trainer against plain arithmetic on the model's own logits.

Plain SGD is used wherever a scale could be wrong: Adam does not notice one.
"""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)

from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.models.adapters import pad_token_id
from plad_fast.training.trainer import PLaDTrainer
from tests.support.trainings import (
    PAIRS,
    RANKED,
    SCORED,
    assert_same_weights,
    last_log,
    weights,
)


def naive_logps(model, tokenizer, rows, temperature=1.0):
    """(B, K) sums and counts, from whole logits of one unpadded sequence at a time."""
    data = tokenize_dataset(rows, tokenizer, max_length=128)
    sums, counts = [], []
    for row in data:
        for response in row["response_ids"]:
            tokens = torch.tensor(row["prompt_ids"] + response)
            logits = model(tokens[None]).logits[0, :-1].float() / temperature
            logprobs = logits.log_softmax(-1).gather(1, tokens[1:, None])
            sums.append(logprobs[-len(response) :].sum())
            counts.append(len(response))
    shape = (len(data), -1)
    return torch.stack(sums).view(shape), torch.tensor(counts).view(shape)


def near(value, rel=1e-5):
    """As transformers 4 logs it: the loss is rounded to four decimals."""
    return pytest.approx(value, rel=rel, abs=5.1e-5)


WIDTHS = ("layers", "attention_heads", "ffn_dim")
LOSSES = {
    "ranking": (PAIRS, {"loss": "plad_ranking", "beta": 2.0}),
    "ranking-means-and-sft": (
        PAIRS,
        {"loss": "plad_ranking", "beta": 0.5, "length_normalization": 1.0, "sft_weight": 0.3},
    ),
    "margin": (SCORED, {"loss": "plad_margin", "beta": 3.0}),
    "listwise": (RANKED, {"loss": "plad_listwise"}),
    "sft": (PAIRS, {"loss": "sft"}),
    "hot": (PAIRS, {"loss": "plad_ranking", "temperature": 2.0}),
}


def naive_loss(name, sums, counts, rows, options):
    alpha = options.get("length_normalization", 0.0)
    beta = options.get("beta", 1.0)
    s = sums / counts**alpha
    nll = -sums[:, 0].sum() / counts[:, 0].sum()
    if name == "sft":
        return nll
    if name == "margin":
        gaps = torch.tensor([row["chosen_score"] - row["rejected_score"] for row in rows])
        losses = torch.relu(beta * gaps - s[:, 0] + s[:, 1])
    elif name == "listwise":
        pairs = [(0, 1), (0, 2), (1, 2)]
        losses = sum(torch.relu(beta * (j - i) - s[:, i] + s[:, j]) for i, j in pairs)
    else:
        losses = torch.relu(beta - s[:, 0] + s[:, 1])
    return losses.mean() + options.get("sft_weight", 0.0) * nll


@pytest.mark.parametrize("name", LOSSES)
def test_first_step_equals_the_naive_loss(name, make, tiny_model, tiny_tokenizer):
    """The logged loss and the weights after one SGD step, for every loss and every option."""
    rows, options = LOSSES[name]
    trainer = make(rows, per_device_train_batch_size=8, **options)
    trainer.train()

    model = copy.deepcopy(tiny_model).train()
    sums, counts = naive_logps(model, tiny_tokenizer, rows, options.get("temperature", 1.0))
    loss = naive_loss(name, sums, counts, rows, options)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    assert last_log(trainer)["loss"] == near(loss.item())
    assert_same_weights(weights(trainer), dict(model.named_parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ranking-means-and-sft", "sft"])
def test_gradient_accumulation_changes_nothing(name, make):
    """One batch of 8 equals 4 of 2, of ragged lengths: means are over the whole window."""
    rows, options = LOSSES[name]
    whole = make(rows, per_device_train_batch_size=8, **options)
    parts = make(rows, gradient_accumulation_steps=4, **options)
    whole.train()
    parts.train()
    assert_same_weights(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
    ours, theirs = last_log(parts), last_log(whole)
    for key in ("loss", "nll", "logps/chosen"):
        assert ours[key] == near(theirs[key])


def test_short_last_window(make):
    """8 rows in windows of 3 batches of 2: the last window holds one batch, and counts in full."""
    options = {"per_device_train_batch_size": 2, "max_steps": 2, "sft_weight": 1.0}
    ours = make(gradient_accumulation_steps=3, **options)
    ours.train()
    theirs = make(PAIRS[:6], **{**options, "per_device_train_batch_size": 6, "max_steps": 1})
    theirs.train()
    theirs = make(PAIRS[6:], model=theirs.model, **{**options, "max_steps": 1})
    theirs.train()
    assert_same_weights(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_metrics_equal_their_definitions(alpha, make, tiny_model, tiny_tokenizer):
    """Logged in training over a window of ragged batches, and in evaluation with a short batch."""
    trainer = make(
        eval_rows=PAIRS,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
        length_normalization=alpha,
        sft_weight=0.5,
    )
    trainer.train()
    evaluated = trainer.evaluate()
    with torch.no_grad():
        sums, counts = naive_logps(tiny_model, tiny_tokenizer, PAIRS)
    s = sums / counts**alpha
    nll = -sums[:, 0].sum() / counts[:, 0].sum()
    hinge = torch.relu(1.0 - s[:, 0] + s[:, 1])
    expected = {
        "loss": hinge.mean() + 0.5 * nll,
        "nll": nll,
        "logps/chosen": s[:, 0].mean(),
        "logps/rejected": s[:, 1].mean(),
        "margin": (s[:, 0] - s[:, 1]).mean(),
        "ranking_accuracy": (s[:, 0] > s[:, 1]).float().mean(),
        "active_pairs": (hinge > 0).float().mean(),
    }
    logged = last_log(trainer)
    for key, value in expected.items():
        assert logged[key] == near(value.item(), rel=1e-4), key
        assert evaluated[f"eval_{key}"] == pytest.approx(value.item(), rel=1e-4), key
    assert 0 < expected["ranking_accuracy"] < 1  # else the comparison says nothing
    assert 0 < expected["active_pairs"] < 1
    assert min(logged["tokens_per_second"], evaluated["eval_tokens_per_second"]) > 0


def test_metrics_of_fine_tuning_and_of_several_rejected(make, tiny_model, tiny_tokenizer):
    trainer = make(loss="sft", learning_rate=0.0, per_device_train_batch_size=8)
    trainer.train()
    logged = last_log(trainer)
    assert logged["nll"] == near(logged["loss"])
    assert "margin" not in logged

    trainer = make(RANKED, learning_rate=0.0, per_device_train_batch_size=8)
    trainer.train()
    with torch.no_grad():
        s, _ = naive_logps(tiny_model, tiny_tokenizer, RANKED)
    above = (s[:, :1] > s[:, 1:]).float().mean().item()
    assert last_log(trainer)["ranking_accuracy"] == pytest.approx(above)
    assert last_log(trainer)["margin"] == pytest.approx(
        (s[:, :1] - s[:, 1:]).mean().item(), rel=1e-4
    )


def test_each_log_covers_its_own_window(make):
    """Two steps logged at once give the mean of the two logged apart, evaluation between or not."""
    steps = {"max_steps": 2, "learning_rate": 0.0, "per_device_train_batch_size": 4}
    apart = make(eval_rows=PAIRS[:3], eval_strategy="steps", eval_steps=1, **steps)
    together = make(logging_steps=2, **steps)
    apart.train()
    together.train()
    logs = [entry for entry in apart.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for key in ("loss", "margin", "active_pairs"):
        mean = (logs[0][key] + logs[1][key]) / 2
        assert last_log(together)[key] == near(mean)


def test_a_second_training_logs_nothing_of_the_first(make):
    """The first ends between two logs; nor has the clock of the second run meanwhile."""
    trainer = make(max_steps=3, logging_steps=2, learning_rate=0.0)
    trainer.train()
    first = last_log(trainer)
    time.sleep(2)
    trainer.train()
    again = last_log(trainer)
    for key in ("loss", "nll", "margin", "logps/chosen"):
        assert again[key] == first[key]
    assert again["tokens_per_second"] > first["tokens_per_second"] / 5


@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_tokens_seen_are_counted(kind, make, tiny_tokenizer, caplog):
    """Those that entered the model: a shared prompt once, no padding."""
    trainer = make(include_num_input_tokens_seen=kind, max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    rows = tokenize_dataset(PAIRS, tiny_tokenizer, max_length=128)
    tokens = [len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in rows]
    assert trainer.state.num_input_tokens_seen == sum(tokens) + sum(tokens[:4])
    assert "main_input_name" not in caplog.text


def test_several_evaluation_sets(make):
    trainer = make(eval_rows={"long": PAIRS[:4], "short": PAIRS[4:]})
    metrics = trainer.evaluate()
    assert metrics["eval_long_loss"] != metrics["eval_short_loss"]
    assert "eval_short_ranking_accuracy" in metrics


@pytest.mark.parametrize("options", [{}, {"loss": "sft"}])
def test_rows_may_be_given_when_they_are_evaluated(make, options):
    trainer = make(eval_rows=PAIRS[:4], **options)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(PAIRS[:4])["eval_loss"] == expected
    assert trainer.evaluate({"one": PAIRS[:4]})["eval_one_loss"] == expected
    assert trainer.predict(PAIRS[:4]).metrics["test_loss"] == expected
    with pytest.raises(UsageError, match="eval_dataset has the columns question"):
        trainer.evaluate([{"question": "q"}])


def test_resumed_run_ends_where_a_straight_one_does(make, tmp_path):
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "lr_scheduler_type": "linear",
        "trainer": PLaDTrainer,  # in random order, which the checkpoint has to restore
        "save_steps": 2,
    }
    straight = make(output=tmp_path / "a", save_strategy="steps", **options)
    straight.train()
    # The schedule is that of four steps, so the run is cut short rather than configured shorter.
    resumed = make(output=tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same_weights(weights(resumed), weights(straight), rtol=0, atol=0)


def test_saved_model_scores_the_same(make, tmp_path):
    trainer = make(eval_rows=PAIRS)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    again = make(None, eval_rows=PAIRS, model=loaded)
    assert again.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_gradient_checkpointing_changes_nothing(make):
    plain, checkpointed = make(), make(gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert_same_weights(weights(checkpointed), weights(plain), rtol=1e-6, atol=1e-7)


def test_bf16_autocast(make, tiny_model, tiny_tokenizer):
    """Weights stay float32, their step is near the float32 one, and the product is a bf16 one."""
    exact, mixed = (
        make(per_device_train_batch_size=8),
        make(per_device_train_batch_size=8, bf16=True),
    )
    exact.train()
    mixed.train()
    assert mixed.model.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sums, _ = naive_logps(tiny_model, tiny_tokenizer, PAIRS)
    assert last_log(mixed)["logps/chosen"] == pytest.approx(sums[:, 0].mean().item(), rel=2e-3)
    assert last_log(mixed)["loss"] != last_log(exact)["loss"]
    step, start = weights(exact), dict(tiny_model.named_parameters())
    ours = weights(mixed)
    for name, before in start.items():
        moved = (step[name] - before).norm()
        assert (ours[name] - step[name]).norm() <= 0.05 * moved + 1e-6, name


def test_frozen_parameters_are_left_alone(make, tiny_model):
    model = copy.deepcopy(tiny_model)
    model.lm_head.requires_grad_(False)
    before = model.lm_head.weight.clone()
    trainer = make(model=model)
    trainer.train()
    assert torch.equal(trainer.model.lm_head.weight, before)
    assert not torch.equal(trainer.model.model.norm.weight, tiny_model.model.norm.weight)


def test_loss_that_is_not_finite_stops_before_the_step(make, tiny_model, tiny_tokenizer):
    broken = copy.deepcopy(tiny_model)
    with torch.no_grad():
        token = tiny_tokenizer.convert_tokens_to_ids("y")
        broken.model.embed_tokens.weight[token] = math.nan
    with pytest.raises(UsageError, match=r"begin with \(model\.embed_tokens\.weight"):
        make(model=broken).train()

    trainer = make([{**row, "chosen_score": math.inf} for row in SCORED], loss="plad_margin")
    before = weights(trainer)
    with pytest.raises(UsageError, match="the loss is inf at step 0; look for extreme scores"):
        trainer.train()
    assert_same_weights(weights(trainer), before, rtol=0, atol=0)

    trainer = make(learning_rate=1e30, max_steps=3)
    with pytest.raises(UsageError, match="lower the learning rate"):
        trainer.train()


def test_a_loss_that_can_go_without_scores_sees_those_of_text_rows(make, tiny_tokenizer):
    """kto takes a response for desirable by its score, and without scores the first one."""
    rows = [{**row, "scores": [1.0, 1.0, -1.0]} for row in RANKED]
    options = {"loss": "kto", "loss_args": {"kl": 0.0}, "beta": 0.5}
    encoded = tokenize_dataset(rows, tiny_tokenizer, max_length=128, with_scores=True)
    trained = {}
    for name, data in (("text", rows), ("ids", encoded), ("none", RANKED)):
        trainer = make(data, per_device_train_batch_size=8, **options)
        trainer.train()
        trained[name] = weights(trainer)
    assert_same_weights(trained["text"], trained["ids"], rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_same_weights(trained["none"], trained["ids"], rtol=1e-4, atol=1e-5)


def test_reference_logps_of_text_rows_take_the_place_of_a_reference_model(make):
    rows = [{**row, "reference_logps": [-1.0, -2.0]} for row in PAIRS]
    trainer = make(rows, loss="dpo", eval_rows=rows[:3])
    assert trainer.train_dataset["reference_logps"][:] == [[-1.0, -2.0]] * 8
    assert trainer.eval_dataset["reference_logps"][:] == [[-1.0, -2.0]] * 3
    assert "reference_logps" not in make(rows).train_dataset.column_names
    with pytest.raises(UsageError, match="train_dataset, row 1: reference_logps are"):
        make([{**PAIRS[0], "reference_logps": [-1.0]}], loss="dpo")
    with pytest.raises(UsageError, match=r"has reference_logps.*rank_end_token"):
        make(rows, loss="dpo", rank_end_token=False)


@pytest.mark.parametrize("kind", ["gpt2", "bart", "lora"])
def test_dropout_is_off_where_responses_are_compared(kind, make, tiny_model, tiny_tokenizer):
    """Before the first step a model is its own reference, and DPO's loss is log 2."""
    size = {"vocab_size": len(tiny_tokenizer), "pad_token_id": 0}
    if kind == "gpt2":  # 0.1 by default, in layers and attention
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **size))
    elif kind == "bart":
        widths = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in WIDTHS}
        drops = {"dropout": 0.5, "attention_dropout": 0.5, "decoder_layerdrop": 0.5}
        config = BartConfig(d_model=32, max_position_embeddings=256, **size, **widths, **drops)
        model = BartForConditionalGeneration(config)
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            copy.deepcopy(tiny_model),
            peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False),
        )
    options = {"loss": "dpo", "beta": 5.0, "per_device_train_batch_size": 8, "learning_rate": 0.0}
    for disable in (True, False):
        trainer = make(model=copy.deepcopy(model), disable_dropout=disable, **options)
        trainer.train()
        assert (abs(last_log(trainer)["loss"] - math.log(2)) < 1e-4) == disable


def test_metrics_of_predictions_are_refused(make):
    trainer = make(eval_rows=PAIRS)
    trainer.compute_metrics = lambda prediction: {}
    with pytest.raises(UsageError, match="compute_metrics is set"):
        trainer.evaluate()


def test_a_pad_token_that_the_model_lacks_pads_nothing(make, tiny_model, tiny_tokenizer):
    """It is masked: another token of the vocabulary does."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer._pad_token = None
    tokenizer.add_special_tokens({"pad_token": "<another>"})
    assert tokenizer.pad_token_id == len(tiny_tokenizer)
    assert pad_token_id(tokenizer, tiny_model) == tiny_tokenizer.eos_token_id
