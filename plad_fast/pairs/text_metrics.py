"""Numbers about texts: ROUGE, lengths, repetition, diversity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from plad_fast.errors import UsageError

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")

# Scripts written without spaces (Thai, Lao, kana, Han) count character by character.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['\u2019][^\W{_UNSPACED}]+)*")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measure of each prediction, in [0, 1].

    ROUGE-n is the F-measure of overlapping n-grams, ROUGE-L that of the longest common subsequence
    of words, over the whole text. Computed by `rouge_score` with Porter stemming. Its tokenizer
    knows ASCII letters only and scores any other text 0, so where most letters are not ASCII the
    words of `words` are compared instead, without stemming.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".

    Returns:
        {"rouge1": (n,), "rouge2": (n,), "rougeL": (n,)}; an empty text scores 0.

    Raises:
        UsageError: `rouge_score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError(
            "ROUGE needs the package rouge_score; run: pip install -e '.[eval]'"
        ) from error
    letters = [character for text in references for character in text if character.isalpha()]
    mostly_ascii = 2 * sum(character.isascii() for character in letters) >= len(letters)
    tokenizer = None if mostly_ascii else SimpleNamespace(tokenize=words)
    scorer = RougeScorer(list(ROUGE_NAMES), use_stemmer=True, tokenizer=tokenizer)
    scores = [
        scorer.score(reference, text)
        for text, reference in zip(predictions, references, strict=True)
    ]
    return {
        name: np.array([score[name].fmeasure for score in scores], dtype=np.float64)
        for name in ROUGE_NAMES
    }


def words(text: str) -> list[str]:
    """The lower-cased words of a text, without punctuation.

    A word is a run of letters and digits, with inner apostrophes; scripts that are written without
    spaces count character by character.
    """
    return _WORD.findall(text.lower())


def word_counts(texts: Sequence[str]) -> NDArray[np.float64]:
    """The number of `words` in each text, (n,)."""
    return np.array([len(words(text)) for text in texts], dtype=np.float64)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams of all texts together, divided by the number of n-grams; in [0, 1].

    Low values mean that the texts say the same things in the same words. It falls as texts grow in
    number and length, so compare it only over the same prompts. 0 where no text has n words.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation
    Models", which divides by the number of words instead.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_shares(texts: Sequence[str]) -> NDArray[np.float64]:
    """The share of 4-grams that came before in the same text, for each text; (texts,) in [0, 1).

    Near 0 for ordinary prose, near 1 for a model caught in a loop. A text shorter than four words
    has nothing to repeat and counts 0.

    Source: seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training".
    """
    return np.array([1 - distinct_n([text], 4) if _ngrams(text, 4) else 0.0 for text in texts])


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    tokens = words(text)
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
