"""Several samples of a prompt, and answers that cannot be had."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.build import build_pairs
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.given import ColumnModel
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure

PROMPTS = [Prompt(str(i), f"prompt {i}") for i in range(4)]


class Scripted:
    """Answers sample by sample, fails where it is told to, and remembers what it was asked.

    Derived from nothing of ours: what it can do is told by its method.
    """

    name = "scripted"

    def __init__(self, fails=()):
        self.fails = fails
        self.asked = []

    def generate_samples(self, wanted, sampling):
        for prompt, k in wanted:
            self.asked.append((prompt.id, k))
            if (prompt.id, k) in self.fails:
                yield [Failure(prompt.id, f"no luck with {prompt.id}", k)]
            else:
                yield [Answer(prompt.id, f"{prompt.id}/{k}", "stop", 3, k)]


def run(path, model, prompts=PROMPTS, **options):
    return stored_answers(lambda: model, prompts, path, Sampling(**options), fingerprint={})


def texts(answered):
    return {i: [a.text for a in answers] for i, answers in answered.answers.items()}


class Wordy(Scripted):
    """Finishes the answers to some prompts only."""

    def __init__(self, finishes=()):
        super().__init__()
        self.finishes = finishes

    def generate_samples(self, wanted, sampling):
        for batch in super().generate_samples(wanted, sampling):
            yield [
                replace(a, finish_reason="stop" if a.prompt_id in self.finishes else "length")
                for a in batch
            ]


MANY = [Prompt(str(i), f"prompt {i}") for i in range(40)]


def answers_to_many(path, model, n=1, **options):
    return stored_answers(lambda: model, MANY, path, Sampling(9, n=n), fingerprint={}, **options)


@pytest.mark.parametrize("n", [1, 2])
def test_answers_that_are_all_cut_off_end_the_asking_early(n, tmp_path):
    path, wordy = tmp_path / "a.jsonl", Wordy(finishes=("30",))
    message = r"scripted: the answers to the first 16 prompts are all cut off .*--max-new-tokens"
    with pytest.raises(UsageError, match=message):
        answers_to_many(path, wordy, n, to_the_end=True)
    asked = len(wordy.asked)
    assert asked == 15 * n + 1
    # The store is enough to know it.
    with pytest.raises(UsageError, match=message):
        answers_to_many(path, wordy, n, to_the_end=True)
    assert len(wordy.asked) == asked
    # Who can use them goes on with those that came.
    assert len(answers_to_many(path, wordy, n).answers) == 40
    assert len(wordy.asked) == 40 * n


def test_samples_of_a_prompt_that_are_cut_off_are_one_prompt(tmp_path):
    wordy = Wordy(finishes=[p.id for p in MANY[1:]])
    assert len(answers_to_many(tmp_path / "a.jsonl", wordy, 16, to_the_end=True).answers) == 40


@pytest.mark.parametrize(("finished", "warned"), [(3, True), (9, False)])
def test_a_warning_where_most_answers_are_cut_off(finished, warned, tmp_path, caplog):
    model = Wordy(finishes=[p.id for p in MANY[:finished]])
    with caplog.at_level(logging.WARNING, logger="plad_fast"):
        answers_to_many(tmp_path / "a.jsonl", model, to_the_end=True)
    assert ("no answer ended within max_new_tokens=9" in caplog.text) == warned
    assert ("to 13 of the first 16 prompts" in caplog.text) == warned


def test_samples_are_kept_apart_and_in_order(tmp_path):
    answered = run(tmp_path / "a.jsonl", Scripted(), n=3)
    assert texts(answered) == {p.id: [f"{p.id}/{k}" for k in range(3)] for p in PROMPTS}
    assert answered.first["1"].text == "1/0"
    # Fewer are a part of what is stored, and nobody is asked.
    again = Scripted()
    assert texts(run(tmp_path / "a.jsonl", again, n=2))["3"] == ["3/0", "3/1"]
    assert again.asked == []


def test_a_local_model_is_asked_for_the_missing_samples_alone(
    tmp_path, tiny_model, tiny_tokenizer, monkeypatch
):
    model = LocalModel(tiny_model, tiny_tokenizer, "tiny")
    asked = []
    whole = LocalModel.generate_samples

    def spy(self, wanted, sampling):
        asked.append([(prompt.id, k) for prompt, k in wanted])
        return whole(self, wanted, sampling)

    monkeypatch.setattr(LocalModel, "generate_samples", spy)
    options = {"max_new_tokens": 6, "batch_size": 3}
    one = run(tmp_path / "a.jsonl", model, **options)
    three = run(tmp_path / "a.jsonl", model, n=3, **options)
    assert asked[1] == [(p.id, k) for p in PROMPTS for k in (1, 2)]
    assert three.first == one.first
    assert run(tmp_path / "b.jsonl", model, n=3, **options) == three


def test_failures_are_listed_and_asked_again(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    fails = {("1", 0), ("1", 1), ("2", 1)}
    with caplog.at_level(logging.WARNING, "plad_fast"):
        answered = run(path, Scripted(fails), n=2)
    assert "3 answers could not be had" in caplog.text
    assert texts(answered) == {"0": ["0/0", "0/1"], "2": ["2/0"], "3": ["3/0", "3/1"]}
    listed = [json.loads(line) for line in (tmp_path / "a.failed.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in listed] == [("1", 0), ("1", 1), ("2", 1)]
    assert listed[2]["reason"] == "no luck with 2"

    second = Scripted()
    answered = run(path, second, n=2)
    assert second.asked == [("1", 0), ("1", 1), ("2", 1)]
    assert answered.failures == []
    assert texts(answered)["2"] == ["2/0", "2/1"]
    assert not (tmp_path / "a.failed.jsonl").exists()


def test_nothing_but_failures_is_an_error(tmp_path):
    fails = {(p.id, 0) for p in PROMPTS}
    with pytest.raises(UsageError, match="scripted gave no answer; the first failure: no luck"):
        run(tmp_path / "a.jsonl", Scripted(fails))


def test_a_later_sample_of_another_prompt_is_found_too(tmp_path):
    """The first sample failed, so that only the second one's row knows the prompt."""
    run(tmp_path / "a.jsonl", Scripted({("0", 0)}), n=2)
    with pytest.raises(UsageError, match="prompt '0' is not the one that"):
        run(tmp_path / "a.jsonl", Scripted(), [Prompt("0", "edited")], n=2)


