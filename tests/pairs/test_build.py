"""Pairs of stored answers: resuming, what is dropped, and the format of the rows."""

from __future__ import annotations

import dataclasses
import functools
import types
from dataclasses import replace

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.pairs.build import PairReport, build_pairs
from plad_fast.pairs.filters import PairFilters, drop_reason
from plad_fast.pairs.generation.answering import generate_answers, stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer

CHAT = [{"role": "user", "content": "Hi"}]


def answer(prompt_id, text, finish_reason="stop"):
    return Answer(prompt_id, text, finish_reason, 3)


class Scripted:
    """Answers prompts in batches of two, and can be made to fail; remembers what it was asked."""

    name = "scripted"

    def __init__(self, fail_at=None, mute=()):
        self.asked = []
        self.fail_at = fail_at
        self.mute = mute

    def generate(self, prompts, sampling):
        for start in range(0, len(prompts), 2):
            if start == self.fail_at:
                raise KeyboardInterrupt
            batch = [p for p in prompts[start : start + 2] if p.id not in self.mute]
            self.asked += [p.id for p in batch]
            yield [answer(p.id, f"to {p.content}") for p in batch]


PROMPTS = [Prompt(str(i), f"prompt {i}") for i in range(6)]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = Scripted(fail_at=4)
    with RowStore.open(path, {}) as store, pytest.raises(KeyboardInterrupt):
        generate_answers(first, PROMPTS, store, Sampling(), progress=False)
    second = Scripted()
    with RowStore.open(path, {}) as store:
        answers = generate_answers(second, PROMPTS, store, Sampling(), progress=False).first
    assert first.asked + second.asked == [p.id for p in PROMPTS]
    assert answers == {p.id: answer(p.id, f"to prompt {p.id}") for p in PROMPTS}

    third = Scripted()
    with RowStore.open(path, {}) as store:
        assert list(generate_answers(third, PROMPTS[4:1:-1], store, Sampling()).first) == [
            "4",
            "3",
            "2",
        ]
    assert third.asked == []


def test_a_resumed_local_run_equals_an_uninterrupted_one(tmp_path, tiny_model, tiny_tokenizer):
    model = LocalModel(tiny_model, tiny_tokenizer, "tiny")
    sampling = Sampling(max_new_tokens=8, batch_size=4)
    with RowStore.open(tmp_path / "whole.jsonl", {}) as store:
        whole = generate_answers(model, PROMPTS, store, sampling, progress=False)
    with RowStore.open(tmp_path / "parts.jsonl", {}) as store:
        generate_answers(model, PROMPTS[1:3], store, sampling, progress=False)
        assert generate_answers(model, PROMPTS, store, sampling, progress=False) == whole


def test_the_bar_counts_prompts_and_goes_to_stderr(tmp_path, capsys):
    with RowStore.open(tmp_path / "answers.jsonl", {}) as store:
        generate_answers(Scripted(), PROMPTS, store, Sampling())
    out, err = capsys.readouterr()
    assert out == ""
    assert "scripted: 100%" in err
    assert "6/6" in err
    assert "prompt/s" in err


def test_answers_to_other_prompts_are_not_taken(tmp_path):
    with RowStore.open(tmp_path / "answers.jsonl", {}) as store:
        generate_answers(Scripted(), PROMPTS[:1], store, Sampling(), progress=False)
        with pytest.raises(UsageError, match="prompt '0' is not the one that"):
            generate_answers(Scripted(), [Prompt("0", "edited")], store, Sampling())


def test_nor_where_all_of_them_are_stored(tmp_path):
    """No model is loaded then, but the prompts are compared all the same."""
    ask = functools.partial(
        stored_answers,
        Scripted,
        path=tmp_path / "answers.jsonl",
        sampling=Sampling(),
        fingerprint={},
        progress=False,
    )
    ask(PROMPTS[:1])
    with pytest.raises(UsageError, match="prompt '0' is not the one that"):
        ask([Prompt("0", "edited")])


