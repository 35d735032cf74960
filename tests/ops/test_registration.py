"""What registered ops cost eager code, which is nothing, and how closed they are to a compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from plad_fast.errors import UsageError
from tests.support.problems import make_problem

EAGER = """
import sys, torch
from torch import distributed
from plad_fast import *
from plad_fast.data.packing import PreferenceCollator
from plad_fast.ops.vocab_parallel import *

hidden, targets, bounds = torch.randn(6, 3), torch.arange(6), torch.tensor([0, 4, 6])
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
group = distributed.group.WORLD

def check(impl, call, value):
    if value.requires_grad:
        value.backward()
    assert "torch._dynamo" not in sys.modules, (impl, call)

for impl, with_grad in (("torch", False), ("torch", True), ("triton", False), ("triton", True)):
    weight = torch.randn(11, 3, requires_grad=with_grad)
    head = hidden, weight, targets, bounds
    check(impl, "op", linear_sequence_logprobs(*head, impl=impl).sums.sum())
    check(impl, "one pass", fused_linear_preference_loss(*head, impl=impl).loss)
    stored = sequence_logprobs(hidden @ weight.T, targets, bounds, impl=impl)
    check(impl, "logits", stored.sums.sum())
    check(impl, "sharded op", vocab_parallel_sequence_logprobs(*head, group=group).sums.sum())
    check(impl, "sharded one pass", vocab_parallel_preference_loss(*head, group=group).loss)
"""


def test_eager_calls_load_no_compiler():
    """It takes more than a second and 90 MB."""
    done = subprocess.run(
        [sys.executable, "-c", EAGER],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr


def arguments(problem):
    return (
        problem.hidden,
        problem.weight,
        problem.bias,
        problem.targets,
        problem.cu_seqlens,
        *(None, 1.0, 1.0, -100, "torch", 0),  # HeadOptions
        *(1.0, True),  # length_normalization, skip_inactive
    )


def test_a_compiler_does_not_look_into_an_op():
    """Where it meets one outside of a graph."""
    op, of_op = (
        torch.ops.plad_fast.linear_sequence_logprobs,
        (*arguments(make_problem([4, 3])), False),
    )

    @torch.compiler.disable(recursive=False)
    def between_graphs():
        return op(*of_op)[0].sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    torch.compile(lambda: 2 * between_graphs(), backend=counter)()
    assert counter.frame_count == 1


def test_the_derivative_of_a_backward_is_refused():
    of_problem = arguments(make_problem([4, 3]))
    sums, counts, _, lse, tail, miss, _ = torch.ops.plad_fast.linear_sequence_logprobs(
        *of_problem, False
    )
    d_hidden, *_ = torch.ops.plad_fast.linear_sequence_logprobs_backward(
        torch.ones_like(sums),
        *(None, None, counts, lse.detach(), tail, miss),
        *of_problem,
        [True, True, False],
    )
    with pytest.raises(UsageError, match="no second derivative"):
        d_hidden.sum().backward()
