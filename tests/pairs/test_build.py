"""Preference rows of answers, and what is dropped."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import replace

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.build import PairReport, build_pairs
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.select import PairFilters

CHAT = [{"role": "user", "content": "Hi"}]


def answer(prompt_id, text, finish_reason="stop"):
    return Answer(prompt_id, text, finish_reason, 3)


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

    pairs, report = build_pairs(prompts, teacher, student)
    source = {"source": "teacher > student"}
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
