"""The op against the float64 oracle: values, gradients, edge cases, memory of poison."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_fast import UsageError, linear_sequence_logprobs
from plad_fast.losses.terms import segment_sums
from plad_fast.ops.impl import products
from plad_fast.ops.reference import reference_logits
from tests.support.problems import (
    assert_within_budget,
    make_problem,
    oracle,
    problems,
    upstream,
)

HALVES = [torch.bfloat16, torch.float16]


@given(
    problem=problems(),
    alpha=st.sampled_from([0.0, 0.6, 1.0]),
    kind=st.sampled_from(["random", "sparse", "zero"]),
)
def test_values_and_gradients_equal_the_oracle(problem, alpha, kind):
    """Any shape, option and upstream gradient, to float64 precision."""
    ours = linear_sequence_logprobs(*problem.inputs, length_normalization=alpha, **problem.options)
    sums, tokens = oracle(problem, alpha)
    torch.testing.assert_close(ours.sums, sums)
    torch.testing.assert_close(ours.token_logprobs, tokens)
    grads = upstream(sums, kind), upstream(tokens, kind, seed=2)
    got = torch.autograd.grad([ours.sums, ours.token_logprobs], problem.leaves, grads)
    want = torch.autograd.grad([sums, tokens], problem.leaves, grads)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("scratch_rows", [1, 4, None], ids=["row by row", "chunks", "at once"])
@pytest.mark.parametrize("softcap", [None, 0.9])
def test_gradcheck(scratch_rows, softcap):
    """Numerical derivatives, of the sums, the tokens and the log-sum-exp."""
    problem = make_problem(
        [3, 0, 5], bias=True, ignored=0.2, scratch_rows=scratch_rows, softcap=softcap,
        logit_scale=0.8, temperature=1.4, vocab=7, width=3,
    )  # fmt: skip

    def op(hidden, weight, bias):
        options = {**problem.options, "bias": bias}
        out = linear_sequence_logprobs(
            hidden, weight, problem.targets, problem.cu_seqlens,
            length_normalization=0.5, return_lse=True, **options,
        )  # fmt: skip
        return out.sums, out.token_logprobs, out.lse

    assert torch.autograd.gradcheck(op, tuple(problem.leaves))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("scratch_rows", [5, None])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_error_budget(dtype, scratch_rows, softcap):
    """No worse than twice torch's own error, with logits of realistic size."""
    problem = make_problem(
        [30, 7, 41], width=64, vocab=503, bias=True, scale=0.4, softcap=softcap,
        scratch_rows=scratch_rows,
    ).to(dtype)  # fmt: skip
    truth, yardstick = problem.to(torch.float64), problem.to(dtype)
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    results = [oracle(p) for p in (yardstick, truth)]
    assert ours.sums.dtype == torch.float32
    assert_within_budget(ours.token_logprobs, results[0][1], results[1][1], "token_logprobs")
    assert_within_budget(ours.sums, results[0][0], results[1][0], "sums")
    grads = [
        torch.autograd.grad(sums, p.leaves, upstream(sums, "random"))
        for sums, p in (
            (ours.sums, problem), (results[0][0], yardstick), (results[1][0], truth)
        )
    ]  # fmt: skip
    for name, got, same, want in zip(("hidden", "weight", "bias"), *grads, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, same, want, f"d_{name}")


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_logits_are_not_rounded_to_16_bits(dtype):
    """Products of 16-bit operands are exact to float32 or nearly: 2**-15 of the largest logit."""
    problem = make_problem([64], width=64, vocab=503, dtype=dtype, scale=1.0)
    truth = problem.to(torch.float64)
    logits = reference_logits(truth.hidden, truth.weight)
    want = oracle(truth)[1]
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    assert (ours.token_logprobs - want).abs().max() < 2**-15 * logits.abs().max()


def test_confident_targets_keep_their_digits():
    """At p = 1 - 1e-6 the gradient is 1 - p, row by row; torch itself has two digits left there."""
    problem = make_problem([64], width=8, vocab=37, dtype=torch.float32)
    with torch.no_grad():
        problem.weight.zero_()
        problem.weight[:, 0] = torch.linspace(-1, 0, 37)
        problem.weight[5, 0] = 1.0
        problem.hidden.zero_()
        problem.hidden[:, 0] = torch.linspace(12, 17, 64)
    problem.targets.fill_(5)
    truth = problem.to(torch.float64)
    rest = -torch.expm1(oracle(truth)[1])
    assert 0 < rest.min() < 1e-6 < rest.max() < 1e-3
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    want = oracle(truth)[1]
    assert ((ours.token_logprobs.double() - want) / want).abs().max() < 1e-5
    (got,) = torch.autograd.grad(ours.sums.sum(), problem.hidden)
    (want,) = torch.autograd.grad(oracle(truth)[0].sum(), truth.hidden)
    error = (got.double() - want)[:, 0].abs() / want[:, 0].abs()
    assert error.max() < 1e-5
    (torchs,) = torch.autograd.grad(oracle(problem)[0].sum(), problem.hidden)
    assert ((torchs.double() - want)[:, 0].abs() / want[:, 0].abs()).max() > 1e-2


