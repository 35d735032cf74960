"""Pairs and lists that are selected, and pairs that filters leave out: small tables."""

from __future__ import annotations

import math

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.build import build_pairs
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.select import PairFilters, drop_reason

PROMPT = Prompt("p", "Q:\n", reference="gold")


def said(*texts, prompt_id="p"):
    """Samples in order; a text that ends in ~ was cut off, None is missing."""
    return {
        prompt_id: [
            Answer(prompt_id, text.strip("~"), "length" if text.endswith("~") else "stop", 1, k)
            for k, text in enumerate(texts)
            if text is not None
        ]
    }


def scored(**scores):
    return {("p", text): score for text, score in scores.items()}


TEACHER = said("good", "fine", "best")
STUDENT = said("bad", "worst", "lucky")
SCORES = scored(good=3.0, fine=2.0, best=5.0, bad=1.0, worst=-1.0, lucky=9.0)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("teacher", [("good", "bad", 3.0, 1.0, "p")]),
        (
            "all",
            [
                ("good", "bad", 3.0, 1.0, "p"),
                ("good", "worst", 3.0, -1.0, "p\t1"),
                ("good", "lucky", 3.0, 9.0, "p\t2"),
            ],
        ),
        ("best-worst", [("best", "worst", 5.0, -1.0, "p")]),
        ("best-worst-pooled", [("lucky", "worst", 9.0, -1.0, "p")]),
        ("best-worst-student", [("lucky", "worst", 9.0, -1.0, "p")]),
    ],
)
def test_what_is_paired(select, expected):
    rows, report = build_pairs([PROMPT], TEACHER, STUDENT, select=select, scores=SCORES)
    keys = ("chosen", "rejected", "chosen_score", "rejected_score", "id")
    assert [tuple(row[key] for key in keys) for row in rows] == expected
    assert {row["reference"] for row in rows} == {"gold"}
    assert report.kept == report.total == len(expected)


def ranked(teacher, student, scores, **options):
    [row], _ = build_pairs([PROMPT], teacher, student, select="ranked", scores=scores, **options)
    assert set(row) == {"prompt", "responses", "scores", "id", "source", "reference"}
    return row["responses"], row["scores"]


def test_lists_fall_by_score():
    everything = ranked(TEACHER, STUDENT, SCORES)
    assert everything == (
        ["lucky", "best", "good", "fine", "bad", "worst"],
        [9.0, 5.0, 3.0, 2.0, 1.0, -1.0],
    )
    # The best, the worst, and those evenly between.
    assert ranked(TEACHER, STUDENT, SCORES, list_size=3)[0] == ["lucky", "good", "worst"]


def test_ties_keep_the_order_of_the_models():
    """The teacher's first, which is what distillation takes for granted, then by sample."""
    tied = dict.fromkeys(SCORES, 1.0)
    expected = ["good", "fine", "best", "bad", "worst", "lucky"]
    assert ranked(TEACHER, STUDENT, tied)[0] == expected
    [pair], _ = build_pairs([PROMPT], TEACHER, STUDENT, select="best-worst-pooled", scores=tied)
    assert (pair["chosen"], pair["rejected"]) == ("good", "lucky")
    [own], _ = build_pairs(
        [PROMPT], TEACHER, STUDENT, select="best-worst-student", scores={**tied, ("p", "bad"): 2.0}
    )
    assert (own["chosen"], own["rejected"]) == ("bad", "lucky")


def test_a_gap_drops_ties_and_near_ties_from_lists():
    scores = {**SCORES, ("p", "fine"): 2.5, ("p", "bad"): 2.5}
    gap = PairFilters(min_gap=0.5)
    texts = ranked(TEACHER, STUDENT, scores, filters=gap, list_size=5)[0]
    assert texts == ["lucky", "best", "good", "fine", "worst"]
    with pytest.raises(UsageError, match="1 close; lower min_gap"):
        ranked(TEACHER, STUDENT, scores, filters=gap, list_size=6)
    assert ranked(TEACHER, STUDENT, scores, filters=gap)[0] == texts


