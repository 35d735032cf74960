"""Measures and functions as scorers, and scorers by name."""

from __future__ import annotations

import json

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.scoring.scorers import FunctionScorer, Rouge, open_scorer
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


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("rouge1", [2 * 1 * 0.5 / 1.5, 0, 0, 1]),
        ("rouge2", [2 * 1 * (1 / 3) / (4 / 3), 0, 0, 1 / 3]),  # of down sat|sat the|the cat
        ("rougeL", [2 * 1 * 0.5 / 1.5, 0, 0, 0.5]),  # the cat
        ("length", [2, 12, 1, 4]),
        ("brevity", [-2, -12, -1, -4]),
    ],
)
def test_text_scores_by_hand(spec, expected):
    assert open_scorer(spec).score(ITEMS) == pytest.approx(expected)


def test_scores_do_not_depend_on_what_is_scored_with_them():
    """ROUGE picks its words by the script of all references that it is given at once."""
    cyrillic = (Prompt("c", "?", "кот сел"), "кот")
    scorer = Rouge("rouge1")
    assert scorer.score([cyrillic, *ITEMS]) == scorer.score([cyrillic]) + scorer.score(ITEMS)


def test_references_are_missed_before_any_work(tmp_path):
    lacking = [*ITEMS, (Prompt("c", "?"), "x")]
    with pytest.raises(UsageError, match=r"1 of 5 prompts have no reference, the first is 'c'"):
        stored_scores(Rouge("rouge1"), lacking, tmp_path / "scores.jsonl")
    assert not list(tmp_path.iterdir())


def vowels(prompt, answer, reference):
    """A scorer as a user would write it; the tests name it by its path."""
    assert (prompt, reference) in [(p.content, p.reference) for p in PROMPTS]
    return sum(letter in "aeiou" for letter in answer)


def test_functions_by_path():
    scorer = open_scorer(f"python:{__name__}.vowels")
    assert scorer.score(ITEMS[2:]) == [1, 4]
    assert len(scorer.settings()["source"]) == 16
    with pytest.raises(UsageError, match="gave None for an answer"):
        FunctionScorer(lambda *_: None).score(ITEMS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rouge3", "unknown scorer 'rouge3'; known: rouge1"),
        ("judge:openai", "unknown scorer"),
        ("reward:", "unknown scorer"),
        ("python:nowhere.f", "cannot import nowhere for python:nowhere.f"),
        ("python:math.nothing", "math has no function 'nothing'"),
        ("python:f", "names no module"),
    ],
)
def test_unknown_scorers(spec, message):
    with pytest.raises(UsageError, match=message):
        open_scorer(spec)


def test_a_judge_by_name_keeps_no_key(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("SOME_KEY", "sk-planted")
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "SOME_KEY"}
    judge = open_scorer("judge:openai:big:1b", endpoint=endpoint, criteria="Be brief.")
    settings = judge.settings()
    assert settings["judge"]["model"] == judge.name == "big:1b"
    assert settings["criteria"] == "Be brief."
    assert "planted" not in json.dumps(settings)
    assert "planted" not in repr(vars(judge))
    own = open_scorer("judge:openai:big@http://127.0.0.1:8/v1", endpoint=endpoint).settings()
    assert own["judge"]["model"] == "big"
    assert (settings["judge"]["base_url"], own["judge"]["base_url"]) == (
        "http://127.0.0.1:9/v1",
        "http://127.0.0.1:8/v1",
    )
