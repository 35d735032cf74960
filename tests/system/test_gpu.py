"""Tests that need a real GPU: `pytest -m gpu`. Skipped, with the reason, where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from plad_fast import (
    fused_linear_preference_loss,
    linear_sequence_logprobs,
    preference_loss,
    sequence_logprobs,
)
from tests.support.naive import attention_by_definition, features, naive_logprobs, relative
from tests.support.problems import Problem, assert_within_budget, make_problem, oracle
from tests.support.tiny_models import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(problem: Problem, dtype: torch.dtype) -> Problem:
    def move(tensor):
        return None if tensor is None else tensor.detach().cuda().to(dtype).requires_grad_()

    return Problem(
        move(problem.hidden),
        move(problem.weight),
        move(problem.bias),
        problem.targets.cuda(),
        problem.cu_seqlens.cuda(),
        problem.spec,
        problem.scratch_bytes,
    )


def problem_of(dtype: torch.dtype, vocab: int = 4099, **options) -> Problem:
    lengths = [130, 61, 0, 257]
    return on_gpu(
        make_problem(lengths, width=200, vocab=vocab, scale=0.3, seed=5, **options), dtype
    )


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(dtype, impl):
    problem = problem_of(dtype, bias=True, softcap=30.0, ignored=0.1, scratch_rows=100)
    truth = problem.to(torch.float64)
    results = []
    for case in (truth, problem):
        sums, _ = oracle(case)
        results.append([sums, *torch.autograd.grad(sums.sum(), case.leaves)])
    ours = linear_sequence_logprobs(*problem.inputs, impl=impl, **problem.options)
    one_pass = fused_linear_preference_loss(
        *problem.inputs,
        impl=impl,
        loss=lambda logps: logps.sum(1),
        num_groups=1,
        **problem.options,
    )
    for result in (
        [ours.sums, *torch.autograd.grad(ours.sums.sum(), problem.leaves)],
        [one_pass.sums, *torch.autograd.grad(one_pass.loss, problem.leaves)],
    ):
        for what, mine, exact, same in zip(
            ("sums", "hidden", "weight", "bias"), result, *results, strict=True
        ):
            assert_within_budget(mine, same, exact, what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_logits(dtype):
    logits = torch.randn(64, 5003, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(5003, (64,), device="cuda")
    bounds = torch.tensor([0, 20, 64], device="cuda")
    results = []
    for impl in ("triton", "torch"):
        ours = sequence_logprobs(logits, targets, bounds, impl=impl)
        results.append((ours.sums, *torch.autograd.grad(ours.sums.sum(), logits)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_twenty_reruns_are_bit_identical():
    problem = problem_of(torch.bfloat16)
    seen = set()
    for _ in range(20):
        ours = linear_sequence_logprobs(*problem.inputs, impl="triton", **problem.options)
        grads = torch.autograd.grad(ours.sums.sum(), problem.leaves)
        seen.add(b"".join(t.float().cpu().numpy().tobytes() for t in (ours.sums.detach(), *grads)))
    assert len(seen) == 1


def test_nothing_waits_for_the_device():
    """Neither the forward, nor a backward that skips nothing."""
    problem = problem_of(torch.bfloat16)

    def step() -> None:
        ours = linear_sequence_logprobs(
            *problem.inputs, impl="triton", skip_inactive=False, **problem.options
        )
        preference_loss(ours.sums, ours.counts, loss="plad_ranking", sft_weight=0.1).backward()

    run_without_waiting(step)


def run_without_waiting(step: Callable[[], None]) -> None:
    step()  # compiles, and probes the loss
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scratch_rows", [400, None])
def test_one_pass_of_a_smooth_loss_does_not_wait(scratch_rows):
    """With offsets on the CPU; in chunks, too."""
    problem = problem_of(torch.bfloat16, ignored=0.1, scratch_rows=scratch_rows)
    offsets = problem.cu_seqlens.cpu()

    def step() -> None:
        fused_linear_preference_loss(
            *problem.inputs[:3], offsets, impl="triton", loss="simpo", **problem.options
        ).loss.backward()

    run_without_waiting(step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [128_256, 50_257])
def test_narrow_gradients_in_the_rows_of_their_logits(dtype, vocab):
    """Thousands of programs, whose warps must not overtake one another: the same bits as elsewhere,
    compacted or not."""
    from plad_fast.kernels.logits_rows import logits_rows_backward, logits_rows_forward

    from plad_fast.ops.impl.workspace import compacting_order

    count, width = 4096, -(-vocab // 64) * 64
    memory = torch.randn(count, width, device="cuda")
    logits = memory[:, :vocab]
    targets = torch.randint(vocab, (count,), device="cuda")
    options = {
        "bias": None, "softcap": None, "logit_scale": 1.0, "temperature": 1.0, "ignore_index": -1
    }  # fmt: skip
    statistics = logits_rows_forward(logits, targets, entropy_order=0, **options)
    given = targets, *statistics[1:4], torch.randn(count, device="cuda"), None
    active = torch.rand(count) < 0.5
    for order in (None, compacting_order(active).cuda()):
        rows = slice(None) if order is None else order
        elsewhere = torch.empty(count, vocab, dtype=dtype, device="cuda")
        want = logits_rows_backward(logits, *given, out=elsewhere, **options)[rows]
        own = memory.clone()
        out = own.view(dtype)[: len(want), :vocab]
        found = logits_rows_backward(
            own[:, :vocab], *given, out=out, rows=order, row_width=width, **options
        )
        assert torch.equal(found, want)


@pytest.mark.parametrize("one_pass", [False, True])
def test_around_the_ops_cuda_graphs_are_captured(one_pass):
    """The ops may wait for the device, and are left out of the graphs."""
    problem = problem_of(torch.bfloat16)

    def loss(hidden, *rest):
        inputs = 2 * hidden, *rest
        if one_pass:
            return fused_linear_preference_loss(*inputs, **problem.options).loss
        return linear_sequence_logprobs(*inputs, **problem.options).sums.sum()

    want = torch.autograd.grad(loss(*problem.inputs), problem.leaves)
    compiled = torch.compile(loss, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = torch.autograd.grad(compiled(*problem.inputs), problem.leaves)
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine, other)


def test_extra_memory_stays_within_the_budget():
    problem = on_gpu(make_problem([2048, 2048], width=512, vocab=128_256), torch.bfloat16)
    scratch = 2**28
    accumulator = problem.weight.numel() * 4
    gradients = sum(t.numel() * t.element_size() for t in problem.leaves)
    for op in (linear_sequence_logprobs, fused_linear_preference_loss):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours = op(*problem.inputs, impl="triton", scratch_bytes=scratch)
        (ours.sums.sum() if op is linear_sequence_logprobs else ours.loss).backward()
        extra = torch.cuda.max_memory_allocated() - before
        problem.hidden.grad = problem.weight.grad = None
        assert extra <= scratch + accumulator + gradients + 2**25


def test_float32_is_not_tf32_unless_asked_for():
    problem = problem_of(torch.float32)
    exact, _ = oracle(problem.to(torch.float64))
    ours = linear_sequence_logprobs(*problem.inputs, impl="triton", **problem.options).sums
    assert (ours - exact).abs().max() < 2e-6 * exact.abs().max() + 1e-4


def test_one_compiled_graph_for_all_lengths():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def loss_of(hidden, weight, targets, cu_seqlens):
        ours = linear_sequence_logprobs(hidden, weight, targets, cu_seqlens)
        return preference_loss(ours.sums, ours.counts, beta=5.0)

    for lengths in ([40, 30], [70, 20, 33, 90]):
        problem = on_gpu(make_problem(lengths, width=64, vocab=999), torch.bfloat16)
        got = loss_of(*problem.inputs)
        ours = linear_sequence_logprobs(*problem.inputs)
        want = preference_loss(ours.sums, ours.counts, beta=5.0)
        torch.testing.assert_close(got, want)


def rounded_attention(tensors, dtype, attend):
    """Output and gradients of `attend` on rounded copies, on the CPU in float64."""
    leaves = [x.cuda().to(dtype).requires_grad_() for x in tensors]
    out = attend(*leaves)
    upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
    return [x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, leaves, upstream))]


@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        (name, options)
        for name in ("flash", "varlen", "sdpa", "flex", "eager")
        for options in (
            {},
            {"sliding_window": 16},
            {"scaling": 0.2},
            {"softcap": 2.0, "scaling": 0.2},
        )
        if name not in ("varlen", "sdpa") or "softcap" not in options
    ],
)
def test_attention_over_a_packed_row(implementation, options):
    """No worse than plain products over the whole row, in the same 16 bits."""
    from plad_fast.data.row_layout import RowLayout
    from plad_fast.models.attention.packed import packed_attention
    from plad_fast.models.attention.varlen import load_flash, load_varlen

    if implementation == "flash" and load_flash() is None:
        pytest.skip("flash-attn is not installed")
    if implementation == "varlen" and load_varlen() is None:
        pytest.skip("this PyTorch has no varlen_attn for this GPU")
    layout = RowLayout(((70, 20, 33), (5,), (40, 1, 60, 7, 130), (64, 64, 64)))
    draw = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, layout.num_tokens, 64, generator=draw).bfloat16().float()
        for heads in (8, 2, 2)
    ]
    names = {"scaling": "scale", "sliding_window": "window"}
    renamed = {names.get(name, name): value for name, value in options.items()}

    def by_definition(*leaves):
        return attention_by_definition(*leaves, layout, **renamed)

    def ours(*leaves):
        return packed_attention(
            nn.Module(), *leaves, layout, implementation=implementation, **options
        )

    truth = rounded_attention(tensors, torch.float64, by_definition)
    yardstick = rounded_attention(tensors, torch.bfloat16, by_definition)
    found = rounded_attention(tensors, torch.bfloat16, ours)
    for mine, other, true in zip(found, yardstick, truth, strict=True):
        assert relative(mine, true) <= 2 * relative(other, true) + 2**-8
    if implementation in ("flash", "varlen"):  # flash is asked for a fixed order of additions
        with fixed_order() if implementation == "varlen" else contextlib.nullcontext():
            first, again = (rounded_attention(tensors, torch.bfloat16, ours) for _ in range(2))
        assert all(map(torch.equal, again, first))


@contextlib.contextmanager
def fixed_order():
    """PyTorch's own switch, off again behind."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("widths", [(64, 64), (80, 40), (192, 128), (256, 256)])