def test_unusable_answers_are_never_selected():
    """They have no score either: nobody asks a judge about an answer that was cut off."""
    teacher, student = said("great~", "good", "good "), said(" ", "bad", None, "worst~")
    scores = scored(good=3.0, bad=1.0)
    for select in ("best-worst", "best-worst-pooled"):
        [row], _ = build_pairs([PROMPT], teacher, student, select=select, scores=scores)
        assert (row["chosen"], row["rejected"]) == ("good", "bad")
    assert ranked(teacher, student, scores, list_size=2)[0] == ["good", "bad"]
    with pytest.raises(UsageError, match="1 few; lower list_size"):
        ranked(teacher, student, scores, list_size=3)
    assert ranked(teacher, student, scores)[0] == ["good", "bad"]


@pytest.mark.parametrize(
    ("repeating", "size", "kept"),
    [(0, 4, 10), (1, 4, 9), (2, 4, 8), (3, 3, 10), (5, 3, 10), (10, 3, 10)],
)
def test_lists_are_as_long_as_keeps_the_most_answers(repeating, size, kept):
    """Of ten prompts with four answers each, some have one that repeats another: in place of
    4 * (10 - repeating) answers, lists of three hold 3 * 10."""
    prompts = [Prompt(str(i), "Q") for i in range(10)]
    teacher, student, scores = {}, {}, {}
    for i, prompt in enumerate(prompts):
        teacher |= said("a", "b", prompt_id=prompt.id)
        student |= said("c", "a" if i < repeating else "d", prompt_id=prompt.id)
        scores |= {(prompt.id, text): -float(ord(text)) for text in "abcd"}
    rows, report = build_pairs(prompts, teacher, student, select="ranked", scores=scores)
    assert {len(row["responses"]) for row in rows} == {size}
    assert (report.total, report.kept) == (10, kept)


@pytest.mark.parametrize(
    ("select", "teacher", "student", "scores", "reason"),
    [
        ("best-worst", said("a"), said("b~"), scored(a=1.0), "truncated"),
        ("best-worst", said(""), said("b"), scored(b=1.0), "empty"),
        ("best-worst", said("a"), {}, scored(a=1.0), "missing"),
        ("best-worst", said("a"), said("a"), scored(a=1.0), "identical"),
        ("best-worst", said("a"), said("b", "c"), scored(a=1.0, b=0.0), "unscored"),
        ("best-worst-pooled", said("a"), said("a"), scored(a=1.0), "identical"),
        ("best-worst-pooled", {}, {}, {}, "missing"),
        ("best-worst-student", said("a"), said("b"), scored(a=1.0, b=0.0), "identical"),
        ("best-worst-student", said("a"), said("b~"), scored(a=1.0), "truncated"),
        ("best-worst-student", said("a"), {}, scored(a=1.0), "missing"),
        ("teacher", said("a"), said("b"), scored(a=1.0, b=math.nan), "unscored"),
        ("all", said("a"), {}, None, "missing"),
        ("ranked", said("a"), said("b"), scored(a=1.0), "unscored"),
        ("ranked", {}, {}, {}, "missing"),
    ],
)
def test_why_there_is_no_pair(select, teacher, student, scores, reason):
    with pytest.raises(UsageError, match=f"^no pair is left: kept 0 of 1 pa?.*: 1 {reason}; "):
        build_pairs([PROMPT], teacher, student, select=select, scores=scores)


WORDS = "one two three four five six"


