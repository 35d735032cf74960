"""Counts of the CUDA path, run without a GPU."""

from __future__ import annotations

import pytest

from benchmarks.cuda_counts import A, B, C, count_one_pass, count_op

pytest.importorskip("triton")


@pytest.mark.parametrize(("shape", "chunks"), [(A, 3), (B, 1), (C, 11)])
def test_op(shape, chunks):
    counts = count_op(shape)
    assert len(counts.waits) == 1, counts.waits
    assert counts.chunks == chunks
    assert counts.weight_grad_written == 1
    assert counts.weight_grad_read == 0


def test_op_that_skips_nothing_waits_for_nothing():
    assert count_op(B, skip_inactive=False).waits == ()


@pytest.mark.parametrize(("shape", "chunks", "waits"), [(A, 8, 26), (B, 2, 8), (C, 32, 98)])
def test_one_pass(shape, chunks, waits):
    counts = count_one_pass(shape)
    assert len(counts.waits) == waits, counts.waits
    assert counts.chunks == chunks
    assert counts.weight_grad_written == chunks + 2
