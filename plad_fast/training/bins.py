"""Packing to a budget of tokens: first fit, longest first."""

from __future__ import annotations

from collections.abc import Sequence

# Padded bins that further items are tried in; a search of all of them takes quadratic time.
_OPEN = 256


def pack(
    lengths: Sequence[int | tuple[int, ...]], budget: int | None, *, padded: bool = False
) -> list[list[int]]:
    """Indices of the lengths in bins that stay within the budget; first fit, longest first.

    A bin takes the sum of its lengths or, padded, its longest as often as it has items. A length
    of several parts is their sum, and each part is padded on its own. A length over the budget has
    a bin of its own. In a bin, and by their first indices among each other, items keep their order.
    No budget means one bin.
    """
    if budget is None:
        return [list(range(len(lengths)))] if lengths else []
    parts = [(length,) if isinstance(length, int) else length for length in lengths]
    place = _Padded(budget).place if padded else _Sums(budget, len(parts)).place
    bins: dict[int, list[int]] = {}
    for index in sorted(range(len(parts)), key=lambda i: -sum(parts[i])):
        bins.setdefault(place(parts[index]), []).append(index)
    return sorted(sorted(indices) for indices in bins.values())


class _Sums:
    """Bins that take sums, as a tree: every node has the most room of the bins below it."""

    def __init__(self, budget: int, count: int) -> None:
        self._budget = budget
        self._leaves = 1 << count.bit_length()
        self._room = [budget] * (2 * self._leaves)
        self._used = 0

    def place(self, parts: tuple[int, ...]) -> int:
        """The number of the first bin with room for an item, which it takes."""
        size, node = sum(parts), 1
        if size > self._budget:
            node = self._leaves + self._used
        while node < self._leaves:
            node = 2 * node + (self._room[2 * node] < size)
        found = node - self._leaves
        self._used = max(self._used, found + 1)
        self._room[node] -= size
        while node > 1:
            node //= 2
            self._room[node] = max(self._room[2 * node], self._room[2 * node + 1])
        return found


class _Padded:
    """Bins that take their longest parts as often as they have items."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._open: dict[int, tuple[tuple[int, ...], int]] = {}  # number: longest parts, items

    def place(self, parts: tuple[int, ...]) -> int:
        """The number of the first open bin with room for an item, which it takes."""
        for number, (longest, count) in self._open.items():
            grown = tuple(map(max, longest, parts))
            if sum(grown) * (count + 1) <= self._budget:
                self._put(number, grown, count + 1)
                return number
        self._used += 1
        self._put(self._used, parts, 1)
        if len(self._open) > _OPEN:
            del self._open[next(iter(self._open))]
        return self._used

    def _put(self, number: int, longest: tuple[int, ...], count: int) -> None:
        if sum(longest) * (count + 1) <= self._budget:
            self._open[number] = longest, count
        else:  # not even an empty item would fit
            self._open.pop(number, None)
