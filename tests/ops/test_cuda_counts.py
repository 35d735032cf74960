"""Counts of the CUDA path, run without a GPU."""

from __future__ import annotations

import pytest

from benchmarks.cuda_counts import A, B, C, count_one_pass, count_op

pytest.importorskip("triton")


@pytest.mark.parametrize(("shape", "chunks"), [(A, 3), (B, 1), (C, 9)])
def test_op(shape, chunks):
    counts = count_op(shape)
    assert len(counts.waits) == 1, counts.waits
    assert counts.chunks == chunks
    assert counts.weight_grad_written == chunks + 1


@pytest.mark.parametrize(("shape", "chunks", "waits"), [(A, 8, 26), (B, 2, 8), (C, 32, 98)])
def test_one_pass(shape, chunks, waits):
    counts = count_one_pass(shape)
    assert len(counts.waits) == waits, counts.waits
    assert counts.chunks == chunks
    assert counts.weight_grad_written == chunks + 2
