"""What the ops ask of a GPU, counted without one: A is the head of an 8B model, B of a small one
with a large vocabulary, C has many tokens.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.cuda_counts import A, B, C, Counts, Shape, count_one_pass, count_op
from plad_fast.ops.impl.products import _ADDS_TO_WIDE

pytestmark = pytest.mark.skipif(
    not _ADDS_TO_WIDE,
    reason="without products that add to float32 the gradient of the head is made of blocks",
)
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


@pytest.mark.parametrize(("shape", "chunks"), [(A, 1), (B, 1), (C, 4)], ids="ABC")
@pytest.mark.parametrize("active", [1.0, 0.5])
def test_one_pass_waits_once_a_chunk_where_pairs_may_be_satisfied(shape, chunks, active):
    counts = count_one_pass(shape, active=active)
    assert counts.chunks == chunks
    assert len(counts.waits) == chunks, counts.waits


@SHAPES
def test_one_pass_of_a_smooth_loss_does_not_wait(shape):
    for loss in ("dpo", "simpo", "ipo"):
        assert count_one_pass(shape, loss=loss).waits == ()


def test_one_pass_waits_once_more_for_lengths_on_the_gpu():
    for loss, waits in (("dpo", 1), ("plad_ranking", 2)):
        assert len(count_one_pass(A, loss=loss, lengths_on_host=False).waits) == waits


@pytest.mark.parametrize(("shape", "passes"), [(A, 2), (B, 2), (C, 5)], ids="ABC")
def test_one_pass_writes_the_gradient_of_the_head_once_a_chunk_and_once_scaled(shape, passes):
    counts = count_one_pass(shape)
    assert counts.weight_grad_written == passes
    assert counts.weight_grad_read == passes - 1


def test_one_pass_launches_little_around_products_and_loss():
    """Four launches a chunk, four more where rows are left out, eight of PLaD's ranking loss and
    its gradient, and those of a call."""
    assert count_one_pass(C).launches_per_chunk <= 12
    assert count_one_pass(C, active=0.5).launches_per_chunk <= 16
    assert count_one_pass(C, loss="dpo").launches_per_chunk <= 16
    assert len(count_one_pass(A).launches) <= 45


@pytest.mark.parametrize("active", [1.0, 0.5])
def test_one_pass_reads_logits_once(active):
    """4 bytes of each, and writes 2; where rows are left out, it moves those that take their
    places, which are half of the active ones.
    """
    logits = A.tokens * A.vocab
    names = ("_exponential_rows_kernel", "_move_rows_kernel")
    of_rows = [x for x in count_one_pass(A, active=active).launches if x.name in names]
    moved = active * (1 - active)
    expected = (6 + 4 * moved) * logits
    assert sum(x.read + x.written for x in of_rows) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("active", [1.0, 0.9, 0.5])
def test_one_pass_keeps_to_the_scratch_memory_it_is_given(active):
    """Of many rows of a small vocabulary, where hidden states and their gradients weigh most."""
    shape = Shape(32_768, 4096, 2048)
    head, hidden = shape.vocab * shape.width, shape.tokens * shape.width
    counts = count_one_pass(shape, active=active, scratch_bytes=2**28)
    assert counts.chunks > 4
    results = 2 * hidden + 4 * head  # the gradient of the head as it is accumulated
    assert counts.peak_bytes <= results + 2 * hidden + 2**28 + 2**22


@SHAPES
def test_one_pass_takes_the_memory_it_says(shape):
    """Gradients, scratch and, of several chunks, the accumulator of the head's gradient."""
    head, hidden = shape.vocab * shape.width, shape.tokens * shape.width
    scratch = 5 * shape.vocab * max(shape.width, 4096)
    results = 2 * (head + hidden)
    # Beside: the hidden states with zeros for ignored tokens, and numbers of a token.
    beside = 2 * hidden + 2**24
    assert count_one_pass(shape).peak_bytes <= results + scratch + 4 * head + beside
