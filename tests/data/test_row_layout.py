"""Spans, masks and positions of a packed row, against their definition token by token."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_fast.data.row_layout import RowLayout
from tests.support.naive import seen_by_definition

CPU = torch.device("cpu")


def pieces(least):
    """A trunk and up to five branches; some of them, or the trunk, may have no tokens."""
    lengths = st.lists(st.integers(0, 5), min_size=1, max_size=6).map(tuple)
    return lengths.filter(lambda group: sum(group) >= least)


layouts = st.builds(
    lambda groups: RowLayout(tuple(groups)), st.lists(pieces(1), min_size=1, max_size=4)
)
windows = st.none() | st.integers(1, 8)


def seen_by_spans(layout, window):  # (T, T) bool
    """What the spans, their keys and their masks say together."""
    places = torch.arange(layout.num_tokens)[None, None, :, None]
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for span, keys in zip(layout.spans, layout.by_span(places), strict=True):
        keys = keys.flatten()
        assert len(keys) == span.num_keys
        mask = layout.mask(span.stop - span.start, span.num_keys, window, CPU)
        for query, row in zip(range(span.start, span.stop), mask, strict=True):
            seen[query, keys[row]] = True
    return seen


@given(layouts)
def test_spans_cover_the_row_in_order(layout):
    places = [place for span in layout.spans for place in range(span.start, span.stop)]
    assert places == list(range(layout.num_tokens))
    for span in layout.spans:
        assert 0 <= span.trunk[0] <= span.trunk[1] <= span.start < span.stop


@given(layouts, windows)
def test_each_token_sees_what_the_definition_says(layout, window):
    expected = seen_by_definition(layout, window)
    assert torch.equal(seen_by_spans(layout, window), expected)
    assert expected.diagonal().all()


@given(layouts, windows)
def test_token_ids_say_the_same(layout, window):
    """They are what flex attention goes by."""
    group, piece, position = layout.token_ids(CPU)
    distance = position[:, None] - position
    seen = (group[:, None] == group) & (distance >= 0) & (distance < (window or 1000))
    seen &= (piece == 0) | (piece[:, None] == piece)
    assert torch.equal(seen, seen_by_definition(layout, window))


@given(layouts)
def test_positions_restart_behind_the_trunk(layout):
    expected = []
    for trunk, *branches in layout.groups:
        expected += range(trunk)
        for branch in branches:
            expected += range(trunk, trunk + branch)
    found = layout.position_ids()
    assert found.dtype == torch.long
    assert found.tolist() == expected
    assert torch.equal(layout.token_ids(CPU)[2], found)


@given(layouts)
def test_gradients_of_shared_keys_add_up(layout):
    """A key's gradient counts the spans that see it."""
    x = torch.randn(1, 2, layout.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(2, span.num_keys, 3, dtype=torch.float64) for span in layout.spans]
    seen = layout.by_span(x)
    sum((part[0] * w).sum() for part, w in zip(seen, weights, strict=True)).backward()
    expected = torch.zeros_like(x[0])
    for span, w in zip(layout.spans, weights, strict=True):
        expected.index_add_(1, torch.tensor(keys_of(span)), w)
    torch.testing.assert_close(x.grad[0], expected)


def with_trunks(layout):
    return all(group[0] or len(group) == 1 for group in layout.groups)


@given(layouts.filter(with_trunks))
def test_rows_that_predict(layout):
    """The row in front of every token of a branch; in front of the first is the trunk's last."""
    rows, start = [], 0
    for trunk, *branches in layout.groups:
        at = start + trunk
        for branch in branches:
            rows += [start + trunk - 1, *range(at, at + branch - 1)][:branch]
            at += branch
        start = at
    x = torch.randn(1, layout.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    found = layout.predicting(x)
    assert torch.equal(found, x[0, rows])
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    expected = torch.zeros_like(x[0]).index_add_(0, torch.tensor(rows, dtype=torch.long), weight)
    torch.testing.assert_close(x.grad[0], expected)


def keys_of(span):
    return [*range(*span.trunk), *range(span.start, span.stop)]


@given(layouts)
def test_offsets_of_a_variable_length_call(layout):
    found = layout.varlen(CPU)
    queries = [span.stop - span.start for span in layout.spans]
    keys = [len(keys_of(span)) for span in layout.spans]
    for offsets, lengths in ((found.cu_seqlens_q, queries), (found.cu_seqlens_k, keys)):
        assert offsets.dtype == torch.int32
        assert offsets[0] == 0
        assert offsets.diff().tolist() == lengths
    assert found.cu_seqlens_q[-1] == layout.num_tokens
    assert (found.max_seqlen_q, found.max_seqlen_k) == (max(queries), max(keys))


@pytest.mark.parametrize(
    ("groups", "spans"),
    [
        (((4,),), [(0, 4, 0, 0)]),  # shares nothing
        (((3, 2, 1),), [(0, 5, 0, 0), (5, 6, 0, 3)]),  # the first branch goes with its trunk
        (((3, 0, 2),), [(0, 3, 0, 0), (3, 5, 0, 3)]),  # an empty first branch
        (((0, 2, 1),), [(0, 2, 0, 0), (2, 3, 0, 0)]),  # nothing to share
        (((0, 0, 1),), [(0, 1, 0, 0)]),
        (((2, 1, 0), (1, 1, 1)), [(0, 3, 0, 0), (3, 5, 0, 0), (5, 6, 3, 4)]),
    ],
)
def test_spans_of_small_rows(groups, spans):
    found = RowLayout(groups).spans
    assert [(*span[:2], *(span.trunk if span.num_keys > span.stop - span.start else (0, 0)))
            for span in found] == spans  # fmt: skip


def test_layers_share_what_is_made():
    layout = RowLayout(((3, 2, 1),))
    assert layout.varlen(CPU) is layout.varlen(CPU)
    assert layout.mask(1, 4, None, CPU) is layout.mask(1, 4, None, CPU)
    assert layout.mask(1, 4, 2, CPU).tolist() == [[False, False, True, True]]


def test_what_is_made_under_inference_mode_may_be_saved_for_a_backward():
    """flash-attn does so with offsets, and autograd refuses tensors of that mode."""
    layout = RowLayout(((3, 2, 1),))

    def made():
        offsets = layout.varlen(CPU)[:2]
        return *offsets, layout.mask(1, 4, 2, CPU), layout.multiplicities(CPU)

    with torch.inference_mode():
        made()
    assert not any(tensor.is_inference() for tensor in made())


def test_layouts_are_values():
    """They travel from workers of a data loader, and compilers compare them."""
    layout = RowLayout(((3, 2, 1),))
    layout.varlen(CPU)
    copy = pickle.loads(pickle.dumps(layout))
    assert copy == layout == RowLayout(((3, 2, 1),))
    assert hash(copy) == hash(layout)
    assert layout != RowLayout(((3, 1, 2),))


@given(layouts)
def test_a_token_counts_for_each_sequence_it_stands_in(layout):
    expected = []
    for trunk, *branches in layout.groups:
        sequences = [[1] * trunk + [0] * sum(branches)]
        if branches:
            starts = [trunk + sum(branches[:index]) for index in range(len(branches))]
            sequences = [
                [int(place < trunk or start <= place < start + own)
                 for place in range(trunk + sum(branches))]
                for start, own in zip(starts, branches, strict=True)
            ]  # fmt: skip
        expected += [sum(column) for column in zip(*sequences, strict=True)]
    assert layout.multiplicities(CPU).tolist() == expected
