"""torch.compile of a user's loss: one graph, no break at an op, no recompile for a new length."""

from __future__ import annotations

import pytest
import torch
from problems import make_problem
from torch._dynamo.testing import CompileCounterWithBackend

from plad_fast import (
    fused_linear_preference_loss,
    linear_sequence_logprobs,
    preference_loss,
    sequence_logprobs,
)

OPTIONS = [
    {},
    {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7},
    {"length_normalization": 1.0},
]


def ranking(hidden, weight, bias, targets, cu_seqlens, **options):
    """A training loop's loss: the op, then something of the user's own."""
    ours = linear_sequence_logprobs(hidden, weight, targets, cu_seqlens, bias=bias, **options)
    chosen, rejected = ours.sums.reshape(-1, 2).unbind(1)
    return torch.relu(1.0 - chosen + rejected).mean() - 0.1 * ours.token_logprobs.mean()


def registered(hidden, weight, bias, targets, cu_seqlens, **options):
    ours = linear_sequence_logprobs(hidden, weight, targets, cu_seqlens, bias=bias, **options)
    return preference_loss(ours.sums, ours.counts, loss="plad_ranking", beta=3.0, sft_weight=0.1)


def one_pass(hidden, weight, bias, targets, cu_seqlens, **options):
    ours = fused_linear_preference_loss(
        hidden, weight, targets, cu_seqlens, bias=bias, beta=3.0, sft_weight=0.1, **options
    )
    return 2 * ours.loss


def on_a_reference(hidden, weight, bias, targets, cu_seqlens, **options):
    reference = -cu_seqlens.diff().to(hidden.dtype)
    ours = fused_linear_preference_loss(
        hidden,
        weight,
        targets,
        cu_seqlens,
        bias=bias,
        loss="dpo",
        reference_logps=reference,
        label_smoothing=0.1,
        **options,
    )
    return ours.loss


def stored(hidden, weight, bias, targets, cu_seqlens, **options):
    ours = sequence_logprobs(hidden @ weight.T + bias, targets, cu_seqlens, **options)
    return ours.sums.sum()


def arguments(problem):
    return problem.hidden, problem.weight, problem.bias, problem.targets, problem.cu_seqlens


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap", "mean"])
@pytest.mark.parametrize("loss", [ranking, registered, one_pass, on_a_reference, stored])
def test_one_graph_for_all_lengths(loss, options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compilations = set()
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for seed, lengths in enumerate([[4, 3, 2, 2], [9, 2, 5, 6], [3, 3, 1, 7, 8, 8], [2, 30, 7, 7]]):
        problem = make_problem(lengths, bias=True, ignored=0.2, seed=seed)
        ours = compiled(*arguments(problem), **options)
        gradients = torch.autograd.grad(ours, problem.leaves)
        want = loss(*arguments(problem), **options)
        torch.testing.assert_close(ours, want)
        compilations.add(counter.frame_count)
        for mine, other in zip(gradients, torch.autograd.grad(want, problem.leaves), strict=True):
            torch.testing.assert_close(mine, other)
    assert len(compilations) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_registrations_are_sound(bias):
    """Schema, fake shapes, autograd and dynamic shapes, by torch's own checks."""
    problem = make_problem([4, 0, 3], bias=bias, ignored=0.3)
    options = (None, 1.0, 1.0, -100, 1.0, True, "torch", 2**16, True)
    torch.library.opcheck(
        torch.ops.plad_fast.linear_sequence_logprobs.default,
        (
            problem.hidden,
            problem.weight,
            problem.bias,
            problem.targets,
            problem.cu_seqlens,
            *options,
        ),
    )
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        torch.ops.plad_fast.stored_token_logprobs.default,
        (
            logits,
            problem.targets.clamp(max=10),
            problem.cu_seqlens,
            None,
            1.0,
            1.0,
            -100,
            "torch",
            2**16,
        ),
    )


@pytest.mark.parametrize("loss", ["plad_margin", "ipo"])
def test_the_one_pass_registration_is_sound(loss):
    """With and without the bias, scores and a reference."""
    problem = make_problem([4, 0, 3, 2], bias=loss == "ipo", ignored=0.3)
    constants = torch.randn(4, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.plad_fast.linear_preference_loss.default,
        (
            problem.hidden,
            problem.weight,
            problem.bias,
            problem.targets,
            problem.cu_seqlens,
            constants if loss == "plad_margin" else None,
            constants if loss == "ipo" else None,
            torch.tensor(3.0),
            None,
            *(2, 0.1, 0.5),  # group_size, sft_weight, length_normalization
            *(None, 1.0, 1.0, -100, "torch", 2**16),
            *(True, True, problem.bias is not None),
            *(loss, "beta", [0.5]),
        ),
    )


def test_a_function_of_ones_own_is_not_taken_for_a_registered_loss():
    def sft(logps):
        return logps.sum(1)

    def loss_of(problem):
        return fused_linear_preference_loss(*problem.inputs, loss=sft).loss

    problem = make_problem([2, 3])
    with pytest.raises(Exception, match="must be a registered one"):
        torch.compile(loss_of, backend="aot_eager", fullgraph=True)(problem)
