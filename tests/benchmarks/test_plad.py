"""The small PLaD experiment on a tiny model: its files, its arithmetic, and that it goes on."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plad_vs_sft
from benchmarks.plad_arms import ARMS, Arm, read_arms
from benchmarks.plad_study import Setting, Study
from benchmarks.plad_table import Outcomes, interval, summarise
from plad_fast.errors import UsageError
from plad_fast.pairs.select import PairFilters

ROOT = Path(__file__).parents[2]
SIZES = {
    "fine_tuning": 6, "pairing": 6, "validation": 4, "first_held_out": 0, "held_out": 4,
    "layers": 1, "samples": 2, "max_new_tokens": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def dialogsum(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dialogsum.jsonl"
    rows = [{"dialogue": f"a {n} b", "summary": f"they say {n}"} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def command(tiny_teacher, dialogsum, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plad")
    sizes = [text for k, v in SIZES.items() for text in ("--" + k.replace("_", "-"), str(v))]
    return [
        *("--dialogsum", str(dialogsum), "--teacher", str(tiny_teacher), "--seeds", "0", "1"),
        *("--output-dir", str(folder / "run"), "--csv", str(folder / "out.csv"), *sizes),
    ]


def test_quick_run(command, monkeypatch, capsys):
    """Every arm has its row; a second run computes nothing and says the same."""
    assert plad_vs_sft.main(command) == 0
    first = capsys.readouterr().out
    path = command[command.index("--csv") + 1]
    with open(path, newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["SFT", *(arm.name for arm in ARMS)]
    assert float(rows["SFT longer"]["win_likelihood_samples"]) == 0.5
    assert rows["DPO"]["win_rougeL_greedy_seeds"].count(" ") == 1
    monkeypatch.setattr("benchmarks.plad_study.load_model", None)
    monkeypatch.setattr("plad_fast.training.train.load_model", None)
    assert plad_vs_sft.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]


def test_another_setting_is_refused(command, capsys):
    assert plad_vs_sft.main([*command, "--layers", "2"]) == 2
    assert "layers was 1 and is 2" in capsys.readouterr().err


def test_arms_cost_the_same(command, tiny_teacher, dialogsum):
    """Tokens forward and backward, and a third of those that only went forward."""
    setting = Setting(str(tiny_teacher), dialogsum, **SIZES)
    folder = plad_vs_sft.parse(command).output_dir
    study = Study(setting, folder, 0, "held_out")
    pairs = study.pairs
    chosen = sum(study._tokens(row, "chosen") for row in pairs)
    rejected = sum(study._tokens(row, "rejected") for row in pairs)
    sampled = sum(
        len(study.tokenizer(text)["input_ids"])
        for prompt in study.parts["pairing"]
        for text in (prompt.content, study.pair_samples[prompt.id][0].text)
    )
    assert sampled > rejected  # what came to nothing was sampled too
    both = sum(study._tokens(row, "chosen", "rejected") for row in pairs)
    assert both < chosen + rejected  # the prompt goes through once
    arms = {arm.name: arm for arm in ARMS}
    assert study._epochs(arms["PLaD ranking"], pairs) == pytest.approx(setting.pair_epochs)
    budget = sampled / 3 + setting.pair_epochs * both
    longer = study._epochs(arms["SFT longer"], pairs)
    assert longer * chosen == pytest.approx(budget)
    dpo = study._epochs(arms["DPO"], pairs)
    assert dpo * both + both / 3 + sampled / 3 == pytest.approx(budget)


def test_answers_of_another_training_are_refused(command, tiny_teacher, dialogsum):
    """An arm whose folder was deleted after its settings had changed has other answers."""
    setting = Setting(str(tiny_teacher), dialogsum, **SIZES)
    study = Study(setting, plad_vs_sft.parse(command).output_dir, 0, "held_out")
    other = study.run(ARMS[-1])
    assert study.measure("DPO", study.run(ARMS[-2]), ["rougeL"])["ids"]
    with pytest.raises(UsageError, match="weights was"):
        study.measure("DPO", other, ["rougeL"])


def test_arms_of_a_file(tmp_path, command, tiny_teacher, dialogsum):
    """Fields of `Arm`; fewer pairs are gone over more often."""
    path = tmp_path / "arms.json"
    fields = {"name": "One pair", "loss": "plad_ranking", "learning_rate": 1e-4, "pairs": 1}
    path.write_text(json.dumps([fields | {"options": {"beta": 1.0}}]))
    (arm,) = read_arms(path)
    assert arm == Arm("One pair", "plad_ranking", 1e-4, options={"beta": 1.0}, pairs=1)
    setting = Setting(str(tiny_teacher), dialogsum, **SIZES)
    study = Study(setting, plad_vs_sft.parse(command).output_dir, 0, "held_out")
    rows = study._filtered(arm)
    assert rows == study.pairs[:1] != study.pairs
    share = sum(study._tokens(row, "chosen", "rejected") for row in rows) / sum(
        study._tokens(row, "chosen", "rejected") for row in study.pairs
    )
    assert study._epochs(arm, rows) == pytest.approx(setting.pair_epochs / share)
    none_left = Arm("None", "plad_ranking", 1e-4, filters=PairFilters(min_gap=2.0))
    with pytest.raises(UsageError, match="leave none of"):
        study._filtered(none_left)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold a list of objects"),
        ("[", "Expecting value"),
        ("[]", "holds no arm"),
    ],
)
def test_files_without_arms(tmp_path, command, capsys, text, message):
    path = tmp_path / "arms.json"
    path.write_text(text)
    assert plad_vs_sft.main([*command, "--arms-file", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": ...}, "learning_rate.*an arm has name, loss"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number, got '1e-4'"),
        ({"learning_rate": True}, "learning_rate must be a number, got True"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"pairs": 0}, "pairs must be a whole number"),
        ({"pairs": True}, "pairs must be a whole number"),
        ({"loss": "none"}, "unknown loss 'none'"),
        ({"loss": 3}, "loss"),
        ({"loss": "sft", "pairs": 3}, "neither pairs nor filters"),
        ({"options": {"lr": 1}}, "no option lr"),
        ({"options": []}, "options must be an object"),
        ({"options": {"beta": -1.0}}, "beta"),
        ({"options": {"beta": "x"}}, "beta must be a number"),
        ({"options": {"loss_args": '{"nope": 1}'}}, "nope"),
        ({"filters": {"x": 1}}, "'x'"),
        ({"filters": {"contradicted": "no"}}, "contradicted cannot be 'no'"),
        ({"filters": {"min_gap": True}}, "min_gap cannot be True"),
        ({"filters": 3}, "filters must be an object"),
        ({"name": "SFT longer"}, "'SFT longer' is taken"),
        ({"name": "Evaluation"}, "'Evaluation' is taken"),
        ({"name": ""}, "a name is letters"),
        ({"name": "../x"}, "a name is letters"),
        ({"name": "x.checkpoints"}, "a name is letters"),
        ({"name": 5}, "a name is letters"),
    ],
)
def test_arms_that_cannot_be(tmp_path, command, capsys, fields, message):
    arm = {"name": "a", "loss": "dpo", "learning_rate": 1e-4} | fields
    path = tmp_path / "arms.json"
    path.write_text(json.dumps([{k: v for k, v in arm.items() if v is not ...}]))
    assert plad_vs_sft.main([*command, "--arms-file", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_arms_are_named_once(command, capsys):
    with pytest.raises(SystemExit):
        plad_vs_sft.main([*command, "--arms", "DPO", "--arms-file", "arms.json"])
    assert "exclude each other" in capsys.readouterr().err


def test_a_reference_is_paid_for(command, tiny_teacher, dialogsum):
    setting = Setting(str(tiny_teacher), dialogsum, **SIZES)
    study = Study(setting, plad_vs_sft.parse(command).output_dir, 0, "held_out")
    with_reference, without = (Arm("a", loss, 1e-4) for loss in ("ipo", "simpo"))
    pairs = study.pairs
    epochs = study._epochs(without, pairs)
    assert study._epochs(with_reference, pairs) == pytest.approx(epochs - 1 / 3)


def test_a_part_without_dialogues_is_refused(command, capsys):
    assert plad_vs_sft.main([*command, "--part", "first_held_out"]) == 2
    assert "first_held_out has no dialogues" in capsys.readouterr().err


def measures(scores):
    """Two prompts, two samples each."""
    kinds = {"greedy": [s[0] for s in scores], "samples": scores}
    texts = [["one two", "three"], ["four", "five six"]]
    return {
        "ids": ["a", "b"], "greedy": ["one two", "four"], "samples": texts, "cut": 0.25,
        "logps": [[-1.0, -2.0], [-3.0, -1.0]], "scores": {"held": kinds, "rougeL": kinds},
    }  # fmt: skip


def test_wins_by_hand():
    """Of the first prompt both samples win, of the second one ties and one loses."""
    arm, baseline = measures([[2.0, 3.0], [1.0, 0.0]]), measures([[1.0, 1.0], [1.0, 1.0]])
    row = summarise(Outcomes("x", [arm, arm], [baseline, baseline], "held", "rougeL"))
    assert row["win_likelihood_samples"] == pytest.approx((1 + 0.25) / 2)
    assert row["win_likelihood_greedy"] == pytest.approx((1 + 0.5) / 2)
    assert row["words"] == pytest.approx(1.5)
    # Likelihood ranks the samples of the first prompt wrongly, those of the second too.
    assert row["spearman"] == pytest.approx(-1.0)


def test_intervals_are_over_seeds_and_prompts():
    """Seeds that differ widen them beyond what the prompts alone say."""
    prompts = np.tile([0.0, 1.0], 50)
    low, high = interval([prompts, prompts, prompts])
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65
    low, high = interval([np.zeros(100), np.ones(100)])
    assert (low, high) == (0.0, 1.0)


def wins(row):
    """Cells: by likelihood, samples and greedy; by ROUGE-L, samples."""
    kinds = "likelihood_samples", "likelihood_greedy", "rougeL_samples"
    ends = "", "_low", "_high"
    shares = [[100 * float(row[f"win_{kind}{end}"]) for end in ends] for kind in kinds]
    return " | ".join("{:.1f} % [{:.1f}, {:.1f}]".format(*share) for share in shares)


@pytest.mark.parametrize(
    ("page", "results"),
    [("docs/evidence.md", "plad_vs_sft.csv"), ("benchmarks/README.md", "plad_vs_sft_first.csv")],
)
def test_the_pages_have_the_figures_of_the_tables(page, results):
    with open(ROOT / "benchmarks/results" / results, newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    names = {"SFT": "before", "SFT longer": "more fine-tuning"}
    assert list(rows) == [arm for arm in ("SFT", *(arm.name for arm in ARMS)) if arm in rows]
    assert {"PLaD ranking", "PLaD margin"} <= rows.keys()
    assert {row["seeds"] for row in rows.values()} == {"3"}
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, row in rows.items():
        won = " | ".join(["50 %"] * 3) if name == "SFT longer" else wins(row)
        repetition = ", ".join(
            f"{float(row[f'repetition_{k}']):.3f}" for k in ("samples", "greedy")
        )
        cells = [names.get(name, name), won, repetition]
        assert f"| {' | '.join(cells)} |" in text, cells


def test_the_page_has_what_was_tried():
    with open(ROOT / "benchmarks/results/plad_tried.csv", newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    arms = read_arms(ROOT / "benchmarks/plad_tried.json")
    assert list(rows) == ["SFT", "SFT longer", *(arm.name for arm in arms)]
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for name in ("SFT", *(arm.name for arm in arms)):
        assert f"| {wins(rows[name])} |" in text, name
    # The experiment runs with the two that were chosen.
    for tried, published in (("beta 8", "PLaD ranking"), ("margin 200", "PLaD margin")):
        (one,) = (arm for arm in arms if arm.name == tried)
        (other,) = (arm for arm in ARMS if arm.name == published)
        assert replace(one, name=published) == other
