"""Packed rows, micro-batches and the hinge skip change how fast a training runs, nothing else."""

from __future__ import annotations

import json
import logging
import math
import time
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from plad_fast.errors import UsageError
from plad_fast.training import reference_logps
from plad_fast.training.micro_batches import Groups, pack, split_to
from plad_fast.training.trainer import PLaDTrainer
from tests.support.trainings import PAIRS, RANKED, assert_same_weights, last_log, weights

ADAM = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 3e-3}


def first_fit(lengths, budget, padded):
    """Packing by its definition: of all bins the first that still has room."""
    bins = []
    for index in sorted(range(len(lengths)), key=lambda i: -sum(lengths[i])):
        for indices in bins:
            columns = zip(*(lengths[i] for i in [*indices, index]), strict=True)
            taken = sum(max(c) * (len(indices) + 1) if padded else sum(c) for c in columns)
            if taken <= budget:
                indices.append(index)
                break
        else:
            bins.append([index])
    return sorted(map(sorted, bins))


@given(st.integers(1, 2), st.integers(1, 90), st.booleans(), st.data())
def test_packing_is_first_fit(parts, budget, padded, data):
    """Which keeps to the budget, and leaves no two bins that would fit into one."""
    length = st.tuples(st.integers(1, 30), *[st.integers(0, 30)] * (parts - 1))
    lengths = data.draw(st.lists(length, max_size=20))
    assert pack(lengths, budget, padded=padded) == first_fit(lengths, budget, padded)
    one = [list(range(len(lengths)))] if lengths else []
    assert pack(lengths, None, padded=padded) == one


def test_a_part_is_padded_to_the_longest_of_its_own_kind():
    """Which another item of the bin may have than that of the other parts, or than the last."""
    assert pack([(10, 0), (1, 8), (4, 4)], 36, padded=True) == [[0, 1], [2]]


@pytest.mark.parametrize("padded", [False, True])
def test_packing_a_large_set_takes_no_time(padded):
    """60,000 rows, as for a reference pass; a search of all bins would take minutes."""
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.randn(60_000, generator=draw) / 2 + 6.6).exp().clamp(max=4096).int()
    started = time.process_time()
    bins = pack([(length, 7) for length in lengths.tolist()], 4200, padded=padded)
    assert time.process_time() - started < 15
    assert sum(map(len, bins)) == len(lengths)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_splitting_keeps_every_item(sizes, data):
    bins = [[(i, j) for j in range(size)] for i, size in enumerate(sizes)]
    count = data.draw(st.integers(len(bins), sum(sizes) + 2))
    split = split_to(bins, count)
    assert len(split) == count
    assert [bool(part) for part in split] == [index < sum(sizes) for index in range(count)]
    assert sorted(x for part in split for x in part) == sorted(x for part in bins for x in part)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (PAIRS, {"beta": 30.0}),
        (RANKED, {"loss": "plad_listwise", "beta": 5.0, "length_normalization": 1.0}),
        (PAIRS, {"loss": "sft"}),
    ],
    ids=["pairs", "three-responses", "sft"],
)
def test_layouts_give_one_loss_curve(make, rows, options):
    """15 steps of SGD; the tiny differences of rounding must not grow into something."""
    runs = {}
    for layout in ("padded", "packed", "shared"):
        budget = 60 if layout == "shared" else None
        runs[layout] = make(
            rows, layout=layout, max_tokens_per_batch=budget, max_steps=15,
            per_device_train_batch_size=4, learning_rate=1e-3, **options,
        )  # fmt: skip
        runs[layout].train()
        assert runs[layout].layout == layout
    for layout in ("packed", "shared"):
        assert losses(runs[layout]) == pytest.approx(losses(runs["padded"]), rel=1e-4, abs=1e-4)
        assert_same_weights(weights(runs[layout]), weights(runs["padded"]), rtol=1e-3, atol=1e-5)


