"""What the ops ask of a GPU, counted without one: A is the head of an 8B model, B of a small one
with a large vocabulary, C has many tokens.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.cuda_counts import A, B, C, Counts, count_one_pass, count_op

SHAPES = pytest.mark.parametrize("shape", [A, B, C], ids="ABC")


def products(counts: Counts, shape) -> float:
    """In units of 2 N D V flop."""
    return counts.flops / (2 * shape.tokens * shape.width * shape.vocab)


@SHAPES
@pytest.mark.parametrize("active", [1.0, 0.5])
def test_products_of_tokens_without_a_gradient_are_left_out(shape, active):
    assert products(count_op(shape, active=active), shape) == pytest.approx(1 + 3 * active)
    assert products(count_one_pass(shape, active=active), shape) == pytest.approx(1 + 2 * active)


@SHAPES
def test_op_writes_the_gradient_of_the_head_once(shape):
    counts = count_op(shape)
    assert counts.weight_grad_read == 0
    assert counts.weight_grad_written == 1


@SHAPES
def test_op_waits_once_and_only_to_leave_tokens_out(shape):
    assert len(count_op(shape).waits) <= 1
    assert count_op(shape, skip_inactive=False).waits == ()


@pytest.mark.parametrize(
    ("shape", "launches", "waits", "passes"),
    [(A, 475, 26, 9), (B, 145, 8, 3), (C, 1795, 98, 33)],
    ids="ABC",
)
def test_one_pass(shape, launches, waits, passes):
    counts = count_one_pass(shape)
    assert len(counts.launches) <= launches
    assert len(counts.waits) <= waits, counts.waits
    assert counts.weight_grad_written <= passes
