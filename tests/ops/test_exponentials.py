"""The workspace of bfloat16 on CPUs that multiply it; elsewhere its products are emulated."""

from __future__ import annotations

import pytest
import torch

from plad_fast import fused_linear_preference_loss, linear_sequence_logprobs, preference_loss
from plad_fast.ops.backend import HeadOptions
from plad_fast.ops.impl import products
from plad_fast.ops.impl.exponentials import ExponentialWorkspace, workspace_for
from plad_fast.ops.impl.products import CpuBfloat16Products
from plad_fast.ops.impl.workspace import Workspace
from tests.support.problems import assert_within_budget, make_problem, oracle

LENGTHS = [20, 11, 16, 30]
ALL_WANTED = (True, True, False)


@pytest.fixture(autouse=True)
def _with_units(monkeypatch):
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: True)


def ordinary(problem):
    pass


def rising(problem):
    """Each block of columns exceeds the one before by tens of nats, and rows differ in sign."""
    problem.weight.detach().mul_(torch.linspace(0.01, 60, len(problem.weight))[:, None])


def masked(problem):
    """Whole blocks have no probability, the first one among them."""
    problem.bias.detach()[: len(problem.weight) // 2] = -torch.inf
    problem.targets.clamp_(min=len(problem.weight) // 2)


@pytest.mark.parametrize(
    "spec", [{}, {"softcap": 5.0}, {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7}]
)
@pytest.mark.parametrize(
    "scratch_bytes", [2**14, 2**17, 2**20], ids=["row by row", "chunks", "whole"]
)
@pytest.mark.parametrize("change", [ordinary, rising, masked])
def test_error_budget(change, scratch_bytes, spec):
    problem = make_problem(LENGTHS, width=64, vocab=503, bias=True, scale=0.4, **spec)
    problem = problem.to(torch.bfloat16)
    problem.bias.requires_grad_(False)
    problem.scratch_bytes = scratch_bytes
    change(problem)
    same, truth = problem.to(torch.bfloat16), problem.to(torch.float64)
    options = {"beta": 1e4, "length_normalization": 0.0, "sft_weight": 0.0}
    ours = fused_linear_preference_loss(*problem.inputs, **options, **problem.options)
    sums = [oracle(p)[0] for p in (same, truth)]
    assert_within_budget(ours.sums, *sums, "sums")
    of_op = linear_sequence_logprobs(*problem.inputs, **problem.options).sums
    assert_within_budget(of_op, *sums, "sums of the op")
    ours, of_op, same_loss, true_loss = (
        preference_loss(s, torch.tensor(LENGTHS), **options) if s.dim() else s
        for s in (ours.loss, of_op, *sums)
    )
    losses = (ours, problem), (of_op, problem), (same_loss, same), (true_loss, truth)
    found = [torch.autograd.grad(value, p.leaves[:2]) for value, p in losses]
    for one_pass, op, s, t in zip(*found, strict=True):
        assert_within_budget(one_pass, s, t, "gradient of one pass")
        assert_within_budget(op, s, t, "gradient of the op")


def workspace(num_rows, *, vocab=4096, width=64, needs=ALL_WANTED, scratch_bytes=2**20):
    head = torch.empty(num_rows, width).bfloat16(), torch.empty(vocab, width).bfloat16(), None
    options = HeadOptions(scratch_bytes=scratch_bytes)
    return workspace_for(head, options, num_rows, for_gradient=any(needs), needs=needs)


def test_the_room_of_the_accumulator_goes_to_a_single_chunk():
    """2**20 bytes of scratch less an eighth, and as many of an accumulator, in rows of 8.5 KiB."""
    most = (2**20 - 2**17 + 2**20) // (2 * (4096 + 4 * 64))
    whole, chunked = workspace(most), workspace(most + 1)
    assert (whole.rows, whole.grad_weight_dtype) == (most, torch.bfloat16)
    assert (chunked.rows, chunked.grad_weight_dtype) == (105, None)
    assert workspace(most, needs=(True, False, False)).rows == 105
    assert not len(workspace(most, needs=(False, False, False))._buffer)


def test_what_it_does_not_do_is_left_to_others(monkeypatch):
    assert type(workspace(9)) is ExponentialWorkspace
    assert type(workspace(9, needs=(True, True, True))) is Workspace
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: False)
    assert type(workspace(9)) is Workspace


def test_what_follows_a_row_of_an_operand_is_not_taken_into_the_product():
    """Rows of 16 bits in rows of 32, of which oneDNN reads 32 values too many on AMX."""
    weight = torch.randn(503, 64).bfloat16()
    d_logits = torch.ones(200, 503)
    d_logits.view(torch.int32).bitwise_or_(0xFFFF)  # whose low halves are NaN of 16 bits
    strategy = CpuBfloat16Products(weight, 2**20)
    assert strategy.grad_hidden(strategy.operand(d_logits)).isfinite().all()
