"""Keys and values of rows that come and go.

All rows end at the same column, and a row that came later starts at a later one: a step writes one
column for everybody, a newcomer is copied in to end there, and nothing is moved when a row is
added. What rows have left behind in front is given back when there is no room for another column.

Letters: R rows in use, C columns there are, W columns of a prefilled batch, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class RowCache(Cache):
    """A transformers cache for decoding one token a row and step.

    It takes memory for `max_rows`, and for `slack` columns beyond those that are needed.
    """

    def __init__(self, max_rows: int, *, slack: int = 64) -> None:
        super().__init__(layers=[])
        self.layers: list[Any] = []
        self.max_rows = max_rows
        self.starts: list[int] = []
        """First column of each row, of its prompt's first token."""

        self.end = 0
        """The column that the next step writes."""

        self._slack = slack
        self._capacity = 0

    @property
    def start(self) -> int:
        """The first column that a row uses; those before it are not shown to the model."""
        return min(self.starts, default=self.end)

    def insert(self, prefilled: Cache, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Adds rows of a left-padded batch, (.., H, W, E), after those there are.

        Each new row has its `source` in that batch and its length, padding left out.
        """
        first, width = len(self.starts), max(lengths)
        assert first + len(sources) <= self.max_rows
        if not self.starts:
            self.end = 0
        if self.end < width or self._capacity == 0:
            self._move(width - (self.end - self.start))
        if not self.layers:
            self.layers = [_RowLayer(self, layer, self._capacity) for layer in prefilled.layers]
        rows, columns = slice(first, first + len(sources)), slice(self.end - width, self.end)
        for layer, given in zip(self.layers, prefilled.layers, strict=True):
            index = torch.tensor(sources, device=layer.device)
            layer.keys[rows, :, columns] = given.keys[index, :, -width:]
            layer.values[rows, :, columns] = given.values[index, :, -width:]
        self.starts += [self.end - length for length in lengths]

    def drop(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        start = self.starts.pop()
        last, columns = len(self.starts), slice(start, self.end)
        if row == last:
            return
        self.starts[row] = start
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor[row, :, columns] = tensor[last, :, columns]

    def prepare_step(self) -> None:
        """Makes room for one more column."""
        if self.end == self._capacity:
            self._move(0)

    def finish_step(self) -> None:
        """To be called once all layers have written their column."""
        self.end += 1

    def mask(self, device: torch.device) -> Tensor:  # (R, columns shown and the one to come)
        """1 where a row has a token, 0 before it."""
        columns = torch.arange(self.start, self.end + 1, device=device)
        return (columns >= torch.tensor(self.starts, device=device)[:, None]).long()

    def _move(self, more: int) -> None:
        """Brings the used columns to the front, with `more` free ones before them, if any.

        The memory is kept if that leaves a fair number of columns free, else taken anew.
        """
        start, used = self.start, self.end - self.start
        more = max(more, 0)
        needed = more + used
        grow = needed + max(1, self._slack // 2) > self._capacity
        if grow:
            self._capacity = needed + max(self._slack, needed // 2)
        rows, old, new = slice(len(self.starts)), slice(start, self.end), slice(more, needed)
        for layer in self.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                # A copy: source and target may overlap in the same memory.
                moved = tensor[rows, :, old].clone()
                if grow:
                    tensor = _zeros(tensor, self.max_rows, self._capacity)
                    setattr(layer, name, tensor)
                tensor[rows, :, new] = moved
        self.starts = [more + first - start for first in self.starts]
        self.end = needed


class _RowLayer(DynamicLayer):
    """One layer's part. To transformers it is a cache of R rows that begins at `cache.start`."""

    def __init__(self, cache: RowCache, like: DynamicLayer, capacity: int) -> None:
        super().__init__()
        self._cache = cache
        self.dtype, self.device = like.keys.dtype, like.keys.device
        self.keys = _zeros(like.keys, cache.max_rows, capacity)  # (max_rows, H, C, E)
        self.values = _zeros(like.values, cache.max_rows, capacity)
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,  # (R, H, 1, E)
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        assert key_states.shape[2] == 1
        cache = self._cache
        rows, end = slice(len(cache.starts)), cache.end
        self.keys[rows, :, end] = key_states[:, :, 0]
        self.values[rows, :, end] = value_states[:, :, 0]
        shown = slice(cache.start, end + 1)
        return self.keys[rows, :, shown], self.values[rows, :, shown]

    def get_seq_length(self, *args: Any) -> int:
        return self._cache.end - self._cache.start


def _zeros(like: Tensor, rows: int, capacity: int) -> Tensor:
    # Not empty: what a mask hides is still multiplied, by 0, and memory may hold NaN.
    return like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