def test_repeated_ids_are_refused(tmp_path):
    twice = [PROMPTS[0], PROMPTS[0]]
    with (
        RowStore.open(tmp_path / "answers.jsonl", {}) as store,
        pytest.raises(UsageError, match="used more than once"),
    ):
        generate_answers(Scripted(), twice, store, Sampling())
    with pytest.raises(UsageError, match="used more than once"):
        build_pairs(twice, {}, {})


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (answer("p", "a"), answer("p", "b"), None),
        (answer("p", "a"), answer("p", "A"), None),
        (answer("p", "a  b\n"), answer("p", " a b"), "identical"),
        (answer("p", " \n"), answer("p", "b"), "empty"),
        (answer("p", "a"), answer("p", "\u200b \ufeff\u2060"), "empty"),  # nothing to be seen
        (answer("p", "a"), answer("p", "", "length"), "empty"),
        (answer("p", "a", "length"), answer("p", "b"), "truncated"),
        (answer("p", "a"), answer("p", "b", "length"), "truncated"),
        (answer("p", "a"), None, "missing"),
        (None, answer("p", "b"), "missing"),
    ],
)
def test_drop_reason(teacher, student, expected):
    assert drop_reason(teacher, student) == expected


def test_pairs_and_report():
    prompts = [
        Prompt("text", "Q:", reference="gold"),
        Prompt("space", "Q:\n"),
        Prompt("chat", CHAT),
        Prompt("same", "Q"),
        Prompt("cut", "Q"),
        Prompt("cut2", "Q"),
        Prompt("unanswered", "Q"),
    ]
    teacher = {p.id: answer(p.id, "good ") for p in prompts}
    student = {p.id: answer(p.id, "bad") for p in prompts if p.id != "unanswered"}
    student["same"] = answer("same", "good")
    teacher["cut"] = answer("cut", "good", "length")
    student["cut2"] = answer("cut2", "bad", "length")

    pairs, report = build_pairs(prompts, teacher, student, source="big > small")
    source = {"source": "big > small"}
    assert pairs == [
        {"prompt": "Q:", "chosen": " good", "rejected": " bad", "id": "text", **source}
        | {"reference": "gold"},
        {"prompt": "Q:\n", "chosen": "good", "rejected": "bad", "id": "space", **source},
        {
            "prompt": CHAT,
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
            "id": "chat",
            **source,
        },
    ]
    assert report.dropped == {"missing": 1, "truncated": 2, "identical": 1}
    assert str(report) == "kept 3 of 7 prompts: 1 missing, 2 truncated, 1 identical"
    assert str(PairReport(5)) == "kept 5 of 5 prompts"
    assert list(report.drops) == [
        {"id": "same", "prompt": "Q", "teacher": "good ", "student": "good", "reason": "identical"},
        {"id": "cut", "prompt": "Q", "teacher": "good", "student": "bad", "reason": "truncated",
         "of": ["teacher"]},
        {"id": "cut2", "prompt": "Q", "teacher": "good ", "student": "bad", "reason": "truncated",
         "of": ["student"]},
        {"id": "unanswered", "prompt": "Q", "teacher": "good ", "student": None,
         "reason": "missing", "of": ["student"]},
    ]  # fmt: skip
    assert report.funnel() == [
        ("prompts", 7, {}),
        ("answered", 6, {"missing": 1}),
        ("finished", 4, {"truncated": 2}),
        ("paired", 3, {"identical": 1}),
        ("kept", 3, {}),
    ]
    later = {"id": "x", "reason": "of a later version"}
    assert PairReport(3, [*report.drops, later]).dropped == report.dropped


