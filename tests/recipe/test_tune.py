"""`plad-fast tune` on a tiny model: its trials, a kill, and what `distill` makes of the result."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution

from plad_fast.cli import main
from plad_fast.errors import UsageError
from plad_fast.recipe.search import SearchSpace
from plad_fast.recipe.settings import DistillConfig
from plad_fast.training.trained_folders import log_history
from tests.support.launched import Started
from tests.support.recipe_runs import arguments, kill_at

pytestmark = pytest.mark.usefixtures("no_plots")

SEARCH = (
    *("loss=plad_ranking,dpo", "learning_rate=1e-3..1e-1", "epochs=1"),
    *("beta", "dpo.beta=0.05..0.5"),
)


def command(teacher, output, *extra: str) -> list[str]:
    _, *given = arguments(teacher, output, "--validation", "4", "--saves-per-stage", "1")
    searched = [text for one in SEARCH for text in ("--search", one)]
    return ["tune", *given, "--trials", "3", *searched, *extra]


def trials_of(run) -> list[dict]:
    """The stored trials without their times."""
    rows = map(json.loads, (run / "tune" / "trials.jsonl").read_text().splitlines()[1:])
    return [{name: v for name, v in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def tuned(tiny_teacher, tmp_path_factory):
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert main(command(tiny_teacher, run)) == 0
    return run


def test_trials_are_of_the_space_and_reported(tuned):
    trials = trials_of(tuned)
    assert [trial["id"] for trial in trials] == ["0", "1", "2"]
    # The first has the loss's own settings where they lie in the space.
    first = trials[0]["settings"]
    assert (first["loss"], first["beta"], first["learning_rate"]) == ("plad_ranking", 1.0, 1e-3)
    for trial in trials:
        settings = trial["settings"]
        low, high = (0.05, 0.5) if settings["loss"] == "dpo" else (0.1, 10)
        assert low <= settings["beta"] <= high
        assert settings["epochs"] == 1
        assert settings.keys() == {"loss", "learning_rate", "epochs", "beta"}
        assert trial["start"] == trials[0]["start"]
    report = (tuned / "tune" / "report.md").read_text()
    best = max(trials, key=lambda trial: trial["score"])
    assert (
        f"trial {best['id']} is best: its score on validation prompts, {best['score']:.3f}"
        in report
    )
    lines = [line.split(" | ") for line in report.splitlines() if line.startswith("|")]
    assert lines[2][0].strip("| ") == "before"
    assert float(lines[3][1]) == pytest.approx(best["score"], abs=5e-4)
    assert len(lines) == 3 + len(trials)


def test_trials_that_are_missing_come_out_the_same(tuned, tiny_teacher, tmp_path):
    """As after a power cut, whose last line is half of one."""
    copy = shutil.copytree(tuned, tmp_path / "run")
    store = copy / "tune" / "trials.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join([*lines[:2], lines[2][:40]]))
    (copy / "tune" / "best.yaml").unlink()
    assert main(command(tiny_teacher, copy)) == 0
    assert trials_of(copy) == trials_of(tuned)
    best = (copy / "tune" / "best.yaml").read_text()
    assert best.replace(str(copy), str(tuned)) == (tuned / "tune" / "best.yaml").read_text()


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_trials(tuned, tiny_teacher, tmp_path):
    """Within the training of the second trial."""
    run = tmp_path / "run"
    kill_at("training.train.Checkpoints.__init__", 3, command(tiny_teacher, run))
    assert len(trials_of(run)) == 1
    assert main(command(tiny_teacher, run)) == 0
    assert trials_of(run) == trials_of(tuned)
    best = (run / "tune" / "best.yaml").read_text()
    assert best.replace(str(run), str(tuned)) == (tuned / "tune" / "best.yaml").read_text()


def test_distill_takes_what_was_found(tuned, tmp_path, capsys):
    """In the same folder, where all before the pairs is done, to the score of the trial."""
    copy = shutil.copytree(tuned, tmp_path / "run")
    file = copy / "tune" / "best.yaml"
    best = max(trials_of(tuned), key=lambda trial: trial["score"])
    found = yaml.safe_load(file.read_text())
    assert found["learning_rate"] == best["settings"]["learning_rate"]
    assert main(["distill", "--config", str(file), "--output-dir", str(copy)]) == 0
    told = capsys.readouterr().out
    assert told.count("done before") >= 4
    checks = [entry for entry in log_history(copy / "plad") if "validation/score" in entry]
    assert max(entry["validation/score"] for entry in checks[1:]) == best["score"]
    assert checks[0]["validation/score"] == best["start"]["score"]
    # More fine-tuning on the same answers, for comparison.
    unset = [
        text
        for name in ("--beta", "--sft-weight", "--length-normalization")
        for text in (name, "none")
    ]
    control = ["--loss", "sft", *unset]
    assert main(["distill", "--config", str(file), "--output-dir", str(copy), *control]) == 0
    assert "preference training: anew, beta was" in capsys.readouterr().out


def test_trials_without_pairs_fail_and_the_search_goes_on(tuned, tiny_teacher, tmp_path, capsys):
    """Another search in the folder has its own trials; those of the first come back with it."""
    copy = shutil.copytree(tuned, tmp_path / "run")
    by_words = ("--scorer", "brevity", "--search", "min_gap=1000000,0")
    assert main(command(tiny_teacher, copy, *by_words, "--trials", "1")) == 2
    assert "all trials failed, the first: train prompts: no pair is left" in capsys.readouterr().err
    assert main(command(tiny_teacher, copy, *by_words, "--trials", "4")) == 0
    assert None in (scores := [trial["score"] for trial in trials_of(copy)])
    assert len(scores) == 4
    assert set(scores) != {None}
    assert "| failed " in (copy / "tune" / "report.md").read_text()
    assert main(command(tiny_teacher, copy)) == 0
    assert trials_of(copy) == trials_of(tuned)


@pytest.mark.parametrize(
    ("saves", "told"),
    [("2", "the loss is nan at step 1"), ("9", "model validation: it produced NaN")],
)
def test_a_training_that_diverges_fails_its_trial_alone(saves, told, tuned, tiny_teacher, tmp_path):
    copy = shutil.copytree(tuned, tmp_path / "run")
    _, *given = arguments(tiny_teacher, copy, "--validation", "4", "--saves-per-stage", saves)
    search = ("--search", "learning_rate=1e30,1e-12", "--search", "loss=dpo", "--trials", "2")
    began = time.monotonic()
    assert main(["tune", *given, *search]) == 0
    took = time.monotonic() - began
    failed, done = map(json.loads, (copy / "tune/trials.jsonl").read_text().splitlines()[1:])
    assert failed["score"] is None
    assert failed["problem"].startswith(told)
    # Nothing was learned, and of equal checkpoints the first would be kept.
    log = [entry for entry in log_history(copy / "plad") if "validation/score" in entry]
    assert [entry["validation/score"] for entry in log] == [done["score"]] * len(log)
    assert len(log) > 2
    assert done["step"] == log[1]["step"] > 0
    # Once each: the pairs of both trials are the same.
    assert 0 < failed["seconds"] < failed["seconds"] + done["seconds"] < took


def test_a_search_without_names_is_of_the_default_values():
    config = DistillConfig(scorer="rougeL", loss="dpo")
    space = SearchSpace.of(config, None, ["epochs"]).by_loss["dpo"]
    assert space["learning_rate"] == FloatDistribution(3e-6, 1e-4, log=True)
    assert space["drop_contradicted"] == CategoricalDistribution((False, True))
    assert "epochs" not in space
    sft = SearchSpace.of(DistillConfig(loss="sft", sft_weight=0), {}).by_loss["sft"]
    assert "learning_rate" in sft
    assert "sft_weight" not in sft


def test_what_is_named_is_searched_and_nothing_else():
    """A name alone has default values, for the losses that have it."""
    named = ["loss=dpo,plad_ranking,sft", "beta", "dpo.beta=0.5..1", "epochs"]
    assert SearchSpace.of(DistillConfig(), named, ["epochs"]).by_loss == {
        "dpo": {
            "beta": FloatDistribution(0.5, 1.0),
            "epochs": CategoricalDistribution((1.0, 2.0, 4.0)),
        },
        "plad_ranking": {
            "beta": FloatDistribution(0.1, 10.0, log=True),
            "epochs": CategoricalDistribution((1.0, 2.0, 4.0)),
        },
        "sft": {"epochs": CategoricalDistribution((1.0, 2.0, 4.0))},
    }
    assert SearchSpace.of(DistillConfig(), "beta=0.1,2").by_loss["plad_ranking"].keys() == {"beta"}
    by_name, empty = (SearchSpace.of(DistillConfig(), of) for of in (["beta"], {"beta": None}))
    assert by_name.by_loss == empty.by_loss


def test_no_combination_is_tried_twice():
    """Here the ones of dpo have ended long before those of plad_ranking, and these do end."""
    space = SearchSpace.of(
        DistillConfig(), ["loss=plad_ranking,dpo", "plad_ranking.beta=1,2,3", "epochs=1,2"]
    )
    trials: list[dict] = []
    while (settings := space.suggest(trials, 0)) is not None:
        assert settings not in [trial["settings"] for trial in trials]
        trials.append({"settings": settings, "score": -len(trials)})
    assert len(trials) == 3 * 2 + 2


def test_suggestions_depend_on_seed_and_trials_alone():
    named = ["loss=plad_ranking,simpo,slic", "learning_rate", "beta", "sft_weight"]
    space = SearchSpace.of(DistillConfig(), named)
    trials: list[dict] = []
    for number in range(14):
        settings = space.suggest(trials, 7)
        assert space.suggest(trials, 7) == settings
        if number > 1:
            assert space.suggest(trials, 8) != settings
        score = None if number == 3 else settings["learning_rate"]
        trials.append({"settings": settings, "score": score})
    assert len({trial["settings"]["loss"] for trial in trials}) > 1


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"seed": 1}, "--seed is the same in all trials"),
        # Fine-tuning has them too.
        ({"lora_r": [4, 8]}, "--lora-r is the same in all trials"),
        ({"reasoning": "drop,keep"}, "--reasoning is the same in all trials"),
        ({"betta": 1}, "betta: --betta is no setting; what can be searched"),
        ({"beta": "2..1"}, "2..1 must be a range"),
        ({"beta": "-1..1"}, "--beta must be at least 0"),
        ({"batch_size": "2..4"}, "--batch-size has no range; list its values"),
        ({"loss": "dpo,nope"}, "unknown loss 'nope'"),
        ({"loss": "sft", "beta": 1}, "loss sft: --loss sft has no beta"),
        ({"sft_weight": "0,1", "loss": "sft"}, "loss sft with sft_weight 1.0"),
        ({"loss": "plad_margin"}, "loss plad_margin: .*choose a --scorer"),
        ({"dpo.beta": 1}, "'dpo' is none of the losses searched"),
        ({"epochs": [1, 1.0]}, "has a value twice"),
        ({"epochs": []}, "has no value"),
        ({"select": "ranked"}, "loss plad_ranking: .*score"),
        (["beta="], "must be NAME=VALUES"),
        (["beta", "beta=1"], "must be NAME=VALUES"),
        (["loss"], "loss has no default values"),
        (["batch_size"], "batch_size has no default values"),
        (["drop-contradicted"], "drop_contradicted has no default values here"),
        (["betta"], "--betta is no setting"),
    ],
)
def test_searches_that_cannot_be(search, message):
    with pytest.raises(UsageError, match=message):
        SearchSpace.of(DistillConfig(), search)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--validation", "0"), "--validation 0 sets no prompt aside"),
        (("--validation", "0.01"), "--validation 0.01 sets no prompt aside"),
        (("--search", "sft_weight=x"), "search: sft_weight must be a finite number, got 'x'"),
        (("--trials", "0"), "--trials must be at least 1"),
    ],
)
def test_refusals_before_any_work(tiny_teacher, tmp_path, capsys, extra, message):
    assert main(command(tiny_teacher, tmp_path / "run", *extra)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_search_is_refused_under_deepspeed_at_once(tiny_teacher, tmp_path, monkeypatch, capsys):
    """Not with the settings that it takes to train there, which a search cannot have."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(command(tiny_teacher, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "DeepSpeed does not leave; search with DDP (torchrun) or FSDP2, and train" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_a_search_in_two_processes_equals_one(tuned, tiny_teacher, tmp_path):
    started = Started(2, command(tiny_teacher, tmp_path / "run"), tmp_path / "logs")
    assert started.statuses() == [0, 0], started.said()
    for ours, theirs in zip(trials_of(tmp_path / "run"), trials_of(tuned), strict=True):
        assert ours.pop("settings") == theirs.pop("settings")
        assert ours.pop("start") == pytest.approx(theirs.pop("start"), abs=1e-5)
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_search_in_a_file(tiny_teacher, tmp_path, capsys):
    """A mapping, as NAME=VALUES of the flag; a wrong one is told by its name."""
    file = tmp_path / "tune.yaml"
    file.write_text("trials: 2\nsearch:\n  beta: 0.1..2\n  dropout: 1\n")
    assert main(["tune", "--config", str(file), "--output-dir", str(tmp_path / "run")]) == 2
    assert "search: dropout" in capsys.readouterr().err
