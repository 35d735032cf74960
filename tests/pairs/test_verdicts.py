"""Verdicts in replies of a judge."""

from __future__ import annotations

import pytest

from plad_fast.pairs.scoring.verdicts import read_verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "A"),
        ("Both fine.\n\n**Verdict: tie.**\n", "tie"),
        ("[[B]]", "B"),
        ("b", "B"),
        ("Final verdict: Answer A", "A"),
        ('Because.\n{"reason": "so", "verdict": "B"}', "B"),
        ('```json\n{\n  "winner": "tie"\n}\n```', "tie"),
        ("Verdict: A\nOr so I thought, but B has it.", None),  # not in its last line
        ("A is better than B", None),
        ("Verdict: A or B", None),
        ("Verdict: C", None),
        ('{"reason": "Verdict: A"', None),
        ('{"verdict": null}', None),
        ("", None),
        ("Verdict:", None),
        ("<think>Verdict: A? no.\n</think>\n\nVerdict: B", "B"),
        ("<think>\nI lean to\nVerdict: A", None),
        ("Verdict: A (slightly better)", "A"),
        ("Verdict: A (or B?) B", None),
        ("Verdict: A\n\n(Note: A is longer.)", "A"),
        ("\\boxed{B}", "B"),
        ("Final Verdict: [[A]]", "A"),
        ("Verdict: neither", "tie"),
        ("Verdict: A<|im_end|>", "A"),
        ("Verdict\uff1a B", "B"),
        ('```json\n{"verdict": "A", "why": "x {y} z"}\n```', "A"),
        ('{"verdict": ["A"]}', None),
        ("It comes down to taste, so\nTie", None),  # a bare word says so where it is all
        ("The better one is\nA", None),
        ("Plan B", None),
        ("{" * 10_000 + "}", None),
        ("Verdict: A " + "(" * 10_000 + "b", None),
    ],
)
def test_only_a_clear_verdict_counts(reply, verdict):
    assert read_verdict(reply) == verdict
