"""The comparison as plain text for a terminal."""

from __future__ import annotations

import re
from dataclasses import replace

from plad_fast.evaluation.report.terminal import comparison_table
from plad_fast.evaluation.students import StudentOutputs
from tests.support.evaluations import PLAD, SFT, Words, calibration, evaluate, samples

PROMPTS = dict.fromkeys(SFT.answers, "q")


def test_table_says_who_won_and_by_which_scorer():
    text = comparison_table(evaluate(SFT, PLAD, scorers={"s" * 50: Words()}, prompts=PROMPTS))
    assert re.search(r"win rate +1\.000 .* 40 won, 0 tied, 0 lost, p < 0\.001", text)
    assert re.search(r"win rate, ss+~ 1\.000 .* 40 won, 0 tied, 0 lost, p < 0\.001", text)
    assert max(map(len, text.splitlines())) <= 100


def test_table_tells_what_became_of_a_judges_comparisons():
    results = evaluate(SFT, PLAD)
    counts = {"comparisons": 20, "ties": 9, "order_dependent": 4, "unparsable": 3, "failed": 2}
    spent = {"verdicts": 36, "prompt_tokens": 12000, "answer_tokens": 345, "cost": 0.0123}
    text = comparison_table({**results, "judge": {"name": "m", **counts, **spent}})
    (told,) = re.findall(r"judge: 20 comparisons.*", text, re.DOTALL)
    for part in ("9 ties", "4 of them changed with the order", "3 of them without", "2 could not"):
        assert part in told
    assert "12,345 tokens, cost 0.0123" in told.replace("\n ", "")
    assert max(map(len, text.splitlines())) <= 100
    assert "judge:" not in comparison_table({**results, "judge": None})


def test_table_fits_a_terminal():
    far = replace(PLAD, name="a student with a long name", rejected_logps=PLAD.rejected_logps - 9e3)
    references = dict.fromkeys(SFT.answers, "w1 w2")
    lines = comparison_table(evaluate(SFT, far, references=references)).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[1:4]] == ["teacher", "SFT", "a"]
    assert re.match(r"SFT student +0\.\d{3} ±0\.\d{3} ", lines[2])


def test_table_counts_pairs_and_prompts_and_explains_its_abbreviations():
    twice = replace(SFT, pair_prompts=[f"p{i // 2}" for i in range(40)])
    text = comparison_table(evaluate(twice))
    assert "40 held-out prompts, 40 pairs of 20 prompts;" in text
    for name in ("rank acc.", "dist-2", "rep-4"):
        assert f"{name}: " in text
    texts_only = comparison_table(evaluate(StudentOutputs("SFT", SFT.answers)))
    assert "40 held-out prompts, 0 pairs;" in texts_only
    assert "rank acc." not in texts_only


def test_table_compares_the_calibration():
    results = evaluate(SFT, PLAD)
    results["calibration"] = calibration(samples("SFT student", -1), samples("PLaD student", 1))
    assert re.search(r"better sample is likelier +\+1\.000", comparison_table(results))