def count_backwards(trainer):
    """A list with an entry for every backward that reaches the embeddings."""
    calls = []
    embeddings = trainer.model.get_input_embeddings().weight
    embeddings.register_post_accumulate_grad_hook(lambda _: calls.append(True))
    return calls


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 40), (4, 16)])
def test_skipped_backwards_change_no_bit(make, accumulation, steps):
    """One group at a time, so that nothing is packed otherwise. All become satisfied on the way:
    from there on weight decay and momentum alone move the weights, and must go on to do so."""
    options = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "beta": 1.0,
        **ADAM,
    }
    skipping, plain = (make(skip_inactive=skip, **options) for skip in (True, False))
    ran = {id(trainer): count_backwards(trainer) for trainer in (skipping, plain)}
    for trainer in (skipping, plain):
        trainer.train()
    real, all_of_them = (len(ran[id(trainer)]) for trainer in (skipping, plain))
    assert all_of_them == steps * accumulation
    assert 0 < real < 0.9 * all_of_them
    assert_same_weights(weights(skipping), weights(plain), rtol=0, atol=0)
    assert last_log(skipping)["skipped_backwards"] > 0
    assert "skipped_backwards" not in last_log(plain)


def test_satisfied_groups_run_together_and_without_a_backward(make):
    options = {"per_device_train_batch_size": 8, "max_steps": 20, "beta": 4.0, **ADAM}
    skipping, plain = (make(skip_inactive=skip, **options) for skip in (True, False))
    for trainer in (skipping, plain):
        trainer.train()
    shares = [e["skipped_backwards"] for e in skipping.state.log_history if "loss" in e]
    active = [e["active_pairs"] for e in skipping.state.log_history if "loss" in e]
    assert shares[0] == 0.0
    # Some pairs are satisfied and others not: those that are make the half that is skipped.
    assert any(share == 0.5 and 0 < a < 1 for share, a in zip(shares, active, strict=True))
    assert losses(skipping) == pytest.approx(losses(plain), rel=1e-4, abs=1e-4)
    assert_same_weights(weights(skipping), weights(plain), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"sft_weight": 0.1, "beta": 0.0}, {"loss": "sft"}, {"loss": "cpo", "beta": 1.0}]
)
def test_a_regulariser_or_a_loss_without_hinge_keeps_every_backward(make, options):
    """And asks no GPU for the groups that are active."""
    trainer = make(max_steps=4, **options)
    ran = count_backwards(trainer)
    trainer.train()
    assert len(ran) == 4
    assert "skipped_backwards" not in last_log(trainer)


