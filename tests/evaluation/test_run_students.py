"""Evaluation of saved models: samples, scores, and what is stored of them."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from plad_fast.data.prompts import Prompt, as_messages
from plad_fast.errors import UsageError
from plad_fast.evaluation import run_students as module
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.run_students import (
    evaluate_models,
    file_stem,
    scorer_file,
    student_files,
)
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.response_scores import score_responses
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.scoring.scorers import FunctionScorer

SAMPLING = Sampling(max_new_tokens=60, temperature=1.0, seed=3)
PROMPTS = [Prompt(f"p{i}", f"Say {word}") for i, word in enumerate(("hello", "no", "stop"))]
TEACHER = {"p0": "hello there", "p1": "no", "p2": "stop now"}
PAIRS = [
    {
        "id": prompt.id,
        "prompt": [{"role": "user", "content": prompt.content}],
        "chosen": TEACHER[prompt.id],
        "rejected": "hm",
    }
    for prompt in PROMPTS
]
HELD_OUT = HeldOut(PROMPTS, TEACHER, PAIRS, [prompt.id for prompt in PROMPTS])


def evaluate(folder, model, **options):
    return evaluate_models(
        {"SFT": model, "PLaD": model},
        HELD_OUT,
        folder,
        **{"sampling": SAMPLING, "precision": "float32", "calibration_samples": 3} | options,
    )


@pytest.fixture(scope="module")
def finished(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, *evaluate(folder, tiny_teacher)


def answers(folder):
    """Prompt id -> (text, finished) of each sample, from the store."""
    rows = [json.loads(line) for line in (folder / "sft-sampled.jsonl").read_text().splitlines()]
    found = {prompt.id: [] for prompt in PROMPTS}
    for row in sorted(rows[1:], key=lambda row: row.get("sample", 0)):
        found[row["id"].split("\t")[0]].append((row["text"], row["finish_reason"] == "stop"))
    return found


def test_samples_are_scored_as_they_were_given(finished, tiny_teacher):
    """Per token, in float32, after the prompt in the form in which the student was asked."""
    folder, results, _ = finished
    tokenizer = load_tokenizer(tiny_teacher)
    by_prompt = answers(folder)
    assert all(len(samples) == 3 for samples in by_prompt.values())
    kept = [[text for text, whole in by_prompt[p.id] if whole and text] for p in PROMPTS]
    row = results["calibration"]["students"][0]
    assert row["n_samples"] == sum(map(len, kept)) > 4
    assert row["n_unfinished"] == 9 - row["n_samples"]
    texts = [list(dict.fromkeys([*k, TEACHER[p.id]])) for k, p in zip(kept, PROMPTS, strict=True)]
    expected = score_responses(
        load_model(tiny_teacher, dtype="float32"),
        tokenizer,
        [(as_messages(tokenizer, p.content), t) for p, t in zip(PROMPTS, texts, strict=True)],
        length_normalization=1.0,
        progress=False,
    )
    record = json.loads(student_files("SFT", folder).calibration.read_text())
    for stored, computed in zip(record["scores"]["logps"], expected, strict=True):
        assert stored == pytest.approx(computed.tolist(), rel=1e-4)
    assert results["calibration"]["quality"] == "ROUGE-L to the teacher's answer"
    assert results["calibration"]["samples"] == 3


def test_one_model_under_two_names_is_as_calibrated_as_itself(finished):
    (change,) = finished[1]["calibration"]["comparisons"]
    assert (change["candidate"], change["baseline"]) == ("PLaD", "SFT")
    intervals = [value for value in change.values() if isinstance(value, dict)]
    assert intervals
    assert all(value["mean"] == value["low"] == value["high"] == 0.0 for value in intervals)


def test_a_finished_evaluation_needs_no_model(finished, tiny_teacher, monkeypatch):
    folder, results, _ = finished
    monkeypatch.setattr(module, "load_model", None)
    assert evaluate(folder, tiny_teacher)[0] == results


def test_a_killed_evaluation_goes_on(finished, tiny_teacher, tmp_path, monkeypatch):
    """What the first student's samples scored is kept, and the end is that of a run left alone."""
    calls = []

    def score(*arguments, **options):
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_responses(*arguments, **options)

    monkeypatch.setattr(module, "score_responses", score)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, tiny_teacher)
    first = student_files("SFT", tmp_path).calibration
    assert first.is_file()
    assert not student_files("PLaD", tmp_path).calibration.exists()
    assert evaluate(tmp_path, tiny_teacher)[0] == finished[1]
    assert len(calls) == 3