def test_what_is_dropped_of_several_samples():
    """A record a pair where every sample gives one, else a record a prompt with all answers."""
    teacher = {"p": [answer("p", "good"), answer("p", "fine")], "q": [answer("q", "good")]}
    student = {
        "p": [answer("p", "bad"), replace(answer("p", "good"), sample=1)],
        "q": [answer("q", "bad", "length"), replace(answer("q", ""), sample=1)],
    }
    prompts = [Prompt("p", "P"), Prompt("q", "Q")]
    pairs, report = build_pairs(prompts, teacher, student, select="all")
    assert [pair["id"] for pair in pairs] == ["p"]
    assert [(d["id"], d["student"], d["reason"]) for d in report.drops] == [
        ("p\t1", "good", "identical"),
        ("q", "bad", "truncated"),
        ("q\t1", "", "empty"),
    ]
    invisible = {"q\t1": [answer("q\t1", "\u200b"), answer("q\t1", "\u2060")]}
    with pytest.raises(UsageError, match="2 empty") as caught:
        build_pairs([Prompt("q\t1", "Q")], {"q\t1": [answer("q\t1", "good")]}, invisible,
                    select="all")  # fmt: skip
    assert [(d["id"], d["of"]) for d in caught.value.report.drops] == [("q\t\t1", ["student"])] * 2
    assert report.funnel()[0] == ("pairs", 4, {})
    scores = {("p", "good"): 1.0, ("p", "fine"): 0.0, ("p", "bad"): 2.0, ("q", "good"): 1.0}
    filters = PairFilters(contradicted=True)
    with pytest.raises(UsageError, match="no pair is left") as caught:
        build_pairs(prompts, teacher, {**student, "p": student["p"][:1]}, select="best-worst",
                    scores=scores, filters=filters)  # fmt: skip
    first, second = caught.value.report.drops
    assert (first["teacher"], first["student"]) == (["good", "fine"], "bad")
    assert (first["reason"], second["reason"]) == ("contradicted", "truncated")


def test_pairs_of_prompts_with_tabs_in_their_ids_have_ids_of_their_own():
    """Behind the prompt's id stands, after a tab, the number of the sample."""
    prompts = [Prompt(key, f"{key}?") for key in ("a", "a\t1", "a\t\t1", "a\t")]
    teacher = {p.id: answer(p.id, "good") for p in prompts}
    student = {p.id: [answer(p.id, text) for text in ("x", "y", "z")] for p in prompts}
    for answers in student.values():
        answers[:] = [dataclasses.replace(a, sample=k) for k, a in enumerate(answers)]
    pairs, _ = build_pairs(prompts, teacher, student, select="all")
    assert len({pair["id"] for pair in pairs}) == len(pairs) == 12


def test_a_chat_template_makes_messages_of_text(tiny_tokenizer):
    answers = {"p": answer("p", "good")}, {"p": answer("p", "bad")}
    (pair,), _ = build_pairs([Prompt("p", "Hi")], *answers, tokenizer=tiny_tokenizer)
    assert pair["prompt"] == CHAT
    assert pair["chosen"] == [{"role": "assistant", "content": "good"}]
    bare = types.SimpleNamespace(chat_template=None)
    (pair,), _ = build_pairs([Prompt("p", "Hi")], *answers, tokenizer=bare)
    assert (pair["prompt"], pair["rejected"]) == ("Hi", " bad")


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (answer("p", "a", "length"), answer("p", "b"), "1 truncated; raise max_new_tokens"),
        (answer("p", "a"), answer("p", "a"), "1 identical; give the student another seed"),
        (answer("p", ""), answer("p", "a"), "1 empty; check that the prompts fit"),
    ],
)
def test_no_pair_left_says_why_and_what_to_do(teacher, student, expected):
    with pytest.raises(UsageError) as caught:
        build_pairs([Prompt("p", "Q")], {"p": teacher}, {"p": student})
    assert str(caught.value).startswith("no pair is left: kept 0 of 1 prompts: ")
    assert expected in str(caught.value)


def test_nothing_to_pair():
    with pytest.raises(UsageError, match="1 missing; let both models answer"):
        build_pairs([Prompt("p", "Q")], {}, {})
    with pytest.raises(UsageError, match="give at least one prompt"):
        build_pairs([], {}, {})
