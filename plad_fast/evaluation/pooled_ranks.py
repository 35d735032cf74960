"""Rank statistics over all samples of all prompts, exact under a bootstrap that draws prompts.

A prompt drawn w times counts w times, so each statistic is a function of the weights (R, P). What
takes pairs of samples (Kendall, AUROC) is summed once into P x P matrices; a resample is then two
products with its weights instead of N**2 comparisons.

Letters: P prompts, N samples in all, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from plad_fast.evaluation.metrics import FloatArray

_BLOCK = 2_000_000  # comparisons held at once


def resampled_prompts(n_prompts: int, n_resamples: int, seed: int) -> FloatArray:
    """How often each resample draws each prompt, (R, P); rows sum to P."""
    rng = np.random.default_rng(seed)
    share = np.full(n_prompts, 1 / n_prompts)
    return rng.multinomial(n_prompts, share, size=n_resamples).astype(np.float64)


def concordance(
    x: FloatArray,  # (n,)
    y: FloatArray,  # (n,)
    rows: slice = slice(None),
) -> tuple[FloatArray, FloatArray, FloatArray]:  # each (rows, n)
    """Of every two samples: 1 or -1 where x and y order them alike or not, and 1 where x differs
    and where y differs; else 0."""
    by_x = np.sign(x[rows, None] - x[None])
    by_y = np.sign(y[rows, None] - y[None])
    return by_x * by_y, np.abs(by_x), np.abs(by_y)


class PooledRanks:
    """Rank correlations of x with y; each method takes weights (R, P) and gives (R,).

    The value is NaN where a resample holds nothing that varies.

    Args:
        x, y: P vectors (K_p,); some may be empty.
    """

    def __init__(self, x: Sequence[FloatArray], y: Sequence[FloatArray]) -> None:
        sizes = [len(vector) for vector in x]
        self._prompt = np.repeat(np.arange(len(x)), sizes)  # (N,)
        self._x, self._y = np.concatenate(x), np.concatenate(y)
        self._agreement, self._by_x, self._by_y = self._summed(sizes)

    def kendall_pooled(self, weights: FloatArray) -> FloatArray:
        """Tau-b (Kendall 1945)."""
        agreement, by_x, by_y = (
            _form(weights, matrix) for matrix in (self._agreement, self._by_x, self._by_y)
        )
        return _ratio(agreement, np.sqrt(by_x * by_y))

    def auroc_pooled(self, weights: FloatArray) -> FloatArray:
        """How often, of two samples that differ in y, the one with the larger y has the larger x;
        a tie in x counts half."""
        return 0.5 * (1 + _ratio(_form(weights, self._agreement), _form(weights, self._by_y)))

    def spearman_pooled(self, weights: FloatArray) -> FloatArray:
        """Pearson's correlation of midranks, which are taken anew in every resample."""
        codes = [np.unique(v, return_inverse=True)[1].reshape(-1) for v in (self._x, self._y)]
        result = np.full(len(weights), np.nan)
        for r, by_prompt in enumerate(weights):
            weight = by_prompt[self._prompt]
            total = weight.sum()
            if not total:
                continue
            centred = []
            for code in codes:
                counts = np.bincount(code, weight)
                ranks = (np.cumsum(counts) - counts / 2)[code]  # less a half, which cancels
                centred.append(ranks - (weight @ ranks) / total)
            a, b = centred
            scale = np.sqrt((weight @ a**2) * (weight @ b**2))
            if scale > 0:
                result[r] = (weight @ (a * b)) / scale
        return result

    def _summed(self, sizes: Sequence[int]) -> list[FloatArray]:
        """The three matrices of `concordance`, summed over the samples of each two prompts."""
        n_prompts, n = len(sizes), len(self._x)
        sums = [np.zeros((n_prompts, n_prompts)) for _ in range(3)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        full = np.flatnonzero(sizes)
        block = max(1, _BLOCK // max(n, 1))
        for start in range(0, n, block):
            rows = slice(start, min(start + block, n))
            for total, part in zip(sums, concordance(self._x, self._y, rows), strict=True):
                columns: NDArray[np.float64] = np.add.reduceat(part, starts[full], axis=1)
                by_prompt = np.zeros((len(columns), n_prompts))
                by_prompt[:, full] = columns
                np.add.at(total, self._prompt[rows], by_prompt)
        return sums


def _form(weights: FloatArray, matrix: FloatArray) -> FloatArray:  # (R, P), (P, P) -> (R,)
    return ((weights @ matrix) * weights).sum(axis=1)


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    return np.divide(
        numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0
    )
