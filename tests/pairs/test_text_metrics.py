"""ROUGE, lengths, repetition and diversity against values worked out by hand."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from plad_fast.errors import UsageError
from plad_fast.pairs import text_metrics


def test_rouge_by_hand():
    scores = text_metrics.rouge(["the cat sat on mats", ""], ["the cat on mats slept", "anything"])
    # Words in common: the, cat, on, mats: 4 of 5 and 5. Bigrams: "the cat", "on mats": 2 of 4
    # and 4. Longest common subsequence: the cat on mats, 4.
    np.testing.assert_allclose(scores["rouge1"], [0.8, 0.0])
    np.testing.assert_allclose(scores["rouge2"], [0.5, 0.0])
    np.testing.assert_allclose(scores["rougeL"], [0.8, 0.0])


@pytest.mark.parametrize("text", ["Привет, как дела сегодня", "今天天气很好", "สวัสดีครับ"])
def test_rouge_reads_other_scripts(text):
    """rouge_score's own tokenizer drops every letter that is not ASCII and scores this 0."""
    assert text_metrics.rouge([text], [text])["rougeL"] == [1.0]


def test_rouge_names_the_extra_that_is_missing(monkeypatch):
    original = builtins.__import__

    def without_rouge_score(name, *args, **kwargs):
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rouge_score)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[eval\]'"):
        text_metrics.rouge(["a"], ["a"])


def test_words_and_their_repetition_by_hand():
    assert text_metrics.words("Don't stop - it's 3 o\u2019clock!") == [
        "don't",
        "stop",
        "it's",
        "3",
        "o\u2019clock",
    ]
    assert text_metrics.words("GPT 模型") == ["gpt", "模", "型"]
    assert text_metrics.word_counts(["one two three", ""]).tolist() == [3, 0]
    # "a b a" and "a b": words a, b of 5; bigrams "a b", "b a" of 3.
    assert text_metrics.distinct_n(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert text_metrics.distinct_n(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert text_metrics.distinct_n(["a"], 2) == 0.0
    # Five 4-grams of which "a b c d" comes twice; the second text is too short to repeat.
    texts = ["a b c d a b c d", "a a a"]
    assert text_metrics.repetition_shares(texts) == pytest.approx([1 / 5, 0.0])
