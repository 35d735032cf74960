"""How the linear kernels read operands and what they launch; on small blocks, as `test_linear`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from plad_fast.kernels import launch
from plad_fast.kernels.launch import LinearConfig
from plad_fast.kernels.linear_backward import logits_gradient
from plad_fast.kernels.linear_forward import launch_linear_forward

from tests.support import interpreter
from tests.support.linear_cases import (
    DTYPES,
    Case,
    count_products,
    expected_gradient,
    expected_statistics,
)
from tests.support.problems import assert_within_budget, make_problem, normal

pytestmark = interpreter.MARKS


def test_strided_vectors():
    """Bias, targets, statistics and gradients need not be contiguous."""

    def strided(vector: Tensor) -> Tensor:
        return torch.stack([vector, torch.zeros_like(vector)], 1)[:, 0]

    problem = make_problem([5, 4], bias=True, ignored=0.2, dtype=torch.float32)
    case = Case(problem)
    grad, grad_lse = normal(9, seed=1), normal(9, seed=2)
    want = case.forward(), case.backward(case.forward(), grad, grad_lse)
    problem.bias.data = strided(problem.bias.data)
    problem.targets = strided(problem.targets)
    ours = case.forward()
    for mine, other in zip(ours, want[0], strict=True):
        assert torch.equal(mine, other)
    of_tokens = {name: getattr(ours, name) for name in ("lse", "tail", "miss")}
    ours = ours._replace(**{name: strided(x) for name, x in of_tokens.items()})
    got = case.backward(ours, strided(grad), strided(grad_lse))
    assert torch.equal(got, want[1])


def test_rows_that_are_one_row():
    """Expanded: a stride of 0."""
    problem = make_problem([5], dtype=torch.bfloat16, width=16)
    one_row = problem.hidden.detach()[:1].expand(5, 16)
    options = {**Case(problem).options, "entropy_order": 1}
    expanded, copied = (
        launch_linear_forward(hidden, problem.weight.detach(), None, problem.targets, **options)
        for hidden in (one_row, one_row.contiguous())
    )
    for mine, other in zip(expanded, copied, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lean", [True, False])
def test_the_heuristic_s_own_tiles(lean, dtype):
    """What is launched without a configuration, on operands of every kind."""
    problem = make_problem([9, 8], width=72, vocab=176, bias=not lean, dtype=dtype)
    want = None
    for layouts in (("contiguous",) * 2, ("shifted", "gaps"), ("gaps", "transposed")):
        case = Case(problem, config=None, layouts=layouts)
        ours = case.forward()
        got = [*ours, case.backward(ours, normal(17, seed=1), normal(17, seed=2))]
        want = want or got
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("width", [8, 32, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_descriptors_and_pointers_agree(monkeypatch, dtype, width):
    """To the last bit; edges that the hardware fills with zeros are those that a mask fills."""
    problem = make_problem([19], width=width, vocab=37, bias=True, dtype=dtype)
    case = Case(problem)
    results = []
    for loads in ("tma", "vector", "scalar"):
        monkeypatch.setattr(launch, "load_kind", lambda *_, kind=loads: kind)
        ours = case.forward()
        results.append([*ours, case.backward(ours, normal(19, seed=1))])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("argument", ["hidden", "weight", "out"])
def test_offsets_beyond_31_bits(sparse, argument, dtype):
    """Rows so far apart that the last begin past 2**31 entries."""
    problem = make_problem([40], vocab=40, dtype=dtype)
    case = Case(problem, config=LinearConfig(16, 16, 16, num_warps=4, num_stages=2))
    grad = normal(40, seed=1)
    want = case.forward()
    gradient = case.backward(want, grad)
    operands = list(case.operands)
    shape = {"hidden": (40, 8), "weight": (40, 8), "out": (40, 40)}[argument]
    far = sparse(shape, (2**26 + 8, 1), dtype)
    assert far.stride(0) * 39 > 2**31
    out = far if argument == "out" else torch.empty(40, 40, dtype=dtype)
    if argument != "out":
        place = ("hidden", "weight").index(argument)
        operands[place] = far.copy_(operands[place])
    ours = launch_linear_forward(*operands, **case.options, entropy_order=0, config=case.config)
    assert torch.equal(ours.token_logprobs, want.token_logprobs)
    logits_gradient(
        *operands,
        ours.lse,
        *(ours.tail, ours.miss, grad, None),
        **case.options,
        out=out,
        config=case.config,
    )
    assert torch.equal(out, gradient)


@pytest.mark.parametrize("argument", ["hidden", "weight"])
def test_columns_beyond_31_bits(sparse, argument):
    """Columns so far apart that a step of the width is past 2**31 entries."""
    problem = make_problem([3], width=20, vocab=5, dtype=torch.float32)
    case = Case(problem)
    want = case.forward().token_logprobs
    operands = list(case.operands)
    place = ("hidden", "weight").index(argument)
    rows = len(operands[place])
    operands[place] = sparse((rows, 20), (1, 2**28), torch.float32).copy_(operands[place])
    ours = launch_linear_forward(*operands, **case.options, entropy_order=0, config=case.config)
    assert torch.equal(ours.token_logprobs, want)


def test_a_large_vocabulary():
    """Qwen2.5's."""
    problem = make_problem([1, 1], width=8, vocab=151_936, dtype=torch.float32)
    problem.targets[1] = 151_935
    case = Case(problem, config=LinearConfig(16, 8192, 16, num_warps=4, num_stages=2))
    ours = case.forward()
    exact, same = (expected_statistics(p) for p in (problem.to(torch.float64), problem))
    for name in exact:
        assert_within_budget(getattr(ours, name), same[name], exact[name], name, roundings=16)
    grad = torch.tensor([1.0, -2.0])
    truth = expected_gradient(problem.to(torch.float64), grad, None)
    torch.testing.assert_close(case.backward(ours, grad).double(), truth, rtol=5e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_are_bit_identical(dtype):
    problem = make_problem([9, 0, 12], width=24, vocab=50, bias=True, ignored=0.2, dtype=dtype)
    case, grad = Case(problem), normal(21, seed=1)
    seen = set()
    for _ in range(3):
        ours = case.forward()
        results = [*ours, case.backward(ours, grad).float()]
        seen.add(b"".join(x.numpy().tobytes() for x in results))
    assert len(seen) == 1


def test_number_of_launches(launched):
    """Two forward, one backward, whatever the size; none for nothing."""
    for lengths, forward, backward in (
        ([55], ["_linear_forward_kernel", "_combine_kernel"], ["_logits_gradient_kernel"]),
        ([], [], []),
    ):
        case = Case(make_problem(lengths, vocab=70, dtype=torch.float32))
        ours = case.forward()
        assert launched == forward
        launched.clear()
        case.backward(ours, torch.ones(sum(lengths)))
        assert launched == backward
        launched.clear()


@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", "IEEE"), ("high", "TF32x3"), ("medium", "TF32")]
)
def test_float32_is_multiplied_as_torch_is_told(monkeypatch, setting, precision):
    """The interpreter rounds nothing; the precision that it is asked for is what is seen."""
    before = torch.get_float32_matmul_precision()
    problem = make_problem([3], dtype=torch.float32)
    products = count_products(monkeypatch)
    torch.set_float32_matmul_precision(setting)
    try:
        case = Case(problem)
        case.backward(case.forward(), torch.ones(3))
        assert {p.name for p in products} == {precision}
    finally:
        torch.set_float32_matmul_precision(before)
