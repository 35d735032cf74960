"""ROUGE-L as the measure of samples where no scorer is named."""

from __future__ import annotations

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.evaluation.samples import RougeL


def test_a_reference_goes_before_the_teachers_answer():
    pytest.importorskip("rouge_score")
    prompts = [Prompt("a", "Name a fish.", "a red herring"), Prompt("b", "Name a bird.")]
    measure = RougeL(prompts, {"a": "one old cod", "b": "the early bird"})
    items = [
        (prompts[0], "a red herring"),
        (prompts[0], "one old cod"),
        (prompts[1], "the early bird"),
    ]
    assert measure.score(items) == [1.0, 0.0, 1.0]
