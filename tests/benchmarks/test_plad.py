"""The PLaD study on a tiny model: its files, its arithmetic, and that it goes on."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plad_vs_sft
from benchmarks.plad_arms import ARMS, SFT, read_tasks, run_prompts
from benchmarks.plad_study import KINDS, Study
from benchmarks.plad_table import interval, summarise, training_rows, training_table
from plad_fast.errors import UsageError
from plad_fast.models.loading import load_tokenizer
from plad_fast.recipe.inputs import read_jsonl
from plad_fast.recipe.settings import DistillConfig

ROOT = Path(__file__).parents[2]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags and files of both tasks."""
    folder = tmp_path_factory.mktemp("data")
    dialogues = [{"dialogue": f"a {n} b", "summary": f"they say {n}"} for n in range(20)]
    papers = [{"abstract": f"of {n}", "tldrs": [f"a {n}", f"{n} too"]} for n in range(19)]
    dialogsum = write(folder / "dialogsum.jsonl", dialogues)
    train, dev = (
        write(folder / "train.jsonl", papers[:15]),
        write(folder / "dev.jsonl", papers[15:]),
    )
    return {"dialogsum": dialogsum, "scitldr": [train, dev]}


@pytest.fixture(scope="module")
def command(tiny_teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plad")
    return [
        *("--tiny", "--student", str(tiny_teacher), "--dialogsum", str(data["dialogsum"])),
        *("--output-dir", str(folder / "run"), "--csv", str(folder / "out.csv")),
    ]


def rows_of(command):
    with open(command[command.index("--csv") + 1], newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def quick(command):
    """A command that was run, and what it said."""
    some = [*command, "--arms", "PLaD listwise", "--seeds", "0", "--lora-r", "2"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert plad_vs_sft.main(some) == 0
    return some, said.getvalue()


@pytest.fixture
def trials(quick, command):
    """The CSV of its trials."""
    return str(Path(command[-1]).with_name("out_trials.csv"))


def test_quick_run(quick, monkeypatch, capsys, tmp_path):
    """Arms have their rows; a second run computes nothing and says the same."""
    some, first = quick
    rows = rows_of(some)
    arms = ["SFT", "SFT longer", "PLaD listwise"]
    assert [(r["arm"], r["answers"]) for r in rows] == [(a, k) for a in arms for k in KINDS]
    assert all(0 <= float(r["rougeL"]) <= 1 for r in rows)
    assert float(rows[3]["rougeL_more"]) == float(rows[3]["rougeL_more_high"]) == 0
    assert rows[0]["likelihood"] == rows[0]["kept"] == ""
    assert all(re.fullmatch(r"\d+ of [1-9]\d*", row["kept"]) for row in rows[3:])
    with open(Path(some[some.index("--csv") + 1]).with_name("out_training.csv")) as file:
        trainings = list(csv.DictReader(file))
    assert [(r["arm"], r["check"]) for r in trainings] == [
        (arm, check) for arm in arms[1:] for check in "01"
    ]
    assert trainings[1]["ranking_accuracy"] == ""  # no pairs
    assert 0 <= float(trainings[3]["ranking_accuracy"]) <= 1
    for start, end in zip(trainings[::2], trainings[1::2], strict=True):
        steps = start["step"], end["step"], end["step"]
        assert steps == ("0", *[r["kept"].split()[2] for r in rows if r["arm"] == end["arm"]][:2])
    assert Path(some[some.index("--csv") + 1]).with_suffix(".png").is_file()
    monkeypatch.setattr("benchmarks.plad_study.load_model", None)
    monkeypatch.setattr("plad_fast.training.train.load_model", None)
    assert plad_vs_sft.main(some) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]
    seen, drawn = {}, []

    def seeing(task, arm, found, baseline, start):
        seen[arm] = found is baseline, found is start
        return summarise(task, arm, found, baseline, start)

    monkeypatch.setattr(plad_vs_sft, "summarise", seeing)
    monkeypatch.setattr("benchmarks.plad_table._label", lambda arm, _: drawn.append(arm) or arm)
    other = ["--against", "PLaD listwise", "--csv", str(tmp_path / "other.csv")]
    assert plad_vs_sft.main([*some, *other]) == 0
    assert seen == dict(zip(arms, [(False, True), (False, False), (True, False)], strict=True))
    assert drawn == arms[:2]
    assert "the difference from PLaD listwise;" in capsys.readouterr().out
    assert {row["against"] for row in rows_of(other[1:])} == {"PLaD listwise"}
    with pytest.raises(SystemExit, match="2"):
        plad_vs_sft.main([*some, "--against", "DPO"])
    assert "--against DPO: not among the arms SFT, SFT longer" in capsys.readouterr().err


def test_interrupted(quick, monkeypatch, capsys):
    """It ends in one line, and later goes on: see `test_quick_run`."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "measure_arm", interrupt)
    assert plad_vs_sft.main(quick[0]) == 130
    assert capsys.readouterr().err.endswith("the same command goes on from here\n")


def test_settings_of_earlier_trials_are_taken(quick, trials, tmp_path):
    """A run with them measures what the one that found them did, and searches nothing."""
    some, _ = quick
    places = ["--output-dir", str(tmp_path / "run"), "--csv", str(tmp_path / "again.csv")]
    assert plad_vs_sft.main([*some, *places, "--tuned", trials]) == 0
    assert not list((tmp_path / "run").glob("*/*/trials"))
    with open(places[-1], newline="") as file:
        assert list(csv.DictReader(file)) == rows_of(some)


def test_only_arms_without_trials_are_tried(command, trials, tmp_path):
    """Their trials are written below the earlier ones, which stay as they are."""
    out = tmp_path / "more.csv"
    failed = 'DialogSum,DPO,"{}",,,,,,,,,1.5\n'  # is kept as well
    given = tmp_path / "given.csv"
    given.write_text(Path(trials).read_text() + failed)
    some = [*command, "--arms", "PLaD listwise", "SODA", "--seeds", "0", "--lora-r", "2"]
    some += ["--output-dir", str(tmp_path / "run"), "--csv", str(out), "--tuned", str(given)]
    assert plad_vs_sft.main(some) == 0
    (tried,) = (tmp_path / "run").glob("*/*/trials/*.jsonl")
    assert tried.stem == "soda"
    earlier, more = (
        given.read_text().replace('"{}"', "{}"),
        out.with_name("more_trials.csv").read_text(),
    )
    assert more.startswith(earlier)
    assert [row.split(",")[1] for row in more[len(earlier) :].splitlines()] == ["SODA"]


def test_trials_that_do_not_do(command, trials, tmp_path, capsys):
    def refused(*more):
        assert plad_vs_sft.main([*command, *more]) == 2
        return capsys.readouterr().err

    assert "has no column end_logp; give a CSV of" in refused("--tuned", command[-1])
    assert "1 trials of SFT longer on DialogSum, and other arms would have 3; give --trials 1" in (
        refused("--tuned", trials, "--trials", "3")
    )
    failed = tmp_path / "failed.csv"
    failed.write_text(Path(trials).read_text().splitlines()[0] + "\nDialogSum,DPO,{},,,,,,,,,\n")
    assert "all trials of DPO on DialogSum failed" in refused("--tuned", str(failed))


@pytest.mark.slow
def test_both_tasks_and_all_arms(command, data, tiny_teacher, tmp_path):
    path = tmp_path / "out.csv"
    given = [*command, "--scitldr", *map(str, data["scitldr"]), "--csv", str(path)]
    given += ["--output-dir", str(tmp_path / "run"), "--likelihood", str(tiny_teacher)]
    assert plad_vs_sft.main([*given, "--seeds", "0", "1"]) == 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + len(ARMS)) * len(KINDS)
    assert {row["seeds"] for row in rows} == {"2"}
    assert all(float(row["likelihood"]) < 0 for row in rows)


def test_arms_cost_the_same(command, data, tiny_teacher):
    """Tokens forward and backward, and a third of those that only went forward."""
    args = plad_vs_sft.parse(command)
    (task,) = read_tasks(None, data["dialogsum"])
    study = Study(plad_vs_sft.read_setting(args), task, args.output_dir / "costs", 0)
    count = plad_vs_sft.TINY["pairs"]
    epochs, costs = {}, {}
    with study.opened() as run:
        run.prepare()
        for arm in ARMS:
            epochs[arm.name] = study._of_arm(run, arm).epochs
            costs[arm.name] = study._costs(run, arm.settings)
        rows = read_jsonl(run.folder / "pairs" / "train.jsonl")
    epoch, sampled, chosen = costs["PLaD ranking"]
    budget = study.setting.pair_epochs * epoch + sampled
    assert epochs["PLaD ranking"] == pytest.approx(study.setting.pair_epochs)
    assert epochs["SFT longer"] * chosen == pytest.approx(budget)
    assert epochs["SimPO"] == epochs["PLaD ranking"]
    # A reference goes through all of an epoch once.
    assert epochs["DPO"] == epochs["IPO"] == pytest.approx(epochs["SimPO"] - 1 / 3)
    of_lists, drawn, _ = costs["PLaD listwise"]
    assert epochs["PLaD listwise"] * of_lists + drawn == pytest.approx(budget)
    assert drawn > sampled
    # By hand, of the pairs that lie there last, SODA's.
    tokenizer = load_tokenizer(tiny_teacher)
    length = {
        name: [len(tokenizer(row[name][-1]["content"]).input_ids) for row in rows]
        for name in ("prompt", "chosen", "rejected")
    }
    every, drawn, chosen = costs["SODA"]
    assert every == sum(map(sum, length.values()))
    assert chosen == sum(length["prompt"]) + sum(length["chosen"])
    others = sum(length["prompt"]) + sum(length["rejected"])
    assert drawn == pytest.approx(others / 3 * count / len(rows))
    # To choose the worst one, all were sampled.
    with study.opened() as run:
        _, of_first, _ = study._costs(run, {"select": "teacher"})
        for select in ("all", "best-worst-pooled"):
            _, of_each, _ = study._costs(run, {"select": select})
            assert of_each == pytest.approx(study.setting.candidates * of_first, rel=0.2)


def test_settings_reach_the_run(command, data):
    more = ["--select", "best-worst-pooled", "--student-temperature", "0,1"]
    more += ["--fine-tune-on", "all"]
    args = plad_vs_sft.parse([*command, *more])
    (task,) = read_tasks(None, data["dialogsum"])
    study = Study(plad_vs_sft.read_setting(args), task, args.output_dir / "settings", 0)
    assert study.config.select == "best-worst-pooled"
    assert study.config.student_temperature == (0.0, 1.0)
    assert len(study.prompts.sft) == len(study.prompts.pairs) == 4 + 8


def test_parts_are_apart_and_held_out_is_of_the_last_file(data, tiny_teacher):
    (task,) = read_tasks(data["scitldr"], None)
    sizes = {"sft": 3, "pairs": 4, "validation": 2, "held_out": 3}
    parts = task.read(sizes, 10**6, str(tiny_teacher))
    ids = [row["id"] for rows in parts.values() for row in rows]
    assert len(ids) == len(set(ids)) == 12
    assert {row["id"][0] for row in parts["held_out"]} == {"1"}
    assert {row["id"][0] for part in ("sft", "pairs", "validation") for row in parts[part]} == {"0"}
    row = parts["held_out"][0]
    assert row["answer"] == row["references"][0] != row["references"][1]


def test_pairs_can_be_of_the_prompts_of_fine_tuning(data, tiny_teacher, tmp_path):
    (task,) = read_tasks(data["scitldr"], None)
    sizes = {"sft": 3, "pairs": 4, "validation": 2, "held_out": 3}
    parts = task.read(sizes, 10**6, str(tiny_teacher))
    apart, together = (run_prompts(parts, tmp_path / "data", of) for of in ("own", "all"))
    assert (len(apart.sft), len(apart.pairs)) == (3, 4)
    assert together.sft == together.pairs == together.train == apart.train
    assert together.held_out == apart.held_out
    with pytest.raises(UsageError, match="must be own or all, not 'both'"):
        run_prompts(parts, tmp_path / "data", "both")


def test_arms_can_be_searched():
    """Every value of every search is one that the recipe takes, and the trials count the same."""
    from dataclasses import fields

    from plad_fast.recipe.search import SearchSpace

    names = {field.name for field in fields(DistillConfig)}
    for arm in ARMS:
        config = DistillConfig(**{"scorer": "rougeL", "student_samples": 4, **arm.settings})
        space = SearchSpace.of(config, {"learning_rate": "3e-6..1e-4", **arm.search}, names)
        assert space.by_loss[config.loss].keys() == {"learning_rate", *arm.search}
    assert SFT not in [arm.name for arm in ARMS]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--sft", "9"], "DialogSum has 7 rows left for 8 pairs"),
        (["--scitldr", "DIALOGSUM", "DIALOGSUM"], "has no columns abstract and tldrs"),
        (["--student-temperature", "0.7,"], "--student-temperature"),
        (["--fine-tune-on", "both"], "must be own or all, not 'both'"),
        (
            ["--select", "best-worst-student", "--candidates", "1"],
            "give --student-samples 2 or more",
        ),
    ],
)
def test_data_that_does_not_do(command, data, capsys, extra, message):
    extra = [str(data["dialogsum"]) if text == "DIALOGSUM" else text for text in extra]
    assert plad_vs_sft.main([*command, *extra]) == 2
    assert message in capsys.readouterr().err


def measures(scores):
    """Two prompts, two answers each, of every kind."""
    kind = dict.fromkeys(("rouge1", "rouge2", "rougeL", "repetition", "words", "cut_off"), scores)
    logps = [[-1.0, -2.0], [-3.0, -1.0]]
    return {"ids": ["a", "b"], **{name: {**kind, "logp": logps} for name in KINDS}}


def test_rows_by_hand():
    """The better sample is the likelier one of the first prompt only, which is the only one where
    the student before can be compared."""
    arm, baseline = measures([[0.4, 0.2], [0.3, 0.1]]), measures([[0.1, 0.1], [0.2, 0.0]])
    start = measures([[0.1, 0.4], [0.1, 0.1]])  # the worse sample is the likelier one, and neither
    greedy, _, at_one = summarise("t", "x", [arm, arm], [baseline] * 2, [start] * 2)
    assert greedy["rougeL"] == pytest.approx(0.25)
    assert greedy["rougeL_more"] == pytest.approx(0.15)
    assert greedy["rougeL_more_low"] == pytest.approx(0.1)
    assert at_one["auroc"] == pytest.approx(0.5)
    assert at_one["auroc_more"] == at_one["auroc_more_high"] == 1
    assert greedy["auroc"] is greedy["auroc_more"] is None


def test_trainings_by_hand():
    """What was logged belongs to the check after it, that of the same step included."""

    def check(step, score):
        names = ("nll", "end_logp", "words", "repetition")
        others = {f"validation/{name}": step for name in names}
        return {"step": step, "validation/score": score, **others}

    log = [
        *(check(0, 0.25), {"step": 1, "loss": 1.0, "ranking_accuracy": 0.5, "nll": 3.0}),
        *(check(2, 0.75), {"step": 2, "loss": 1.0, "ranking_accuracy": 0.75, "nll": 1.0}),
        *({"step": 4, "loss": 1.0, "ranking_accuracy": 1.0, "nll": 0.5}, check(4, 0.5)),
        {"step": 4, "train_loss": 1.0},
    ]
    rows = training_rows("t", "x", [5, 6], [{"log": log}, {"log": log}])
    assert [(r["seed"], r["check"], r["step"]) for r in rows[:4]] == [
        *((5, 0, 0), (5, 1, 2), (5, 2, 4), (6, 0, 0))
    ]
    assert [r["ranking_accuracy"] for r in rows[:3]] == [None, 0.625, 1.0]
    assert [r["nll"] for r in rows[:3]] == [None, 2.0, 0.5]
    assert rows[0]["margin"] is None
    assert training_rows("t", SFT, [5], [{}]) == []
    rows[4] |= {"validation/score": 1.0}  # of the other seed
    of_arm = training_table(rows).splitlines()[-1]
    assert "25.0, 87.5, 50.0" in of_arm
    assert "0.62, 1.00" in of_arm


def test_intervals_are_over_seeds_and_prompts():
    """Seeds that differ widen them beyond what the prompts alone say."""
    prompts = np.tile([0.0, 1.0], 50)
    low, high = interval(np.stack([prompts, prompts, prompts]))
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65
    low, high = interval(np.stack([np.zeros(100), np.ones(100)]))
    assert (low, high) == (0.0, 1.0)


WIN_KINDS = "likelihood_samples", "likelihood_greedy", "rougeL_samples", "rougeL_greedy"


def wins(row, kinds=WIN_KINDS[:3]):
    """Cells: by likelihood, samples and greedy; by ROUGE-L, samples."""
    ends = "", "_low", "_high"
    shares = [[100 * float(row[f"win_{kind}{end}"]) for end in ends] for kind in kinds]
    return " | ".join("{:.1f} % [{:.1f}, {:.1f}]".format(*share) for share in shares)


@pytest.mark.parametrize(
    ("page", "results", "kinds"),
    [
        ("docs/evidence.md", "plad_vs_sft.csv", WIN_KINDS),
        ("benchmarks/README.md", "plad_vs_sft_first.csv", WIN_KINDS[:3]),
    ],
)
def test_the_pages_have_the_figures_of_the_tables(page, results, kinds):
    with open(ROOT / "benchmarks/results" / results, newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    names = {"SFT": "before", "SFT longer": "more fine-tuning"}
    assert list(rows) == ["SFT", "SFT longer", "PLaD ranking", "PLaD margin", "DPO", "SimPO"]
    assert {row["seeds"] for row in rows.values()} == {"3"}
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, row in rows.items():
        won = " | ".join(["50 %"] * len(kinds)) if name == "SFT longer" else wins(row, kinds)
        repetition = ", ".join(
            f"{float(row[f'repetition_{k}']):.3f}" for k in ("samples", "greedy")
        )
        cells = [names.get(name, name), won, repetition]
        assert f"| {' | '.join(cells)} |" in text, cells


def test_the_page_has_what_was_tried():
    with open(ROOT / "benchmarks/results/plad_tried.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["arm"] == "SFT longer" or f"| {wins(row)} |" in text, row["arm"]