@pytest.mark.parametrize(
    ("filters", "chosen", "rejected", "gap", "reason"),
    [
        ({}, "a", "a b c d e", -1.0, None),
        ({"contradicted": True}, "a", "b", -0.1, "contradicted"),
        ({"contradicted": True}, "a", "b", 0.0, None),
        ({"min_gap": 0.5}, "a", "b", 0.4, "close"),
        ({"min_gap": 0.5}, "a", "b", 0.5, None),
        ({"min_gap": 0.5}, "a", "b", -3.0, "close"),
        ({"min_gap": 0.5, "contradicted": True}, "a", "b", -3.0, "contradicted"),
        ({"max_length_ratio": 3}, "a b", WORDS, None, None),
        ({"max_length_ratio": 2.9}, "a b", WORDS, None, "uneven"),
        ({"max_length_ratio": 2.9}, WORDS, "a b", None, "uneven"),
        ({"max_length_ratio": 9}, "a", "...", None, "uneven"),  # no word at all
        # 9 4-grams, of which 3 came before
        ({"max_repetition": 0.33}, WORDS + " " + WORDS, "b", None, "repetitive"),
        ({"max_repetition": 0.34}, WORDS + " " + WORDS, "b", None, None),
        ({"max_repetition": 0.33}, "b", WORDS + " " + WORDS, None, None),
        ({"max_overlap": 0.8}, WORDS, "Six! five four three, two one", None, "similar"),
        ({"max_overlap": 0.8}, "a a a a b", "a a a a c", None, None),  # 8 of 10
        ({"max_overlap": 0.79}, "a a a a b", "a a a a c", None, "similar"),
        ({"max_overlap": 0.2}, "a a a a", "a", None, "similar"),  # 2 of 5
    ],
)
def test_filters(filters, chosen, rejected, gap, reason):
    assert PairFilters(**filters).reason(chosen, rejected, gap) == reason


def test_every_reason_is_counted_and_has_advice():
    prompts = [Prompt(name, "Q") for name in ("kept", "contradicted", "close", "uneven")]
    teacher = {p.id: Answer(p.id, "good", "stop", 1) for p in prompts}
    student = {p.id: Answer(p.id, "bad", "stop", 1) for p in prompts}
    student["uneven"] = Answer("uneven", WORDS, "stop", 1)
    gaps = {"kept": 1.0, "contradicted": -1.0, "close": 0.1, "uneven": 1.0}
    scores = {(p.id, "good"): gaps[p.id] for p in prompts}
    scores |= {(p.id, student[p.id].text): 0.0 for p in prompts}
    filters = PairFilters(contradicted=True, min_gap=0.5, max_length_ratio=2)
    options = {"scores": scores, "filters": filters}
    rows, report = build_pairs(prompts, teacher, student, **options)
    assert [row["id"] for row in rows] == ["kept"]
    assert (report.total, report.dropped) == (4, {"contradicted": 1, "close": 1, "uneven": 1})
    assert str(report) == "kept 1 of 4 prompts: 1 contradicted, 1 close, 1 uneven"
    for prompt in prompts[1:]:
        with pytest.raises(UsageError, match=f": 1 {prompt.id}; [a-z]"):
            build_pairs([prompt], teacher, student, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "random"}, "unknown selection 'random'; known: teacher, all"),
        ({"select": "best-worst"}, "needs scores of the answers; choose a scorer"),
        ({"filters": PairFilters(min_gap=0.0)}, "a filter by score needs scores"),
        ({"list_size": 3}, "list_size is 3 with selection 'teacher'"),
        ({"select": "ranked", "scores": {}, "list_size": 1}, "list_size is 1"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UsageError, match=message):
        build_pairs([PROMPT], TEACHER, STUDENT, **options)


@pytest.mark.parametrize(
    "options", [{"min_gap": -1}, {"max_length_ratio": 0.5}, {"max_overlap": math.nan}]
)
def test_filters_out_of_range(options):
    with pytest.raises(UsageError, match=f"{next(iter(options))} must be from"):
        PairFilters(**options)


def answer(prompt_id, text, finish_reason="stop"):
    return Answer(prompt_id, text, finish_reason, 3)


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
    ],
)
def test_drop_reason(teacher, student, expected):
    assert drop_reason(teacher, student) == expected
