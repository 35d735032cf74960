"""Layouts of packed rows: the tokens that each token attends to.

A packed row holds groups one behind the other. A group is a trunk and its branches: the trunk is
the prompt, the branches are the responses, which see the trunk and themselves but not each other.
A sequence that shares nothing is a trunk without branches. T tokens in the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Span(NamedTuple):
    """Consecutive queries that see the same keys: `trunk` and then themselves, causally.

    With the keys counted from the first one of the trunk, query i of n is key i + k - n of k: what
    flash-attn calls bottom-right aligned causal attention.
    """

    start: int
    stop: int
    trunk: tuple[int, int]
    """[first, last) of the keys before the span's own; empty where there are none."""

    @property
    def num_keys(self) -> int:
        return self.stop - self.start + self.trunk[1] - self.trunk[0]


class Varlen(NamedTuple):
    """The row as arguments of a variable-length attention kernel, spans as its sequences."""

    cu_seqlens_q: Tensor  # (spans + 1,) int32
    cu_seqlens_k: Tensor  # (spans + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class RowLayout:
    """The groups of a packed row, each as its pieces' lengths: (trunk, branch, branch, ...)."""

    groups: tuple[tuple[int, ...], ...]
    trace: list[Attended] | None = field(default=None, compare=False)
    """If a list, every layer's attention leaves a note here; see `plad_fast.models.sharing`."""
    _made: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def spans(self) -> list[Span]:
        """In the order of the row, so that their queries, put together, are the row.

        The first branch continues its trunk without a gap: both are one span.
        """
        spans, start = [], 0
        for trunk, *branches in self.groups:
            after = start + trunk + (branches[0] if branches else 0)
            spans.append(Span(start, after, (start, start)))
            for branch in branches[1:]:
                spans.append(Span(after, after + branch, (start, start + trunk)))
                after += branch
            start = after
        return [span for span in spans if span.stop > span.start]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.groups))

    def position_ids(self) -> Tensor:  # (T,)
        """Positions as if every branch stood directly behind its trunk."""
        parts = [torch.zeros(0, dtype=torch.long)]
        for trunk, *branches in self.groups:
            parts.append(torch.arange(trunk))
            parts += [torch.arange(trunk, trunk + branch) for branch in branches]
        return torch.cat(parts)

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """What `make` gives, kept: the layers of a model ask for the same things."""
        if key not in self._made:
            # Asked for under inference mode, it may be saved for a backward later.
            with torch.inference_mode(False):
                self._made[key] = make()
        return self._made[key]

    def mask(
        self, num_queries: int, num_keys: int, window: int | None, device: torch.device
    ) -> Tensor:  # (num_queries, num_keys) bool
        """True where a query of a span sees a key."""

        def make() -> Tensor:
            seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
            seen = seen.tril(num_keys - num_queries)
            return seen if window is None else seen.triu(num_keys - num_queries - window + 1)

        return self.once(("mask", num_queries, num_keys, window, device), make)

    def by_span(self, x: Tensor) -> list[Tensor]:
        """Keys or values (1, G, T, C), those of each span behind those of its trunk.

        All cuts are splits and short slices, and no index is used: the backward adds in a fixed
        order, on GPUs too.
        """
        spans = self.spans
        own = x.split([span.stop - span.start for span in spans], dim=2)
        seen = []
        trunk, trunk_start = x.narrow(2, 0, 0), 0
        for span, part in zip(spans, own, strict=True):
            length = span.trunk[1] - span.trunk[0]
            if length:
                offset = span.trunk[0] - trunk_start
                part = torch.cat([trunk.narrow(2, offset, length), part], dim=2)
            else:
                trunk, trunk_start = part, span.start
            seen.append(part)
        return seen

    @torch._disable_dynamo  # how many cuts there are depends on the layout
    def predicting(self, hidden: Tensor) -> Tensor:
        """Rows of (1, T, D) that predict the tokens of the branches, (N, D), in their order.

        The last token of a trunk predicts the first one of each of its branches, and its row
        stands there as often. As with `by_span`, cuts and no index: indexed rows that repeat are
        added in no fixed order on GPUs.
        """
        sizes = []
        for trunk, *branches in self.groups:
            assert trunk or not branches, "nothing predicts the first token"
            sizes += [max(trunk - 1, 0), min(trunk, 1)]
            for branch in branches:
                sizes += [max(branch - 1, 0), min(branch, 1)]
        parts = iter(hidden[0].split(sizes))
        rows = [hidden[0, :0]]
        for _, *branches in self.groups:
            _, last = next(parts), next(parts)
            for branch in branches:
                inner, _ = next(parts), next(parts)
                rows += [last, inner] if branch else []
        return torch.cat(rows)

    def varlen(self, device: torch.device) -> Varlen:
        """See `Varlen`."""

        def make() -> Varlen:
            queries = [span.stop - span.start for span in self.spans]
            keys = [span.num_keys for span in self.spans]
            return Varlen(
                _offsets(queries).to(device), _offsets(keys).to(device), max(queries), max(keys)
            )

        return self.once(("varlen", device), make)

    def token_ids(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token its group, its piece of the group (0: trunk), and its position; (T,)."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            lengths = torch.tensor([length for group in self.groups for length in group])
            groups = [index for index, group in enumerate(self.groups) for _ in group]
            pieces = [piece for group in self.groups for piece in range(len(group))]
            of_pieces = torch.tensor([groups, pieces]).repeat_interleave(lengths, dim=1).to(device)
            return of_pieces[0], of_pieces[1], self.position_ids().to(device)

        return self.once(("ids", device), make)

    def multiplicities(self, device: torch.device) -> Tensor:  # (T,) int64
        """In how many sequences every token stands: one of a trunk in those of its branches."""

        def make() -> Tensor:
            branches = torch.tensor([max(len(group) - 1, 1) for group in self.groups])
            groups, pieces, _ = self.token_ids(device)
            return branches.to(device)[groups].where(pieces == 0, 1)

        return self.once(("multiplicities", device), make)


class Attended(NamedTuple):
    """What a layer asked of the attention."""

    layer: int | None
    window: int | None


def _offsets(lengths: Sequence[int]) -> Tensor:  # (len(lengths) + 1,)
    return torch.tensor([0, *lengths]).cumsum(0).int()
