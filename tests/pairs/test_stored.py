"""Scores that outlive a killed run."""

from __future__ import annotations

import json
import math

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.scorers import Length
from plad_fast.pairs.scoring.stored import score_answers, stored_scores

PROMPTS = [Prompt("a", "Say something"), Prompt("b", "Hi")]


class Scripted:
    """Counts words, remembers what it was asked, and can be made to fail or to be killed.

    A relative one counts the answers to a prompt.
    """

    name = "scripted"
    uses_reference = False
    check = Length().check

    def __init__(self, relative=False, kill_at=None, mute=()):
        self.relative = relative
        self.kill_at = kill_at
        self.mute = mute
        self.asked = []

    def settings(self):
        return {"scorer": self.name}

    def score(self, items):
        if len(self.asked) == self.kill_at:
            raise KeyboardInterrupt
        self.asked.append([text for _, text in items])
        scores = Length().score(items)
        if self.relative:
            ids = [prompt.id for prompt, _ in items]
            scores = [ids.count(prompt_id) for prompt_id in ids]
        return [math.nan if t in self.mute else s for (_, t), s in zip(items, scores, strict=True)]


def many(n=4):
    """Two answers to each of n prompts, first all first ones."""
    return [(Prompt(f"{i}", f"prompt {i}"), f"{i} " * k) for k in (1, 2) for i in range(n)]


@pytest.mark.parametrize("damage", [{}, {"score": None}, {"score": "1.0"}, {"score": True}])
def test_a_stored_line_that_is_no_score_is_refused(damage, tmp_path):
    path = tmp_path / "scores.jsonl"
    stored_scores(Scripted(), many(), path)
    header, line, *_ = path.read_text().splitlines()
    damaged = json.dumps({"id": json.loads(line)["id"], **damage})
    path.write_text(f"{header}\n{damaged}\n")
    with pytest.raises(UsageError, match="damaged; delete that line"):
        stored_scores(Scripted(), many(), path)


def test_a_killed_run_goes_on_in_the_same_batches(tmp_path):
    """Not even the rounding of a batch then tells where it was killed."""
    path = tmp_path / "scores.jsonl"
    whole = Scripted()
    scores = stored_scores(whole, many(), tmp_path / "whole.jsonl", batch_size=4)
    assert scores == [1.0] * 4 + [2.0] * 4
    assert whole.asked == [["0 ", "0 0 ", "1 ", "1 1 "], ["2 ", "2 2 ", "3 ", "3 3 "]]
    with pytest.raises(KeyboardInterrupt):
        stored_scores(Scripted(kill_at=1), many(), path, batch_size=4)
    # As if killed while writing: the last line is lost, and the one before it is cut.
    path.write_bytes(path.read_bytes()[:-100])
    second = Scripted()
    assert stored_scores(second, many(), path, batch_size=4) == scores
    assert second.asked == whole.asked
    third = Scripted()
    assert stored_scores(third, many(), path) == scores
    assert third.asked == []
    lines = [p.read_text().splitlines() for p in (path, tmp_path / "whole.jsonl")]
    assert lines[0] == lines[1]
    assert json.loads(lines[0][1])["prompt"] == "0"


def test_a_score_belongs_to_the_texts_not_to_the_ids(tmp_path):
    path = tmp_path / "scores.jsonl"
    stored_scores(Scripted(), [(Prompt("a", "p"), "x y")], path)
    edited = Scripted()
    stored_scores(edited, [(Prompt("a", "q"), "x y"), (Prompt("a", "q"), "x y")], path)
    assert edited.asked == [["x y"]]
    edited.name = "other"
    with pytest.raises(UsageError, match="scorer was 'scripted' and is 'other'"):
        stored_scores(edited, many(), path)


def test_relative_scores_are_asked_for_anew_when_a_rival_comes(tmp_path):
    path = tmp_path / "scores.jsonl"
    assert stored_scores(Scripted(relative=True), many(), path) == [2] * 8
    scorer = Scripted(relative=True)
    more = [*many(), (Prompt("3", "prompt 3"), "new")]
    assert stored_scores(scorer, more, path, batch_size=1) == [2, 2, 2, 3] * 2 + [3]
    assert scorer.asked == [["3 ", "3 3 ", "new"]]


def test_what_could_not_be_had_is_tried_again_by_another_run(tmp_path):
    path = tmp_path / "scores.jsonl"
    scores = stored_scores(Scripted(mute=["2 "]), many(), path)
    assert math.isnan(scores[2])
    assert sum(map(math.isnan, scores)) == 1
    again = Scripted()
    assert stored_scores(again, many(), path) == [1.0] * 4 + [2.0] * 4
    assert len(again.asked) == 1


def test_answers_that_make_no_pair_are_not_scored(tmp_path, capsys):
    teacher = {"a": [Answer("a", "one two", "stop", 2)], "b": [Answer("b", "cut", "length", 1)]}
    student = {"a": [Answer("a", "", "stop", 1), Answer("a", "one", "stop", 2, sample=1)]}
    scorer = Scripted()
    scores = score_answers(scorer, PROMPTS, [teacher, student], tmp_path / "scores.jsonl")
    assert scores == {("a", "one two"): 2.0, ("a", "one"): 1.0}
    assert scorer.asked == [["one two", "one"]]
    assert "scripted: 100%" in capsys.readouterr().err
