"""Sums of the tokens of each sequence, in Triton's interpreter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from plad_fast.kernels.launch import SegmentsConfig
from plad_fast.kernels.segments import expand_segments, segment_sums

from tests.support import interpreter
from tests.support.problems import NAN, normal

pytestmark = interpreter.MARKS


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    step=st.integers(1, 3),
    block=st.sampled_from([1, 16, 128]),
    size=st.sampled_from([1.0, 1e6]),
)
def test_segment_sums_are_rounded_once(lengths, step, block, size):
    """The float64 sum, rounded to float32; tokens before the first and after the last bound are in
    no sequence.
    """
    bounds = [1 + n for n in itertools.accumulate([0, *lengths])]
    values = torch.full((bounds[-1] + 2, step), NAN)[:, 0]
    values[bounds[0] : bounds[-1]] = size * normal(sum(lengths), seed=3)
    ours = segment_sums(values, torch.tensor(bounds), config=SegmentsConfig(block))
    assert ours.dtype == torch.float32
    exact = [math.fsum(values[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    # A double sum may be on the other side of a tie that the exact one is near.
    torch.testing.assert_close(ours, torch.tensor(exact, dtype=torch.float32), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("origin", [0, 3])
def test_sums_of_a_part_of_the_sequences(origin):
    """Of which the values are given, and bounds counted from another token."""
    values = normal(20, seed=4)
    bounds = torch.tensor([3, 7, 7, 20])
    want = segment_sums(values, bounds)
    assert torch.equal(segment_sums(values[origin:], bounds, origin), want)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    step=st.integers(1, 3),
    block=st.sampled_from([1, 16, 128]),
    origin=st.sampled_from([0, 5, 2**40]),
)
def test_expanded_segments_are_repeated_values(lengths, step, block, origin):
    values = torch.full((len(lengths), step), NAN)
    values[:, 0] = normal(len(lengths), seed=2)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)]) + origin
    ours = expand_segments(values[:, 0], bounds, origin, sum(lengths), SegmentsConfig(block))
    assert torch.equal(ours, values[:, 0].repeat_interleave(torch.tensor(lengths).long()))


def test_expanding_is_one_launch(launched):
    expand_segments(torch.ones(1), torch.tensor([0, 5]), 0, 5)
    expand_segments(torch.ones(0), torch.tensor([0]), 0, 0)
    assert launched == ["_expand_segments_kernel"]


def test_segment_sums_cancel():
    """float32 would have lost the 1."""
    values = torch.tensor([1e8, 1.0, -1e8, 5.0, NAN, 2.0])
    ours = segment_sums(values, torch.tensor([0, 3, 4, 5, 5, 6]))
    torch.testing.assert_close(ours, torch.tensor([1.0, 5.0, NAN, 0.0, 2.0]), equal_nan=True)


def test_segment_sums_are_one_launch(launched):
    segment_sums(torch.ones(5), torch.tensor([0, 5]))
    segment_sums(torch.ones(5), torch.tensor([0]))
    assert launched == ["_segment_sums_kernel"]


def test_segment_sums_of_a_long_sequence():
    values = normal(20_000, seed=5)
    ours = segment_sums(values, torch.tensor([0, 20_000]))
    assert ours.item() == pytest.approx(math.fsum(values.tolist()), rel=1e-6)


def test_segment_sums_beyond_31_bits(sparse):
    values = sparse((40,), (2**26 + 8,), torch.float32)
    values.copy_(normal(40, seed=6))
    bounds = torch.tensor([0, 7, 40])
    near = segment_sums(values.contiguous(), bounds)
    assert torch.equal(segment_sums(values, bounds), near)