def test_logits_far_beyond_the_softcap():
    """tanh is flat there: gradients vanish, and nothing overflows."""
    problem = make_problem([9], scale=1e3, softcap=2.0, dtype=torch.float32)
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    sums, _ = oracle(problem)
    torch.testing.assert_close(ours.sums, sums)
    got = torch.autograd.grad(ours.sums.sum(), problem.leaves)
    want = torch.autograd.grad(sums.sum(), problem.leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_masked_vocabulary_entry():
    """A bias of -inf takes an entry out of the softmax, as logit masks do."""
    problem = make_problem([6], bias=True, vocab=11)
    with torch.no_grad():
        problem.bias[3] = -torch.inf
        problem.targets[problem.targets == 3] = 4
    ours = linear_sequence_logprobs(*problem.inputs, return_entropy=True, **problem.options)
    (d_hidden,) = torch.autograd.grad(ours.sums.sum(), problem.hidden)
    assert d_hidden.isfinite().all()
    assert ours.entropy.isfinite().all()
    torch.testing.assert_close(ours.sums, oracle(problem)[0])


@pytest.mark.parametrize("missing", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(missing):
    problem = make_problem([5, 4], bias=True)
    names = [n for n in ("hidden", "weight", "bias") if n != missing]
    sums = oracle(problem)[0]
    want = torch.autograd.grad(sums.prod(), [getattr(problem, n) for n in names])
    getattr(problem, missing).requires_grad_(False)
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    ours.sums.prod().backward()
    assert getattr(problem, missing).grad is None
    for name, w in zip(names, want, strict=True):
        torch.testing.assert_close(getattr(problem, name).grad, w)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens_at_all(lengths):
    """N = 0: zeros with a graph, so that a loss on them can be added and differentiated."""
    problem = make_problem(lengths)
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    assert ours.sums.tolist() == [0.0] * len(lengths)
    ours.sums.sum().backward()
    assert problem.hidden.grad.shape == (0, 8)
    assert not problem.weight.grad.any()


def test_all_targets_ignored():
    problem = make_problem([3, 2], ignored=1.0)
    ours = linear_sequence_logprobs(*problem.inputs, length_normalization=1.0, **problem.options)
    assert ours.sums.tolist() == [0.0, 0.0]
    assert ours.counts.tolist() == [0, 0]
    ours.sums.sum().backward()
    assert not problem.hidden.grad.any()


def test_ignored_rows_never_reach_the_product():
    """A prompt's or a pad's hidden state may hold anything, NaN included."""
    problem = make_problem([4, 4])
    problem.targets[2] = -100
    with torch.no_grad():
        problem.hidden[2] = torch.nan
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    ours.sums.sum().backward()
    assert ours.sums.isfinite().all()
    assert problem.weight.grad.isfinite().all()
    assert not problem.hidden.grad[2].any()


def test_lse_and_entropy_on_request():
    problem = make_problem([4, 3], ignored=0.3, bias=True, softcap=3.0)
    ours = linear_sequence_logprobs(
        *problem.inputs, return_lse=True, return_entropy=True, **problem.options
    )
    logits = reference_logits(problem.hidden, problem.weight, problem.bias, **problem.spec)
    keep = problem.targets != -100
    logprobs = logits.log_softmax(1)
    torch.testing.assert_close(ours.lse, logits.logsumexp(1) * keep)
    torch.testing.assert_close(ours.entropy, -(logprobs.exp() * logprobs).sum(1).detach() * keep)
    assert not ours.entropy.requires_grad
    of_order_2 = linear_sequence_logprobs(
        *problem.inputs, return_entropy=True, entropy_order=2, **problem.options
    )
    collision = -logprobs.exp().square().sum(1).log().detach()
    torch.testing.assert_close(of_order_2.entropy, collision * keep)
    assert not of_order_2.entropy.requires_grad
    plain = linear_sequence_logprobs(*problem.inputs, **problem.options)
    assert plain.lse is None
    assert plain.entropy is None


@pytest.mark.parametrize("order", [0, 3, True, "2"])
def test_entropies_of_other_orders_are_refused(order):
    problem = make_problem([4, 3])
    with pytest.raises(UsageError, match=f"entropy_order.*{order}"):
        linear_sequence_logprobs(*problem.inputs, return_entropy=True, entropy_order=order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_entropies_meet_the_budget(dtype, order, scale):
    """From nearly uniform to nearly certain, over more words than a block of rows has."""
    problem = make_problem([6], width=16, vocab=5003, scale=scale, dtype=dtype, scratch_rows=3)
    ours = linear_sequence_logprobs(
        *problem.inputs, return_entropy=True, entropy_order=order, impl="torch", **problem.options
    )
    found = []
    for case in (problem, problem.to(torch.float64)):
        logits = reference_logits(case.hidden, case.weight, case.bias, **case.spec).detach()
        if logits.dtype != torch.float64:
            logits = logits.float()
        logprobs = logits.log_softmax(1)
        shannon = -(logprobs.exp() * logprobs).sum(1)
        found.append(shannon if order == 1 else -(2 * logprobs).logsumexp(1))
    assert_within_budget(ours.entropy, *found, "entropy", roundings=16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_reruns_are_bit_identical(dtype):
    results = []
    for _ in range(2):
        problem = make_problem([50, 3, 20], width=33, vocab=211, dtype=dtype, scratch_rows=7)
        ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
        grads = torch.autograd.grad(ours.sums, problem.leaves, upstream(ours.sums, "random"))
        results.append([ours.sums, ours.token_logprobs, *grads])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_uninitialised_memory_is_never_read(monkeypatch):
    """Every buffer that is not written before it is read would show as NaN."""
    real_empty, real_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_like(*a, **k)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = make_problem([5, 0, 6], dtype=dtype, bias=True, softcap=3.0, scratch_rows=3)
        ours = linear_sequence_logprobs(*problem.inputs, return_entropy=True, **problem.options)
        ours.sums.sum().backward()
        assert ours.sums.isfinite().all()
        assert ours.entropy.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in problem.leaves)


@pytest.mark.parametrize("cast_weight", [False, True])
def test_autocast_multiplies_in_16_bits_and_sums_in_32(cast_weight):
    """float32 parameters under autocast: bfloat16 product, float32 results, float32 gradients."""
    problem = make_problem([9, 8], width=16, dtype=torch.float32)
    hidden = problem.hidden.detach().bfloat16() if cast_weight else problem.hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_sequence_logprobs(hidden, *problem.inputs[1:], **problem.options)
    ours.sums.sum().backward()
    assert ours.sums.dtype == torch.float32
    assert problem.weight.grad.dtype == torch.float32
    half = problem.to(torch.bfloat16)
    want = linear_sequence_logprobs(*half.inputs, **half.options)
    assert torch.equal(ours.sums, want.sums)


def test_only_rows_with_a_gradient_are_computed_again(monkeypatch):
    seen = []
    real = products.Products.grad_hidden
    monkeypatch.setattr(
        products.Products,
        "grad_hidden",
        lambda self, operand: seen.append(len(operand.values)) or real(self, operand),
    )
    problem = make_problem([3, 4, 5])
    ours = linear_sequence_logprobs(*problem.inputs, **problem.options)
    (ours.sums * torch.tensor([1.0, 0.0, 2.0])).sum().backward()
    assert seen == [8]


def test_sums_do_not_lose_what_float32_would():
    values = torch.full((40_000,), -11.1)
    ours = segment_sums(values, torch.tensor([0, 40_000]))
    assert ours.item() == values.double().sum().float().item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 8)}, r"hidden must have shape \(N, D\)"),
        ({"weight": torch.zeros(37, 9)}, "agree in their last dimension"),
        ({"weight": torch.zeros(0, 8)}, "sharded parameter"),
        ({"weight": torch.zeros(37, 8).bfloat16()}, "must be alike"),
        ({"hidden": torch.zeros(6, 8).int()}, "hidden must be one of"),
        ({"bias": torch.zeros(36)}, r"bias .* 37 rows of weight, got shape \(36,\)"),
        ({"targets": torch.zeros(5).long()}, r"targets must have shape \(6,\)"),
        ({"targets": torch.zeros(6)}, "targets must be one of int64, int32, got torch.float32"),
        ({"targets": torch.full((6,), 37)}, r"lie in \[0, 37\)"),
        ({"targets": torch.full((6,), -1)}, r"lie in \[0, 37\)"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "never fall"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "end at the number of tokens"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be one of int64.*float32"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"length_normalization": -0.5}, "length_normalization"),
        ({"scratch_bytes": 0}, "scratch_bytes"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; this version has: auto, triton, torch"),
    ],
)
def test_refusals_say_what_was_wrong(change, message):
    arguments = {
        "hidden": torch.zeros(6, 8),
        "weight": torch.zeros(37, 8),
        "targets": torch.zeros(6).long(),
        "cu_seqlens": torch.tensor([0, 2, 6]),
    }
    with pytest.raises(UsageError, match=message):
        linear_sequence_logprobs(**{**arguments, **change})