def test_no_id_is_that_of_another_prompts_sample(tmp_path):
    """Pairs of every sample have ids with a tab and a number, and are prompts of an evaluation."""
    prompts = [Prompt(i, "same") for i in ("p", "p\t1", "p\t\t1", "p\t", "p\t1\t1")]
    answered = run(tmp_path / "a.jsonl", Scripted(), prompts, n=3)
    assert texts(answered) == {p.id: [f"{p.id}/{k}" for k in range(3)] for p in prompts}


def test_answers_of_another_model_are_refused(tmp_path):
    def ask(model, **options):
        return stored_answers(
            lambda: model, PROMPTS, tmp_path / "a.jsonl", Sampling(),
            **options,
        )  # fmt: skip

    ask(Scripted({("1", 0)}), fingerprint={"model": "old"})
    assert (tmp_path / "a.failed.jsonl").exists()
    again = Scripted()
    with pytest.raises(UsageError, match="model was 'old' and is 'new'"):
        ask(again, fingerprint={"model": "new"})
    (tmp_path / "a.jsonl").unlink()
    ask(again, fingerprint={"model": "new"})
    assert len(again.asked) == len(PROMPTS)
    assert not (tmp_path / "a.failed.jsonl").exists()


class Batches:
    """Answers prompts in batches of two, and can be made to fail; remembers what it was asked."""

    name = "scripted"

    def __init__(self, fail_at=None):
        self.asked = []
        self.fail_at = fail_at

    def generate_samples(self, wanted, sampling):
        for start in range(0, len(wanted), 2):
            if start == self.fail_at:
                raise KeyboardInterrupt
            batch = [prompt for prompt, _ in wanted[start : start + 2]]
            self.asked += [p.id for p in batch]
            yield [Answer(p.id, f"to {p.content}", "stop", 3) for p in batch]


