"""What is run together in one pass, and what a GPU is asked for."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_fast import (
    UsageError,
    fused_linear_preference_loss,
    linear_sequence_logprobs,
    losses,
    preference_loss,
    sequence_logprobs,
)
from plad_fast.losses.objective import Objective
from plad_fast.losses.terms import segment_counts
from plad_fast.ops import backend, preference_autograd
from plad_fast.ops.backend import HeadOptions, LinearProblem
from plad_fast.ops.impl import kernel_workspace, onepass, products, triton_backend
from plad_fast.ops.impl.kernel_workspace import KernelWorkspace
from tests.support import wide_products
from tests.support.loss_options import REQUIRED
from tests.support.problems import assert_within_budget, make_problem, oracle

META = torch.device("meta")


@given(
    lengths=st.lists(st.integers(0, 900), min_size=1, max_size=40),
    rows=st.integers(128, 3000),
)
def test_balanced_chunks_are_as_few_and_nearly_as_long_as_possible(lengths, rows):
    bounds = [0, *itertools.accumulate(lengths)]
    packed = onepass._packed_groups(bounds, rows)
    balanced = onepass._balanced_groups(bounds, rows, packed)
    assert len(balanced) == len(packed)
    assert [a for a, _ in balanced] == [0, *(b for _, b in balanced[:-1])]
    assert balanced[-1][1] == len(lengths)

    def longest(ranges):
        return max(bounds[b] - bounds[a] for a, b in ranges)

    assert longest(balanced) <= longest(packed)


def test_many_short_groups_are_balanced_in_a_few_tries(monkeypatch):
    """A small vocabulary lets hundreds of thousands of tokens into one chunk."""
    tried = []
    packed_groups = onepass._packed_groups
    monkeypatch.setattr(
        onepass,
        "_packed_groups",
        lambda bounds, rows: tried.append(rows) or packed_groups(bounds, rows),
    )
    bounds = range(0, 10**6 + 1, 4)
    packed = packed_groups(bounds, 260_000)
    balanced = onepass._balanced_groups(bounds, 260_000, packed)
    assert len(balanced) == len(packed) == 4
    assert max(4 * (b - a) for a, b in balanced) <= 250_000 + onepass._ALIGNED_ROWS
    assert len(tried) < 12


def workspace(n, width, vocab, dtype=torch.bfloat16, *, scratch=2**30, needs_weight=True, **head):
    """Of tensors without memory."""
    tensors = (
        torch.empty(n, width, dtype=dtype, device=META),
        torch.empty(vocab, width, dtype=dtype, device=META),
        None,
    )
    options = HeadOptions(scratch_bytes=scratch)
    needs = (True, needs_weight, False)
    return KernelWorkspace(tensors, options, n, for_gradient=True, needs=needs)


def test_the_room_of_the_accumulator_goes_to_a_single_chunk():
    """Rows of 64 KiB in a budget of 1,024 of them, and an accumulator of as many."""
    width, vocab = 1024, 2**14 - 1
    budget = 1024 * (2**16 + 6 * width)
    accumulator = 4 * vocab * width
    most = (budget + accumulator) // (2**16 + 6 * width)
    whole = workspace(most, width, vocab, scratch=budget)
    assert whole.rows == most
    assert whole.grad_weight_dtype == torch.bfloat16
    chunked = workspace(most + 1, width, vocab, scratch=budget)
    assert chunked.rows == 896  # what is left by a sixteenth for blocks, in steps of 128
    assert chunked.grad_weight_dtype is None
    # A frozen head has no accumulator, float16 keeps its own until a loss scale has come.
    for dtype, needed in ((torch.bfloat16, False), (torch.float16, True)):
        other = workspace(most, width, vocab, dtype, scratch=budget, needs_weight=needed)
        assert other.rows == 896
        assert workspace(1024, width, vocab, dtype, scratch=budget).rows == 1024


@pytest.mark.parametrize("vocab", [50_257, 50_304, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_logits_are_aligned(vocab, dtype):
    space = workspace(4, 8, vocab, dtype)
    assert space._buffer.shape == (4, vocab)
    assert space._buffer.stride(0) % 64 == 0
    assert space._memory.numel() * 4 < 4 * 4 * (vocab + 64)


@pytest.mark.parametrize(
    ("gib", "vocab", "width", "expected"),
    [
        (80, 128_256, 4096, 5 * 128_256 * 4096),
        (80, 248_320, 2048, 5 * 248_320 * 4096),  # 4,096 rows and more
        (80, 32_000, 576, 2**30),
        (24, 128_256, 4096, 24 * 2**26),  # a sixteenth
        (0.5, 128_256, 4096, 2**26),
    ],
)
def test_default_scratch_of_one_pass(gib, vocab, width, expected, monkeypatch):
    """It depends on the GPU and the head alone: chunks decide the order of sums."""
    properties = type("Properties", (), {"total_memory": int(gib * 2**30)})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    cuda = torch.device("cuda", 0)
    assert backend.one_pass_scratch_bytes(cuda, vocab, width) == expected
    assert backend.one_pass_scratch_bytes(torch.device("cpu"), vocab, width) == 2**26


@pytest.mark.parametrize("name", losses.available())
def test_losses_say_whether_a_response_may_be_without_a_gradient(name):
    """Far above and below a hinge: what is always active has a gradient everywhere."""
    spec = losses.get_loss(name)
    generator = torch.Generator().manual_seed(0)
    logps = 20 * torch.randn(64, 3, dtype=torch.float64, generator=generator)
    leaf = (logps - 60).requires_grad_()
    given = {
        "counts": torch.full((64, 3), 7),
        "reference_logps": torch.full((64, 3), -60.0, dtype=torch.float64),
        "scores": torch.randn(64, 3, dtype=torch.float64, generator=generator),
    }
    taken = {key: given[key] for key in spec.takes if key in given}
    (grad,) = torch.autograd.grad(spec.fn(leaf, **taken, **REQUIRED.get(name, {})).sum(), leaf)
    if spec.always_active:
        assert (grad != 0).all()
    elif name != "mixture":  # whose parts may be any
        assert (grad == 0).any()


def test_a_likelihood_of_single_responses_is_always_active():
    for size in (1, 2):
        objective = Objective.bind("sft", group_size=size, has_scores=False, options={})
        assert objective.always_active == (size == 1)


@pytest.mark.parametrize("loss", ["dpo", "dpo_hinge"])
@pytest.mark.parametrize("scratch_rows", [20, None])
def test_ignored_targets_as_zeros_equal_those_left_out(loss, scratch_rows):
    """As on a GPU with offsets on the host: whatever hidden states of ignored tokens hold."""
    pytest.importorskip("triton")
    problem = make_problem(
        [9, 4, 12, 7, 3, 8], ignored=0.3, dtype=torch.float32, scratch_rows=scratch_rows
    )
    objective = Objective.bind(
        loss,
        group_size=2,
        has_scores=False,
        has_reference=True,
        sft_weight=0.3,
        length_normalization=1.0,
        options={},
    )
    reference = -torch.arange(6.0)
    found = []
    for ours in (True, False):
        hidden = problem.hidden.detach().clone()
        if ours:
            hidden[problem.targets == -100] = torch.nan
        case = LinearProblem(
            hidden, problem.weight.detach(), None, problem.targets, problem.cu_seqlens,
            HeadOptions(scratch_bytes=problem.scratch_bytes),
        )  # fmt: skip
        rows = None
        if ours:
            case, counts, bounds = preference_autograd._with_ignored(case)
        else:
            rows, case, bounds = preference_autograd._keep_counted(case)
            counts = case.cu_seqlens.diff()
        denominators = objective.denominators(counts.view(-1, 2))
        needs = True, True, False
        loss_, sums, *_, grads = onepass.linear_preference_loss(
            case, None, reference, objective, denominators, needs, counts, bounds,
            functools.partial(triton_backend.workspace, needs=needs),
        )  # fmt: skip
        of_hidden = grads.hidden
        if rows is not None:
            of_hidden = torch.zeros_like(hidden).index_copy_(0, rows, of_hidden)
        found.append((loss_, sums, counts, of_hidden, grads.weight))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gaps", [(9.0, 9.0, 9.0), (-99.0, 9.0, 9.0)])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_chunks_of_16_bits_equal_a_single_one(impl, gaps):
    """The accumulator of several chunks, and the product of one that is rounded by itself; also
    where the rows of pairs without a gradient are left out."""
    pytest.importorskip("triton")
    base = make_problem([15] * 6, width=16, vocab=70, scale=0.3)
    scores = torch.stack([torch.tensor(gaps), torch.zeros(3)], dim=1).view(-1)
    options = {"loss": "plad_margin", "scores": scores, "sft_weight": 0.0}
    found = []
    for scratch in (2**24, 30_000):
        problem = base.to(torch.bfloat16)
        ours = fused_linear_preference_loss(
            *problem.inputs, impl=impl, scratch_bytes=scratch, **options
        )
        assert ours.active.tolist() == [gap > 0 for gap in gaps]
        ours.loss.backward()
        found.append((ours.loss, problem.hidden.grad.float(), problem.weight.grad.float()))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("scratch_rows", [None, 11])
@pytest.mark.parametrize("scale", [0.3, 3.0, 300.0])
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 30.0, "temperature": 0.7}])
def test_one_pass_by_the_products_of_a_gpu_meets_the_budget(
    scratch_rows, scale, options, monkeypatch
):
    """In bfloat16, with a frozen bias: pairs that are longer than a chunk, and one without a
    gradient, behind whose rows others are moved."""
    pytest.importorskip("triton")
    wide_products.install(monkeypatch)
    monkeypatch.setattr(kernel_workspace, "products_for", products.CudaHalfProducts)
    base = make_problem(
        [9, 4, 3, 5, 12, 0, 7, 1], width=16, vocab=70, ignored=0.2, scale=scale,
        scratch_rows=scratch_rows, **options,
    )  # fmt: skip
    scores = torch.tensor([1e5, 0.0, -1e5, 0.0, 1e5, 0.0, 1e5, 0.0])
    found = []
    for dtype, ours in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float64, False)):
        problem = base.to(torch.bfloat16).to(dtype)
        leaves = problem.leaves[:2]
        if problem.bias is not None:
            problem.bias.requires_grad_(False)
        if ours:
            result = fused_linear_preference_loss(
                *problem.inputs, impl="triton", loss="plad_margin", scores=scores, **problem.options
            )
            loss = result.loss
            assert result.active.tolist() == [True, False, True, True]
        else:
            sums, _ = oracle(problem)
            counts = segment_counts(problem.targets != -100, problem.cu_seqlens)
            loss = preference_loss(sums, counts, loss="plad_margin", scores=scores.to(sums.dtype))
        found.append(torch.autograd.grad(loss, leaves))
    for what, mine, same, truth in zip(("hidden", "weight"), *found, strict=True):
        assert not mine.isnan().any()
        assert_within_budget(mine, same, truth, what)


def test_offsets_elsewhere_are_refused_but_on_the_cpu():
    problem = make_problem([3, 2], dtype=torch.float32)
    elsewhere = problem.cu_seqlens.to("meta")
    for op in (fused_linear_preference_loss, linear_sequence_logprobs):
        with pytest.raises(UsageError, match="cu_seqlens must be on cpu"):
            op(*problem.inputs[:3], elsewhere)


def test_offsets_of_the_host_are_looked_at_before_they_are_sent():
    """Not by an assertion of the GPU, which says nothing of their values and ends the process."""
    pytest.importorskip("triton")
    from benchmarks.cuda_recorder import counting

    with counting() as recorder:
        head = recorder.empty(5, 64), recorder.empty(256, 64)
        targets = recorder.tensor(torch.arange(5))
        for wrong in ([0, 3, 4], [1, 3, 5], [0, 4, 2, 5]):
            offsets = torch.tensor(wrong)
            for op in (fused_linear_preference_loss, linear_sequence_logprobs):
                with pytest.raises(UsageError, match=re.escape(f"(5); got {wrong}")):
                    op(*head, targets, offsets, impl="triton")
            with pytest.raises(UsageError, match=re.escape(f"(5); got {wrong}")):
                sequence_logprobs(recorder.empty(5, 64), targets, offsets)
    assert recorder.waits == []
