"""What TRL's trainers log and predict with this library's loss."""

from __future__ import annotations

import math
import re

import pytest

pytest.importorskip("trl", "1.15")

from plad_fast.integrations.trl import pair_rows
from plad_fast.integrations.trl.use import use_plad_fast
from tests.support.trl_trainers import OF_PAIRS, PAIRS, first_log

EMPTY = {"prompt": "p" * 80, "chosen": "ok", "rejected": "no way"}  # the prompt fills max_length


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cpo", {"loss_type": "simpo", "alpha": 0.25, "cpo_alpha": 0.0}),
        ("cpo", {"loss_type": "ipo"}),
        ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.5}),
        ("orpo", {}),
    ],
)
def test_an_empty_response_is_worth_nothing_in_the_metrics(build, kind, options):
    """Its log-probability is 0, a sum and a mean; the other pair's numbers are TRL's."""
    common = {**options, "max_length": 40, "max_steps": 1, "learning_rate": 0.0}
    alone = build(kind, rows=PAIRS[:1], **common)
    both = use_plad_fast(build(kind, rows=[EMPTY, PAIRS[0]], **common))
    expected, found = first_log(alone), first_log(both)
    halves = OF_PAIRS | ({"log_odds_chosen"} if kind == "orpo" else set())
    for name in halves - {"rewards/accuracies"}:
        assert found[name] == pytest.approx(expected[name] / 2, 1e-5, 1e-6), name
    if kind == "orpo":
        ratio = (expected["log_odds_ratio"] - math.log(2)) / 2
        assert found["log_odds_ratio"] == pytest.approx(ratio, 1e-5)
    else:
        assert found["nll_loss"] == pytest.approx(expected["nll_loss"], 1e-5)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_rewards_of_our_trainer_are_those_of_trl(build, make, loss, theirs):
    """In training over micro-batches and accumulation, and over the batches of an evaluation."""
    common = {"learning_rate": 0.0, "beta": 0.3}
    plain = build(
        loss_type=[theirs], with_eval=True, max_steps=1, **common,
        **{f"per_device_{kind}_batch_size": len(PAIRS) for kind in ("train", "eval")},
    )  # fmt: skip
    fast = make(
        PAIRS, loss=loss, eval_rows=PAIRS, reference_model=plain.ref_model, **common,
        length_normalization=None,
        per_device_train_batch_size=3, gradient_accumulation_steps=2, max_tokens_per_batch=40,
    )  # fmt: skip
    for expected, found in (
        (first_log(plain), first_log(fast)),
        (plain.evaluate(), fast.evaluate()),
    ):
        prefix = "eval_" if "eval_loss" in expected else ""
        assert found[f"{prefix}margin"] != pytest.approx(expected[f"{prefix}rewards/margins"], 1e-3)
        for name in OF_PAIRS if loss == "dpo" else OF_PAIRS - {"logps/chosen", "logps/rejected"}:
            name = prefix + name
            assert found[name] == pytest.approx(expected[name], 1e-5, 2e-5), name


LONG = {"prompt": "p", "chosen": "a" * 90, "rejected": "b" * 99}


@pytest.mark.parametrize(
    ("kind", "row", "options"),
    [
        ("cpo", EMPTY, {"loss_type": "simpo", "max_length": 40}),
        ("orpo", EMPTY, {"max_length": 40}),
        # TRL's p ** -alpha of a sum of hundreds of nats is infinite, and margins are NaN.
        ("cpo", LONG, {"alpha": 0.5}),
    ],
    ids=["simpo-empty", "orpo-empty", "alphapo-long"],
)
def test_metrics_of_extreme_responses_are_finite(build, kind, row, options):
    trainer = use_plad_fast(build(kind, rows=[row] * 2, max_steps=1, **options))
    assert all(math.isfinite(value) for value in first_log(trainer).values())


@pytest.mark.filterwarnings("ignore:.*return_outputs")
@pytest.mark.parametrize("kind", ["dpo", "cpo", "orpo"])
def test_predictions_are_those_of_trl(build, kind):
    """Of `predict`, and those that `compute_metrics` gets; DPO's are logits, the others' means."""
    plain, fast = build(kind, with_eval=True), build(kind, with_eval=True)
    made = []
    for trainer in (plain, use_plad_fast(fast, metrics="all" if kind == "dpo" else "fast")):
        trainer.compute_metrics = lambda seen: {"mean": seen.predictions.mean()}
        made.append((trainer.predict(trainer.eval_dataset), trainer.evaluate()))
    (expected, their_log), (found, our_log) = made
    assert found.predictions == pytest.approx(expected.predictions, 1e-4, 2e-5)
    assert (found.label_ids == expected.label_ids).all()
    for ours, theirs, names in (
        (found.metrics, expected.metrics, {"test_loss", "test_mean"}),
        (our_log, their_log, {"eval_loss", "eval_mean"}),
    ):
        assert ours.keys() == theirs.keys() >= names
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], 1e-5, 2e-5), name


def test_logits_are_not_computed_where_nobody_asks(build):
    trainer = use_plad_fast(build("cpo", with_eval=True))
    trainer.evaluate()
    assert "eval_logits/chosen" not in trainer.state.log_history[-1]
    trainer.compute_metrics = lambda seen: {}
    trainer.evaluate()
    assert "eval_logits/chosen" in trainer.state.log_history[-1]


def test_common_beginnings_run_through_the_model_once(build):
    """What a step needs: the padded rows of TRL have more than twice the tokens of ours."""
    trainer = use_plad_fast(build(rows=[dict(row, prompt="x" * 40) for row in PAIRS]))
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = pair_rows.pair_batch(
        inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], layout="shared"
    )
    assert batch["input_ids"].numel() * 2 < inputs["input_ids"].numel()
    assert batch["targets"].numel() == inputs["completion_mask"].sum()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("dpo", "auto"), ("dpo", "packed"), ("dpo", "padded"), ("cpo", "auto"), ("orpo", "auto")],
)
def test_the_first_batch_says_once_what_is_saved(build, kind, layout, capfd):
    trainer = use_plad_fast(build(kind, max_steps=3, with_eval=True), layout=layout)
    trainer.train()
    trainer.evaluate()
    [line] = [text for text in capfd.readouterr().out.splitlines() if "plad_fast in" in text]
    assert f"plad_fast in {kind.upper()}Trainer: loss {kind}, " in line
    assert {"auto": "shared"}.get(layout, layout) + " rows" in line
    places, tokens, share, scored = map(
        int, re.findall(r"(\d+)(?: tokens| run|% saved| reach)", line)
    )
    assert share == round(100 * (1 - tokens / places))
    assert (share == 0) == (layout == "padded")
    assert 0 < scored < places