SIX = [Prompt(str(i), f"prompt {i}") for i in range(6)]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = Batches(fail_at=4)
    with pytest.raises(KeyboardInterrupt):
        run(path, first, SIX)
    second = Batches()
    answers = run(path, second, SIX).first
    assert first.asked + second.asked == [p.id for p in SIX]
    assert answers == {p.id: Answer(p.id, f"to prompt {p.id}", "stop", 3) for p in SIX}

    third = Batches()
    assert list(run(path, third, SIX[4:1:-1]).first) == ["4", "3", "2"]
    assert third.asked == []


def test_a_resumed_local_run_equals_an_uninterrupted_one(tmp_path, tiny_model, tiny_tokenizer):
    model = LocalModel(tiny_model, tiny_tokenizer, "tiny")
    options = {"max_new_tokens": 8, "batch_size": 4}
    whole = run(tmp_path / "whole.jsonl", model, SIX, **options)
    run(tmp_path / "parts.jsonl", model, SIX[1:3], **options)
    assert run(tmp_path / "parts.jsonl", model, SIX, **options) == whole


def test_the_bar_counts_prompts_and_goes_to_stderr(tmp_path, capsys):
    stored_answers(Batches, SIX, tmp_path / "answers.jsonl", Sampling(), fingerprint={})
    out, err = capsys.readouterr()
    assert out == ""
    assert "scripted: 100%" in err
    assert "6/6" in err
    assert "prompt/s" in err


def test_answers_to_other_prompts_are_not_taken(tmp_path):
    """Even where all of them are stored and no model is loaded."""
    run(tmp_path / "answers.jsonl", Batches(), SIX[:1])
    with pytest.raises(UsageError, match="prompt '0' is not the one that"):
        run(tmp_path / "answers.jsonl", None, [Prompt("0", "edited")])
    run(tmp_path / "many.jsonl", Batches(), SIX)
    edited = [Prompt(prompt.id, f"edited {prompt.id}") for prompt in SIX[::-1]]
    with pytest.raises(UsageError, match="prompt '5' is not the one that"):  # the first of them
        run(tmp_path / "many.jsonl", None, edited)


def test_repeated_ids_are_refused(tmp_path):
    twice = [SIX[0], SIX[0]]
    with pytest.raises(UsageError, match="used more than once"):
        run(tmp_path / "answers.jsonl", Batches(), twice)
    with pytest.raises(UsageError, match="used more than once"):
        build_pairs(twice, {}, {})


class Thoughtful(Scripted):
    """Thinks aloud."""

    def generate_samples(self, wanted, sampling):
        for batch in super().generate_samples(wanted, sampling):
            yield [replace(answer, text="<think>hm</think>4") for answer in batch]


@pytest.mark.parametrize("count", [3, 40])
def test_thoughts_beside_answers_are_told_once_and_soon(count, tmp_path, caplog):
    run(tmp_path / "a.jsonl", Thoughtful(), MANY[:count])
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith(f"scripted: {min(count, 16)} of {min(count, 16)} answers")
    assert "--reasoning says" in warning


def test_a_store_gives_the_reasoning_in_each_way_that_it_is_asked_for(tmp_path):
    """And asks nobody anew; an answer that ends inside its reasoning counts as cut off."""
    said = {"a": "<think>hm</think>4", "b": "<think>hm", "c": "5", "d": "hm\n</think>\n6"}
    model = ColumnModel(said, "texts")
    prompts = [Prompt(key, key) for key in said]
    expected = {
        "drop": ["4", "<think>hm", "5", "6"],
        "keep": [*said.values()],
        "column": ["4", "<think>hm", "5", "6"],
    }
    for load in (lambda: model, None):
        for reasoning, texts in expected.items():
            found = stored_answers(
                load, prompts, tmp_path / "a.jsonl", Sampling(9), fingerprint={},
                reasoning=reasoning,
            )  # fmt: skip
            first = [*found.first.values()]
            assert [answer.text for answer in first] == texts
            assert [answer.finish_reason for answer in first] == ["stop", "length", "stop", "stop"]
            thoughts = ["hm", "", "", "hm"] if reasoning == "column" else [""] * 4
            assert [answer.reasoning for answer in first] == thoughts