def test_calibration_changes_nothing_else(finished, tiny_teacher, tmp_path):
    """More samples add to the first one, which alone is compared with the teacher's answer."""
    results, _ = evaluate(tmp_path, tiny_teacher, calibration_samples=0)
    assert results["calibration"] is None
    assert not student_files("SFT", tmp_path).calibration.exists()
    assert results == {**finished[1], "calibration": None}
    assert {k: v[:1] for k, v in answers(finished[0]).items()} == answers(tmp_path)


def test_stored_log_probabilities_of_other_answers_are_refused(tiny_teacher, finished, tmp_path):
    student_files("SFT", tmp_path).calibration.write_bytes(
        student_files("SFT", finished[0]).calibration.read_bytes()
    )
    with pytest.raises(UsageError, match=r"texts was .* answers, .*--overwrite"):
        evaluate(tmp_path, tiny_teacher, sampling=Sampling(60, seed=4))


def test_scorers_are_asked_once(finished, tiny_teacher, tmp_path):
    """For wins and for calibration; what they said is kept line by line."""
    asked = []

    def shortness(prompt, text, reference):
        asked.append((prompt, text))
        return -float(len(text))

    scorer = FunctionScorer(shortness, "Shortness / 1")
    options = {"scorers": {"brief": scorer}, "calibration_scorer": scorer}
    results, _ = evaluate(tmp_path, tiny_teacher, **options)
    assert results["calibration"]["quality"] == "Shortness / 1"
    teacher = results["teacher"]["scores"]["brief"]["score"]["mean"]
    assert teacher == pytest.approx(-np.mean([len(text) for text in TEACHER.values()]))
    assert scorer_file("Shortness / 1", tmp_path).name == "scores-shortness-1.jsonl"
    count = len(asked)
    assert count == len(set(asked))
    assert evaluate(tmp_path, tiny_teacher, **options)[0] == results
    assert len(asked) == count


def test_a_student_that_never_ends_has_no_calibration(tiny_teacher, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        results, outputs = evaluate(tmp_path, tiny_teacher, sampling=Sampling(1, seed=0))
    assert results["calibration"] is None
    rows = student_files("SFT", tmp_path).greedy.read_text().splitlines()[1:]
    unfinished = {row["id"] for row in map(json.loads, rows) if row["finish_reason"] == "length"}
    assert outputs[0].cut_off == unfinished != set()
    assert "finished none of its samples" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_samples": 1}, "calibration_samples is 1; it takes 2 or more"),
        ({"sampling": Sampling(8, temperature=0.0)}, "temperature above 0"),
    ],
)
def test_bad_input_is_refused_before_any_model_runs(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(module, "load_tokenizer", None)
    with pytest.raises(UsageError, match=message):
        evaluate(tmp_path, tmp_path, **options)


def test_no_two_names_share_a_file(tmp_path):
    """Files are named after students and scorers, and end in what is in them."""
    students = ["a", "a-samples", "a-greedy", "a-calibration", "a-logps", "a-sampled", "b.failed"]
    files = [file for name in students for file in student_files(name, tmp_path)]
    files += [scorer_file(name, tmp_path) for name in ("greedy", "a", "length-sampled")]
    assert len({file.name for file in files}) == len(files)


def test_names_that_a_file_system_may_confuse_have_one_file():
    assert {file_stem(name) for name in ("A b", "a-B", "a  b ", "a/b", "a?b")} == {"a-b"}
    assert file_stem("e\u0301") == file_stem("\u00c9")
    assert file_stem("学生") == "学生"
