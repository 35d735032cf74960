"""Metrics, plots and report of an evaluation, and the examples that the report shows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.report.write import example_answers, margin_unit, write_results
from plad_fast.training.trained_folders import LOG
from tests.support.evaluations import (
    PLAD,
    SFT,
    WORDS,
    calibration,
    evaluate,
    samples,
)

PROMPTS = [Prompt(key, f"Question {key}", "r" if key == "p1" else None) for key in SFT.answers]
HELD_OUT = HeldOut(PROMPTS, dict.fromkeys(SFT.answers, " ".join(WORDS)), [])


def test_one_call_writes_all_files(tmp_path):
    results = evaluate(SFT, PLAD)
    results["calibration"] = calibration(samples("SFT student", -1), samples("PLaD student", 1))
    model = tmp_path / "model"
    model.mkdir()
    (model / LOG).write_text(json.dumps([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]))
    folder = tmp_path / "run"
    report = write_results(
        folder,
        results,
        [SFT, PLAD],
        HELD_OUT,
        title="Evaluation of two students",
        config={"beta": 1.0},
        length_normalization=1.0,
        trainings={"calibration": model, "of a model from elsewhere": tmp_path},
    )
    assert report == folder / "report.html"
    assert json.loads((folder / "metrics.json").read_text()) == results
    names = {"comparison", "margins", "reliability", "training"}
    assert {file.stem for file in (folder / "plots").iterdir()} == names
    html = report.read_text()
    assert html.count("data:image/png") == len(names)
    assert "Margin [nat per token]<" in html


def test_examples_hold_the_biggest_wins_and_losses():
    """The others are the first prompts, in their order."""
    mixed = {key: SFT.answers[key] for key in SFT.answers}
    mixed |= {"p7": " ".join(WORDS), "p8": " ".join(WORDS[:10]), "p9": " ".join(WORDS[:5])}
    mixed |= {"p20": "w0", "p21": "", "p22": "w0 w1"}
    last = replace(PLAD, answers=mixed, cut_off={"p7", "p1"})
    examples = example_answers(HELD_OUT, [SFT, last], evaluate(SFT, last))
    shown = [(e["group"], e["badge"], e["prompt"].split()[1]) for e in examples]
    assert shown == [
        ("Biggest wins", "won", "p7"),
        ("Biggest wins", "won", "p8"),
        ("Biggest losses", "lost", "p20"),
        ("Biggest losses", "lost", "p21"),
        *(("Other prompts", "tied", f"p{i}") for i in range(4)),
    ]
    assert examples[0]["cut_off"] == ["PLaD student"]
    assert examples[0]["students"] == {
        "SFT student": SFT.answers["p7"],
        "PLaD student": mixed["p7"],
    }
    assert [e["reference"] for e in examples[4:6]] == [None, "r"]


def test_examples_of_one_student_are_the_first_prompts():
    examples = example_answers(HELD_OUT, [SFT], evaluate(SFT))
    assert [e["prompt"] for e in examples] == [f"Question p{i}" for i in range(8)]
    assert {(e["group"], e["badge"]) for e in examples} == {("", None)}


@pytest.mark.parametrize(
    ("alpha", "unit"), [(0.0, "nat"), (1.0, "nat per token"), (0.5, "nat per token^0.5")]
)
def test_the_unit_of_margins_follows_the_length_normalisation(alpha, unit):
    assert margin_unit(alpha) == unit
