"""Log-probabilities of logits that are stored already."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_fast import UsageError, sequence_logprobs
from plad_fast.ops.reference import reference_logits
from tests.support.problems import oracle, problems, upstream


@given(problem=problems(), alpha=st.sampled_from([0.0, 1.0]))
def test_stored_logits_give_the_same(problem, alpha):
    """The second op, for those who hold logits: same values, gradients to the logits."""
    logits = reference_logits(problem.hidden, problem.weight, problem.bias)
    ours = sequence_logprobs(
        logits, problem.targets, problem.cu_seqlens, length_normalization=alpha,
        scratch_bytes=problem.scratch_bytes, **problem.spec,
    )  # fmt: skip
    sums, tokens = oracle(problem, alpha)
    torch.testing.assert_close(ours.sums, sums)
    torch.testing.assert_close(ours.token_logprobs, tokens)
    grads = upstream(sums, "random")
    got = torch.autograd.grad(ours.sums, problem.leaves, grads)
    want = torch.autograd.grad(sums, problem.leaves, grads)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("scratch_bytes", [1, 2**20])
def test_stored_logits_of_a_padded_batch(scratch_bytes):
    """As a model returns them: the last position is cut off by a view, which is not copied."""
    draw = torch.Generator().manual_seed(0)
    full = torch.randn(3, 6, 11, dtype=torch.float64, generator=draw, requires_grad=True)
    logits = full[:, :-1]
    targets = torch.randint(11, (3, 5), generator=draw)
    targets[1, 2:] = -100
    ours = sequence_logprobs(logits, targets, scratch_bytes=scratch_bytes)
    want = (
        -torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        .reshape(3, 5)
        .sum(1)
    )
    torch.testing.assert_close(ours.sums, want)
    assert ours.counts.tolist() == [5, 2, 5]
    for got, wanted in zip(
        torch.autograd.grad(ours.sums.prod(), full),
        torch.autograd.grad(want.prod(), full),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_stored_logits_of_ignored_rows_may_hold_anything():
    logits = torch.zeros(4, 5)
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits.requires_grad_()
    ours = sequence_logprobs(logits, torch.tensor([0, 1, -100, -100]), torch.tensor([0, 2, 4]))
    ours.sums.sum().backward()
    assert ours.sums.isfinite().all()
    assert logits.grad.isfinite().all()
    assert not logits.grad[2:].any()


@pytest.mark.parametrize(
    ("logits", "targets", "cu_seqlens", "message"),
    [
        (torch.zeros(2, 3, 5), torch.zeros(3, 2).long(), None, r"shape \(2, 3\), got \(3, 2\)"),
        (torch.zeros(2, 3, 5), torch.zeros(6).long(), None, r"shape \(2, 3\), got \(6,\)"),
        (torch.zeros(4, 5), torch.zeros(4).long(), None, "with cu_seqlens, or"),
        (torch.zeros(4, 5).int(), torch.zeros(4).long(), torch.tensor([0, 4]), "logits must be"),
        (torch.zeros(4, 5), torch.full((4,), 5), torch.tensor([0, 4]), r"lie in \[0, 5\)"),
        (torch.zeros(4, 5), torch.zeros(4).long(), torch.tensor([0, 3]), "end at the number"),
    ],
)
def test_refusals_of_stored_logits(logits, targets, cu_seqlens, message):
    with pytest.raises(UsageError, match=message):
        sequence_logprobs(logits, targets, cu_seqlens)