def test_varlen_takes_heads_of_any_width(widths):
    """In one call for the row, against one of sdpa for each span."""
    from plad_fast.data.row_layout import RowLayout
    from plad_fast.models.attention.packed import packed_attention
    from plad_fast.models.attention.varlen import load_varlen

    if load_varlen() is None:
        pytest.skip("this PyTorch has no varlen_attn for this GPU")
    layout = RowLayout(((70, 20, 33), (5,), (1, 1, 1)))
    draw = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, layout.num_tokens, width, generator=draw).bfloat16().float()
        for heads, width in zip((8, 2, 2), (widths[0], *widths), strict=True)
    ]

    def attend(name):
        def ours(*leaves):
            return packed_attention(nn.Module(), *leaves, layout, implementation=name)

        return ours

    truth = rounded_attention(tensors, torch.float64, attend("eager"))
    yardstick = rounded_attention(tensors, torch.bfloat16, attend("sdpa"))
    found = rounded_attention(tensors, torch.bfloat16, attend("varlen"))
    for mine, other, true in zip(found, yardstick, truth, strict=True):
        assert relative(mine, true) <= 2 * relative(other, true) + 2**-8


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_shared_prompts_in_mixed_precision(layout):
    """By default flash-attn is taken where it is installed, under autocast too."""
    from plad_fast.data.packing import PreferenceCollator, to_device
    from plad_fast.models.head import causal_lm_logprobs
    from plad_fast.models.sharing import prepare

    groups = features([90, 70, 30], [(50, 30), (10, 40), (60, 60)])
    expected = torch.cat(naive_logprobs(make_model("mistral"), groups))
    model = make_model("mistral").cuda()
    batch = PreferenceCollator(0, 2, layout=layout)(groups)
    with torch.autocast("cuda", torch.bfloat16):
        prepare(model, layout)
        found = causal_lm_logprobs(model, to_device(batch, torch.device("cuda")))
    assert relative(found.token_logprobs.cpu().float(), expected) < 0.05
    found.sums.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
