"""The public ops with impl="triton", run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from plad_fast import (
    UsageError,
    fused_linear_preference_loss,
    linear_sequence_logprobs,
    sequence_logprobs,
)
from plad_fast.ops.backend import HeadOptions, LinearProblem, Upstream
from plad_fast.ops.impl import triton_backend
from tests.support.problems import assert_within_budget, make_problem, oracle, problems

pytest.importorskip("triton")

from plad_fast.kernels import launch

FEW = settings(max_examples=8)


def gradients(loss, problem):
    return torch.autograd.grad(loss, problem.leaves, allow_unused=True)


@FEW
@given(problem=problems())
def test_op_meets_the_budget(problem):
    """Against float64, as far off as the naive computation in float32 twice over."""
    problem = problem.to(torch.float32)
    upstream = torch.randn(len(problem.cu_seqlens) - 1, generator=torch.Generator().manual_seed(1))
    results = {}
    for name in ("truth", "torch", "ours"):
        case = problem.to(torch.float64 if name == "truth" else torch.float32)
        if name == "ours":
            got = linear_sequence_logprobs(*case.inputs, impl="triton", **case.options)
            sums, tokens = got.sums, got.token_logprobs
        else:
            sums, tokens = oracle(case)
        loss = (sums * upstream.to(sums.dtype)).sum() + 0.3 * tokens.square().sum()
        results[name] = [sums, tokens, *gradients(loss, case)]
    for what, ours, same, truth in zip(
        ("sums", "tokens", "hidden", "weight", "bias"),
        *(results[k] for k in ("ours", "torch", "truth")),
        strict=False,
    ):
        assert_within_budget(ours, same, truth, what, roundings=16)


@pytest.mark.parametrize("offset", [0.0, 30.0, -100.0, 1000.0, 1e4])
def test_gradients_of_large_logits_keep_their_digits(offset):
    """A log-sum-exp of 1000 is rounded at 3e-5, which each probability of its row would be off."""
    exact = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) + offset
    targets = torch.arange(6)[None]
    results = []
    for dtype, impl in ((torch.float32, "triton"), (torch.float32, None), (torch.float64, None)):
        logits = exact[None].to(dtype).requires_grad_()
        if impl is None:
            sums = logits.log_softmax(-1).gather(2, targets[..., None]).sum()
        else:
            sums = sequence_logprobs(logits, targets, impl=impl).sums.sum()
        results.append(torch.autograd.grad(sums, logits)[0])
    assert_within_budget(*results, f"gradient at {offset}")


def test_gradients_of_a_head_with_large_logits_meet_the_budget():
    """Two-phase and one pass. The products are exact, so that the lse alone is rounded."""
    problem = make_problem([7, 9], width=40, vocab=200, dtype=torch.float32, scale=6.0)
    for leaf in problem.leaves:
        leaf.data.mul_(16).round_().div_(16)
    truth, same = (gradients(oracle(p)[0].sum(), p) for p in (problem.to(torch.float64), problem))
    lse = linear_sequence_logprobs(*problem.inputs, return_lse=True, impl="triton").lse
    assert lse.max() > 100
    ours = linear_sequence_logprobs(*problem.inputs, impl="triton").sums.sum()
    one_pass = fused_linear_preference_loss(
        *problem.inputs, loss="sft", group_size=1, impl="triton"
    ).loss * len(problem.targets)
    for name, loss in (("two phases", ours), ("one pass", -one_pass)):
        for got, torchs, exact in zip(gradients(loss, problem), same, truth, strict=True):
            if got is not None:
                assert_within_budget(got, torchs, exact, name)


@FEW
@given(problem=problems(group_size=2))
def test_one_pass_equals_the_torch_backend(problem):
    problem = problem.to(torch.float32)
    results = [
        fused_linear_preference_loss(
            *problem.inputs, impl=impl, beta=3.0, sft_weight=0.2, **problem.options
        )
        for impl in ("triton", "torch")
    ]
    ours, want = results
    torch.testing.assert_close(ours.loss, want.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.sums, want.sums, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.counts, want.counts)
    for mine, other in zip(*(gradients(r.loss, problem) for r in results), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "scratch_rows", "bias"),
    [
        (torch.bfloat16, 3, True),
        (torch.bfloat16, 3, False),
        (torch.bfloat16, None, False),
        (torch.float16, 3, True),
        (torch.float32, 3, True),
        (torch.float16, None, True),
    ],
)
def test_error_budget_of_16_bits(dtype, scratch_rows, bias):
    """Both ways, and the losses in them: chunks of three rows, and one of all."""
    base = make_problem(
        [5, 4, 3, 6], width=48, vocab=140, bias=bias, softcap=20.0, scratch_rows=scratch_rows
    )
    rounded = base.to(dtype)
    truth = rounded.to(torch.float64)
    sums, _ = oracle(truth)
    want = [sums, *gradients(sums.sum(), truth)]
    sums, _ = oracle(rounded)
    same = [sums, *gradients(sums.sum(), rounded)]
    got = linear_sequence_logprobs(*rounded.inputs, impl="triton", **rounded.options)
    ours = [got.sums, *gradients(got.sums.sum(), rounded)]
    one_pass = fused_linear_preference_loss(
        *rounded.inputs,
        impl="triton",
        loss=lambda logps: logps.sum(1),
        num_groups=1,
        **rounded.options,
    )
    also_ours = [one_pass.sums, *gradients(one_pass.loss, rounded)]
    for what, mine, too, other, exact in zip(
        ("sums", "hidden", "weight", "bias")[: len(want)], ours, also_ours, same, want, strict=True
    ):
        assert_within_budget(mine, other, exact, what)
        assert_within_budget(too, other, exact, f"{what} in one pass")


@pytest.mark.parametrize("vocab", [128, 133])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scratch_rows", [2, 9, None])
def test_logits_through_memory(monkeypatch, dtype, scratch_rows, vocab):
    """By library products, as for wide hidden states on some GPUs: within the same budget."""
    problem = make_problem(
        [5, 0, 7, 6], width=40, vocab=vocab, bias=True, ignored=0.3, dtype=dtype, softcap=9.0,
        scratch_rows=scratch_rows, temperature=0.7,
    )  # fmt: skip
    problem.hidden.data[problem.targets == -100] = torch.nan
    upstream = torch.tensor([1.0, 2.0, 0.0, -3.0])
    options = {"impl": "triton", "return_entropy": True, "length_normalization": 0.5}
    options["entropy_order"] = 1 if vocab == 128 else 2
    results = []
    for least in (40, 41):
        sizes = launch.LibraryFrom(least, least)
        monkeypatch.setitem(launch.LIBRARY_FROM, (9, 0), sizes)
        got = linear_sequence_logprobs(*problem.inputs, **options, **problem.options)
        results.append([*got, *gradients((got.sums * upstream).sum(), problem)])
    monkeypatch.setitem(launch.LIBRARY_FROM, (9, 0), launch.LibraryFrom(40, 40))
    again = linear_sequence_logprobs(*problem.inputs, **options, **problem.options)
    again = [*again, *gradients((again.sums * upstream).sum(), problem)]
    assert not problem.hidden.isfinite().all()
    problem.hidden.data.nan_to_num_()
    truth, same = (
        [sums, tokens, *gradients((sums * upstream).sum(), p)]
        for p in (problem.to(torch.float64), problem)
        for sums, tokens in [oracle(p, 0.5)]
    )
    for ours, by_kernel, rerun in zip(*results, again, strict=True):
        if ours is not None:
            assert torch.equal(ours, rerun)
            torch.testing.assert_close(ours, by_kernel, rtol=0.02, atol=0.02)
    by_library = [x for x in results[0] if x is not None]
    for what, place, torchs, exact in zip(
        ("sums", "tokens", "hidden", "weight", "bias"), (0, 2, -3, -2, -1), same, truth, strict=True
    ):
        assert_within_budget(by_library[place], torchs, exact, what)


def test_frozen_inputs_get_no_gradient():
    problem = make_problem([4, 3], bias=True, dtype=torch.float32)
    problem.weight.requires_grad_(False)
    linear_sequence_logprobs(*problem.inputs, impl="triton", **problem.options).sums[0].backward()
    assert problem.weight.grad is None
    assert problem.hidden.grad[:4].any()
    assert not problem.hidden.grad[4:].any()


@pytest.mark.parametrize("skip_inactive", [True, False])
def test_rows_without_a_gradient(skip_inactive):
    """Left out of the products or multiplied as zeros: the same gradients."""
    results = []
    for impl in ("triton", "torch"):
        problem = make_problem([5, 4, 6], ignored=0.3, dtype=torch.float32)
        ours = linear_sequence_logprobs(
            *problem.inputs, impl=impl, skip_inactive=skip_inactive, **problem.options
        )
        (ours.sums * torch.tensor([1.0, 0.0, -2.0])).sum().backward()
        results.append((problem.hidden.grad, problem.weight.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("skip_inactive", [True, False])
def test_ignored_hidden_states_take_no_nan(impl, skip_inactive):
    problem = make_problem([3, 4], dtype=torch.float32)
    problem.targets[2] = problem.targets[6] = -100
    kept = torch.arange(7)[problem.targets != -100]
    want = linear_sequence_logprobs(*problem.inputs, impl=impl)
    want_hidden, want_weight = gradients(want.sums.sum(), problem)
    with torch.no_grad():
        problem.hidden[2], problem.hidden[6] = torch.nan, torch.inf
    ours = linear_sequence_logprobs(*problem.inputs, impl=impl, skip_inactive=skip_inactive)
    of_hidden, of_weight = gradients(ours.sums.sum(), problem)
    torch.testing.assert_close(ours.sums, want.sums)
    torch.testing.assert_close(of_weight, want_weight)
    torch.testing.assert_close(of_hidden[kept], want_hidden[kept])
    assert not of_hidden[[2, 6]].any()


@pytest.mark.parametrize("order", [1, 2])
def test_lse_and_entropy_on_request(order):
    problem = make_problem([5, 0, 3], ignored=0.2, temperature=0.7, dtype=torch.float32)
    asked = {"return_lse": True, "return_entropy": True, "entropy_order": order}
    both = [
        linear_sequence_logprobs(*problem.inputs, impl=impl, **asked, **problem.options)
        for impl in ("triton", "torch")
    ]
    for mine, other in zip(*both, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    weights = torch.arange(8.0)
    grads = [gradients((r.lse * weights).sum(), problem) for r in both]
    for mine, other in zip(*([g[:2] for g in grads]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_stored_logits(padded):
    shape = (3, 5, 19) if padded else (15, 19)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(3), requires_grad=True)
    targets = torch.randint(19, shape[:-1], generator=torch.Generator().manual_seed(4))
    targets.view(-1)[4] = -100
    bounds = () if padded else (torch.tensor([0, 5, 10, 15]),)
    results = []
    for impl in ("triton", "torch"):
        ours = sequence_logprobs(logits, targets, *bounds, softcap=3.0, impl=impl)
        (gradient,) = torch.autograd.grad((ours.sums * torch.tensor([1.0, 0, 2])).sum(), logits)
        results.append((*ours[:3], gradient))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_reruns_are_bit_identical(impl):
    problem = make_problem([9, 4, 6, 6], width=17, vocab=133, dtype=torch.bfloat16)
    seen = set()
    for _ in range(3):
        ours = linear_sequence_logprobs(*problem.inputs, impl=impl, **problem.options)
        tensors = [ours.sums, *gradients(ours.sums.square().sum(), problem)]
        one_pass = fused_linear_preference_loss(
            *problem.inputs, impl=impl, beta=9.0, **problem.options
        )
        tensors += [one_pass.loss, *gradients(one_pass.loss, problem)]
        seen.add(b"".join(t.detach().float().numpy().tobytes() for t in tensors))
    assert len(seen) == 1


def test_refusals_name_the_reason(monkeypatch):
    problem = make_problem([3], dtype=torch.float64)
    with pytest.raises(UsageError, match="float64 is the torch backend's"):
        linear_sequence_logprobs(*problem.inputs, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    problem = make_problem([3], dtype=torch.float32)
    with pytest.raises(UsageError, match="on the CPU"):
        linear_sequence_logprobs(*problem.inputs, impl="triton")


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_ignored_rows_of_stored_logits_take_no_nan(impl):
    """As from a mean over tokens of which there are none."""
    logits = torch.randn(3, 5, requires_grad=True)
    ours = sequence_logprobs(
        logits, torch.tensor([1, -100, 2]), torch.tensor([0, 3]), impl=impl
    ).token_logprobs
    (gradient,) = torch.autograd.grad(ours, logits, torch.tensor([1.0, float("nan"), 1.0]))
    assert gradient.isfinite().all()
    assert not gradient[1].any()


def test_float16_gradients_too_small_for_a_finite_inverse():
    """The scale that brings them into the range of float16 must not overflow the other way."""
    from plad_fast.kernels.logits_rows import logits_rows_backward, logits_rows_forward

    from plad_fast.ops.impl.products import CudaHalfProducts

    options = {
        "bias": None, "softcap": None, "logit_scale": 1.0, "temperature": 1.0, "ignore_index": -1
    }  # fmt: skip
    logits, targets = torch.randn(2, 9), torch.tensor([0, 8])
    rows = logits_rows_forward(logits, targets, **options, entropy_order=0)
    scales = CudaHalfProducts(torch.zeros(9, 2, dtype=torch.float16), 64)
    for size in (0.0, 1e-42, 1e-37, 1e-3, 1e30):
        scale = scales.operand_scale(torch.tensor(size))
        out = logits_rows_backward(
            logits, targets, *rows[1:4], torch.full((2,), size), None, **options,
            out=torch.empty(2, 9, dtype=torch.float16), scale=scale,
        )  # fmt: skip
        assert (out.float() * scale).isfinite().all()


class Rows(TorchDispatchMode):
    """The most rows of hidden states that were ever copied at once."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.index and result.ndim == 2:
            self.most = max(self.most, len(result))
        return result


def test_only_a_chunk_of_active_rows_is_copied():
    """What `scratch_bytes` bounds does not grow with the tokens that have a gradient."""
    base = make_problem([40, 40], width=24, vocab=50, dtype=torch.float32, scratch_rows=4)
    problem = LinearProblem(
        base.hidden.detach(), base.weight.detach(), None, base.targets, base.cu_seqlens,
        HeadOptions(scratch_bytes=4 * 50 * 4 * 2),
    )  # fmt: skip
    statistics = triton_backend.linear_forward(problem, 0)
    grad = torch.ones(80)
    grad[::3] = 0.0
    with Rows() as rows:
        triton_backend.linear_backward(
            problem, statistics.lse, statistics.tail, statistics.miss, Upstream(grad, None),
            (True, True, False), True,
        )  # fmt: skip
    assert 0 < rows.most <= 8