@pytest.mark.parametrize("restored", [False, True])
def test_resumed_run_remembers_who_was_satisfied(make, tmp_path, restored):
    """Also where transformers puts a callback of its own making in the place of ours."""
    options = {
        **ADAM,
        "beta": 4.0,
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "save_steps": 4,
        "trainer": PLaDTrainer,  # in random order, which the checkpoint has to restore
        "restore_callback_states_from_checkpoint": restored,
    }
    straight = make(output=tmp_path / "a", save_strategy="steps", **options)
    straight.train()
    checkpoint = tmp_path / "a" / "checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["InactiveRows"]["attributes"]["listed"]
    resumed = make(output=tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed._skipper.rows.numbers == straight._skipper.rows.numbers != set()
    assert_same_weights(weights(resumed), weights(straight), rtol=0, atol=0)
    if restored:
        return
    again = []
    rows = resumed._skipper.rows
    resumed.add_callback(OnStep(lambda: again.append(set(rows.numbers))))
    resumed.train()  # from the start: nothing is satisfied yet
    assert again[0] == set()


class OnStep(TrainerCallback):
    """Calls a function when a step begins."""

    def __init__(self, do):
        self.do = do

    def on_step_begin(self, *args, **kwargs):
        self.do()


def test_a_layer_frozen_on_the_way_stays_where_it_is(make):
    """Zeros for what skipped backwards would have reached are not for what is frozen meanwhile."""
    trained = {}
    for skip in (True, False):
        trainer = make(skip_inactive=skip, per_device_train_batch_size=4, max_steps=20, beta=1.0,
                       **ADAM)  # fmt: skip
        embeddings = trainer.model.get_input_embeddings().weight

        def freeze(trainer=trainer, weight=embeddings):
            if trainer.state.global_step == 3:
                weight.requires_grad_(False)

        trainer.add_callback(OnStep(freeze))
        trainer.train()
        trained[skip] = weights(trainer)
        if skip:
            assert last_log(trainer)["skipped_backwards"] > 0
    assert_same_weights(trained[True], trained[False], rtol=0, atol=0)


def test_batches_are_not_rounded_on_their_way(make):
    """DeepSpeed's own way of moving them casts what is of floating point."""
    trainer = make(loss="dpo", bf16=False)
    trainer.is_deepspeed_enabled = True  # the cast would need a plugin, which is not there
    batch = trainer._batches.collate(Groups([*trainer.train_dataset]), range(2))
    moved = trainer._prepare_inputs(batch)
    assert torch.equal(moved["reference_logps"], batch["reference_logps"])


def test_token_budget_makes_micro_batches(make):
    """Memory is that of the largest; the step is that of all."""
    whole, parts = (
        make(
            eval_rows=PAIRS,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=5,
            beta=50.0,
            max_tokens_per_batch=budget,
        )
        for budget in (None, 70)
    )
    sizes = []
    collate = parts._batches.collator

    def watched(features):
        batch = collate(features)
        sizes.append(batch["input_ids"].numel())
        return batch

    parts._batches.collator = watched
    for trainer in (whole, parts):
        trainer.train()
    assert len(sizes) > 2
    assert max(sizes) <= 70
    assert last_log(parts)["loss"] == pytest.approx(last_log(whole)["loss"], rel=1e-5)
    assert_same_weights(weights(parts), weights(whole), rtol=1e-4, atol=1e-6)
    found, expected = parts.evaluate(), whole.evaluate()
    for key in ("eval_loss", "eval_nll", "eval_margin", "eval_active_pairs", "eval_saved_tokens"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5), key


def test_saved_tokens(make):
    rows = [{"prompt": "x" * 20, "chosen": "y" * 4, "rejected": "z" * 9}]
    trainer = make(rows, per_device_train_batch_size=1)
    trainer.train()
    # BOS and 20 of the prompt; each response has its end mark.
    assert last_log(trainer)["saved_tokens"] == pytest.approx(21 / (21 + 21 + 5 + 10))
    padded = make(rows, per_device_train_batch_size=1, layout="padded")
    padded.train()
    assert last_log(padded)["saved_tokens"] == 0


def test_dataloader_workers_change_nothing(make):
    alone, helped = (make(dataloader_num_workers=n, max_steps=3) for n in (0, 2))
    for trainer in (alone, helped):
        trainer.train()
    assert_same_weights(weights(helped), weights(alone), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_reference_is_the_model_before_training(make, layout, tmp_path):
    """DPO at step 0 is ln 2 whatever the model; computed once, also by a resumed run."""
    options = {
        "loss": "dpo",
        "layout": layout,
        "max_steps": 4,
        "learning_rate": 1.0,
        "save_steps": 2,
        "reference_cache": str(tmp_path / "reference"),
    }
    first = make(eval_rows=PAIRS[:3], output=tmp_path / "a", save_strategy="steps", **options)
    assert first.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    first.train()
    assert losses(first)[0] == pytest.approx(math.log(2), abs=6e-5)
    assert first.evaluate()["eval_loss"] < math.log(2)
    with pytest.raises(UsageError, match="not what it was before training"):
        first.evaluate(PAIRS[:2])
    with mock.patch.object(reference_logps, "causal_lm_logprobs") as scored:
        resumed = make(eval_rows=PAIRS[:3], output=tmp_path / "b", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    scored.assert_not_called()
    assert_same_weights(weights(resumed), weights(first), rtol=0, atol=0)


def test_another_reference_model(make, tiny_model, tmp_path):
    """With one that ranks the other way round the margin of DPO starts elsewhere than at 0."""
    import copy

    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    trainer = make(eval_rows=PAIRS, loss="dpo", reference_model=other)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert trainer.evaluate(PAIRS[:2])["eval_loss"] > 0  # also of data that come later


def test_a_model_that_cannot_share_is_told_once(make, tiny_tokenizer, caplog):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=128,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config)
    with caplog.at_level(logging.WARNING, logger="plad_fast"):
        trainer = make(model=model)
        trainer.train()
    told = [r.getMessage() for r in caplog.records if "not shared" in r.getMessage()]
    assert trainer.layout == "padded"
    assert len(told) == 1
    assert "GPTNeoForCausalLM" in told[0]
    with pytest.raises(UsageError, match="layout 'shared' is not possible"):
        make(model=model, layout="shared")
