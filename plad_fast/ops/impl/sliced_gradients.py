"""Gradients of an LM head from a slice of the vocabulary at a time.

Where the lse is known, the gradient of the logits can be made for all tokens and some columns:
d_weight of these columns is then a whole sum, written once and in its own dtype, and d_hidden is
the sum over slices, in float32 (float64). Tokens that alone exceed the budget come in blocks, and
d_weight is a sum over blocks. Each part is added in turn: no atomics, and the same bits every time.

N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plad_fast.ops.backend import Head, HeadGradient, Needs
from plad_fast.ops.impl.products import Operand, Products, accumulation_dtype
from plad_fast.ops.impl.scaling import scaled_gradient

_ALIGNED_COLUMNS = 256
"""What the width of a slice is a multiple of: the widest tile, and rows that load in vectors."""


@dataclass(frozen=True)
class Tiling:
    """Blocks of `rows` tokens times slices of `columns` entries of the vocabulary."""

    num_rows: int
    vocab: int
    rows: int
    columns: int
    """A multiple of `_ALIGNED_COLUMNS`, which may exceed the vocabulary."""

    @classmethod
    def within(
        cls, budget: int, num_rows: int, vocab: int, *, bytes_per_row: int, bytes_per_logit: int
    ) -> Tiling:
        """All rows in one block if these leave half of the budget to logits; all of nearly the same
        size, as a short last one would leave a GPU idle.
        """
        least = bytes_per_row + _ALIGNED_COLUMNS * bytes_per_logit
        rows = balanced(num_rows, budget // (2 * least), 1)
        columns = (budget // max(rows, 1) - bytes_per_row) // bytes_per_logit
        return cls(num_rows, vocab, rows, balanced(vocab, columns, _ALIGNED_COLUMNS))

    def blocks(self) -> Iterator[slice]:
        """Slices of the rows."""
        return _slices(self.num_rows, self.rows)

    def slices(self) -> Iterator[slice]:
        """Slices of the vocabulary."""
        return _slices(self.vocab, self.columns)


def balanced(total: int, most: int, unit: int) -> int:
    """The size of the fewest parts of at most `most`; a multiple of `unit`, and at least that."""
    parts = -(-total // max(most // unit * unit, unit))
    return -(-total // (max(parts, 1) * unit)) * unit


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, total)) for i in range(0, total, max(step, 1)))


class SlicedGradients:
    """Accumulators of the gradients; None where one is not wanted.

    Args:
        scale: (), what d logits are to be multiplied by, or None for 1.
    """

    def __init__(self, head: Head, needs: Needs, tiling: Tiling, scale: Tensor | None) -> None:
        hidden, self._head_weight, bias = head
        need_hidden, need_weight, need_bias = needs
        self._wide = accumulation_dtype(hidden.dtype)
        self._scale = scale
        self._whole = tiling.rows >= tiling.num_rows
        self.hidden = torch.zeros_like(hidden) if need_hidden else None
        self.weight = self.bias = None
        if need_weight:
            dtype = hidden.dtype if self._whole else self._wide
            make = torch.empty_like if tiling.num_rows else torch.zeros_like
            self.weight = make(self._head_weight, dtype=dtype)
        if bias is not None and need_bias:
            self.bias = torch.zeros_like(bias, dtype=self._wide)
        self._of_rows: Tensor | None = None
        """(n, D), of the current block."""

    def add(
        self,
        d_logits: Tensor,  # (n, columns), divided by the scale
        hidden: Tensor,  # (n, D)
        rows: slice,  # the block, of the rows that there are
        columns: slice,
        products: Products,  # of the weights of these columns
    ) -> None:
        if self.bias is not None:
            self.bias[columns] += d_logits.sum(dim=0, dtype=self._wide)
        if self.hidden is not None:
            first = self._of_rows is None
            if self._of_rows is None:
                self._of_rows = torch.empty_like(hidden, dtype=self._wide)
            products.add_grad_hidden(Operand(d_logits), self._of_rows, overwrite=first)
        if self.weight is not None and self._whole:
            operand = Operand(d_logits, self._scale)
            products.write_grad_weight(operand, hidden, self.weight[columns])
        elif self.weight is not None:
            products.add_grad_weight(
                Operand(d_logits), hidden, self.weight[columns], overwrite=rows.start == 0
            )

    def finish_rows(self, rows: Tensor | slice) -> None:  # of the N
        """To be called after the last slice of a block."""
        if self.hidden is not None and self._of_rows is not None:
            total = self._of_rows if self._scale is None else self._of_rows.mul_(self._scale)
            self.hidden[rows] = total.to(self.hidden.dtype)
            self._of_rows = None

    def finish(self) -> HeadGradient:
        """To be called after the last block."""
        dtype, weight, bias = self._head_weight.dtype, self.weight, self.bias
        if bias is not None:
            bias = (bias if self._scale is None else bias * self._scale).to(dtype)
        if weight is not None and not self._whole:
            self.weight = None  # which is freed as soon as its copy is made
            weight = scaled_gradient(weight, self._scale, dtype)
        return HeadGradient(self.hidden, weight, bias)
