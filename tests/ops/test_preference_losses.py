"""The one-pass loss equals the losses on the op, in value and in every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_fast import (
    UsageError,
    fused_linear_preference_loss,
    linear_sequence_logprobs,
    losses,
    preference_loss,
    sequence_logprobs,
)
from plad_fast.ops.impl import products
from plad_fast.ops.impl.workspace import compacting_order
from tests.support.loss_options import REQUIRED
from tests.support.problems import assert_within_budget, make_problem, oracle, problems

SUMS = {"length_normalization": 0.0, "sft_weight": 0.0}


def unfused(problem, **options):
    """The same loss from the naive computation's sums."""
    keep = problem.targets != -100
    bounds = problem.cu_seqlens.tolist()
    counts = torch.tensor([int(keep[a:b].sum()) for a, b in itertools.pairwise(bounds)])
    return preference_loss(oracle(problem)[0], counts, **options)


def assert_equal_with_gradients(problem, ours, want):
    torch.testing.assert_close(ours, want)
    for g, w in zip(
        torch.autograd.grad(1.7 * ours, problem.leaves),
        torch.autograd.grad(1.7 * want, problem.leaves),
        strict=True,
    ):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", losses.available())
@settings(max_examples=12)
@given(st.data())
def test_equals_losses_on_the_oracle(name, data):
    """Every registered loss, group size, regulariser and normalisation; any buffer size."""
    size = data.draw(st.integers(1 if name == "sft" else 2, 4))
    problem = data.draw(problems(group_size=size))
    options = {
        "loss": name,
        "group_size": size,
        "sft_weight": data.draw(st.sampled_from([0.0, 0.3])),
        "length_normalization": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        **REQUIRED.get(name, {}),
    }
    if "beta" in losses.get_loss(name).options:
        options["beta"] = data.draw(st.sampled_from([0.1, 0.5, 3.0]))
    draw = torch.Generator().manual_seed(1)
    for constants in {"scores", "reference_logps"} & set(losses.get_loss(name).takes):
        options[constants] = torch.randn(
            len(problem.cu_seqlens) - 1, dtype=torch.float64, generator=draw
        )
    ours = fused_linear_preference_loss(*problem.inputs, **options, **problem.options)
    assert_equal_with_gradients(problem, ours.loss, unfused(problem, **options))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("loss", ["dpo", "dpo_hinge", "ipo"])
def test_the_reference_of_every_group_reaches_every_backend(impl, loss):
    """Groups in chunks of their own, ignored tokens, references of another dtype."""
    problem = make_problem([4, 2, 3, 5, 1, 6], ignored=0.2, dtype=torch.float32, scratch_rows=9)
    options = {"loss": loss, "beta": 0.7, "group_size": 3}
    options["reference_logps"] = -torch.arange(1, 7).double()
    ours = fused_linear_preference_loss(*problem.inputs, impl=impl, **options, **problem.options)
    assert_equal_with_gradients(problem, ours.loss, unfused(problem, **options))


def test_equals_losses_on_the_op_bit_for_bit_in_the_groups_that_fit():
    """Sums do not depend on whether they were taken for the op or on the way to the loss."""
    problem = make_problem([4, 5, 3, 3], dtype=torch.float32, width=16, vocab=91)
    fused = fused_linear_preference_loss(*problem.inputs, **SUMS, **problem.options)
    op = linear_sequence_logprobs(*problem.inputs, **problem.options)
    assert torch.equal(fused.sums, op.sums)
    assert torch.equal(fused.counts, op.counts)


def hinge_problem(margins, **options):
    """Pairs of one token each with s(y+) - s(y-) = margin, exactly representable."""
    problem = make_problem([1, 1] * len(margins), width=2 * len(margins), vocab=7)
    with torch.no_grad():
        problem.hidden.copy_(torch.eye(2 * len(margins)))
        problem.weight.zero_()
    problem.targets = torch.zeros(2 * len(margins), dtype=torch.long)
    for i, margin in enumerate(margins):
        with torch.no_grad():
            # Both tokens have the same logits; their targets differ by `margin` in logit.
            problem.weight[0, 2 * i : 2 * i + 2] = margin
        problem.targets[2 * i + 1] = 1
    return problem


@pytest.mark.parametrize("loss", ["plad_ranking", "plad_listwise"])
@pytest.mark.parametrize("scratch_rows", [1, 2, 3, None])
def test_pairs_at_and_around_the_hinge(loss, scratch_rows):
    """beta = 1: inactive at 2 and exactly at 1, active at 0.5 and -1."""
    problem = hinge_problem([2.0, 1.0, 0.5, -1.0])
    if scratch_rows:
        problem.scratch_bytes = scratch_rows * 7 * 8 * 16 // 15 + 8
    ours = fused_linear_preference_loss(*problem.inputs, loss=loss, **problem.options)
    assert ours.active.tolist() == [False, False, True, True]
    assert ours.group_losses.tolist() == pytest.approx([0.0, 0.0, 0.5, 2.0])
    assert_equal_with_gradients(problem, ours.loss, unfused(problem, loss=loss))


@pytest.mark.parametrize("place", range(3))
def test_a_group_is_active_whichever_of_its_responses_has_a_gradient(place):
    """Also one whose best response has none, as in a list whose order is wrong behind the first."""
    problem = make_problem([3, 2, 4, 1, 5, 2, 2, 3, 1])
    signs = torch.tensor([1.0, -1.0, 1.0])  # log-probabilities are below 0

    def loss(logps, scores):
        return torch.relu(-scores[:, 0] * logps[:, place])

    options = {
        "loss": loss,
        "group_size": 3,
        "scores": signs.repeat_interleave(3),
        "sft_weight": 0.0,
        "length_normalization": 0.0,
    }
    ours = fused_linear_preference_loss(*problem.inputs, **options, **problem.options)
    assert ours.active.tolist() == [True, False, True]
    assert_equal_with_gradients(problem, ours.loss, unfused(problem, **options))


@pytest.mark.parametrize("scratch_rows", [3, None])
def test_all_inactive_multiplies_only_forward(scratch_rows, monkeypatch):
    """A satisfied batch costs one product and has exactly zero gradients."""

    def refuse(*args):
        raise AssertionError("a gradient product ran")

    monkeypatch.setattr(products.Products, "grad_hidden", refuse)
    monkeypatch.setattr(products.Products, "add_grad_weight", refuse)
    problem = make_problem([4, 4, 6, 6], scratch_rows=scratch_rows)
    ours = fused_linear_preference_loss(
        *problem.inputs, loss=lambda logps: torch.relu(logps[:, 0] - 1e6), **problem.options
    )
    ours.loss.backward()
    assert ours.loss.item() == 0
    assert not ours.active.any()
    assert not problem.hidden.grad.any()
    assert not problem.weight.grad.any()


def test_only_active_rows_are_multiplied(monkeypatch):
    """Half of the pairs inactive: half of the rows in the gradient products."""
    seen = []
    real = products.Products.grad_hidden

    def record(self, operand):
        seen.append(len(operand.values))
        return real(self, operand)

    monkeypatch.setattr(products.Products, "grad_hidden", record)
    problem = hinge_problem([2.0, -1.0, 2.0, -1.0])
    fused_linear_preference_loss(*problem.inputs, sft_weight=0.0, **problem.options)
    assert sum(seen) == 4
    seen.clear()
    # The regulariser keeps the chosen sequences of the satisfied pairs alive, and only those.
    fused_linear_preference_loss(*problem.inputs, sft_weight=0.1, **problem.options)
    assert sum(seen) == 6


@given(active=st.lists(st.booleans(), max_size=30))
def test_compacting_order_moves_rows_without_overlap(active):
    flags = torch.tensor(active, dtype=torch.bool)
    order = compacting_order(flags).tolist()
    assert sorted(order) == [i for i, flag in enumerate(active) if flag]
    for place, row in enumerate(order):
        assert row == place or (row >= len(order) and not active[place])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scratch_rows", [7, None], ids=["two-phase", "one-pass"])
def test_error_budget(dtype, scratch_rows):
    problem = make_problem(
        [20, 11, 16, 30], width=64, vocab=503, scale=0.3, scratch_rows=scratch_rows
    ).to(dtype)
    truth, yardstick = problem.to(torch.float64), problem.to(dtype)
    options = {"beta": 2.0, "length_normalization": 1.0, "sft_weight": 0.5}
    ours = fused_linear_preference_loss(*problem.inputs, **options, **problem.options)
    same, want = unfused(yardstick, **options), unfused(truth, **options)
    assert_within_budget(ours.loss, same, want, "loss")
    for name, g, s, w in zip(
        ("hidden", "weight"),
        torch.autograd.grad(ours.loss, problem.leaves),
        torch.autograd.grad(same, yardstick.leaves),
        torch.autograd.grad(want, truth.leaves),
        strict=True,
    ):
        assert_within_budget(g, s, w, f"d_{name}")


def test_float16_gradients_survive_until_the_loss_scale_arrives():
    """Gradients of 1e-8 vanish in float16 unless the scale of a GradScaler comes first."""
    problem = make_problem([6, 6], dtype=torch.float16, scale=0.3)
    options = {"num_groups": 1e7, "beta": 50.0, **SUMS}
    scale = 2.0**20
    ours = fused_linear_preference_loss(*problem.inputs, **options, **problem.options)
    got = torch.autograd.grad(ours.loss * scale, problem.hidden)[0].double()
    truth = problem.to(torch.float64)
    want = torch.autograd.grad(unfused(truth, **options) * scale, truth.hidden)[0]
    assert (got - want).norm() / want.norm() < 2e-3


def test_no_gradient_is_made_without_a_leaf_that_wants_one(monkeypatch):
    monkeypatch.setattr(products.Products, "grad_hidden", None)
    monkeypatch.setattr(products.Products, "add_grad_weight", None)
    problem = make_problem([4, 4])
    with torch.no_grad():
        ours = fused_linear_preference_loss(*problem.inputs, **problem.options)
    assert not ours.loss.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs(frozen):
    problem = make_problem([4, 4, 3, 2])
    other = "weight" if frozen == "hidden" else "hidden"
    want = torch.autograd.grad(unfused(problem, beta=9.0), getattr(problem, other))[0]
    getattr(problem, frozen).requires_grad_(False)
    fused_linear_preference_loss(*problem.inputs, beta=9.0, **problem.options).loss.backward()
    assert getattr(problem, frozen).grad is None
    torch.testing.assert_close(getattr(problem, other).grad, want)


def test_reruns_are_bit_identical():
    results = []
    for _ in range(2):
        problem = make_problem([20, 13, 9, 9], width=33, vocab=211, dtype=torch.float32)
        ours = fused_linear_preference_loss(*problem.inputs, beta=5.0, **problem.options)
        results.append([ours.loss, *torch.autograd.grad(ours.loss, problem.leaves)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_callers_own_function_with_scores_and_counts():
    def pairwise_logistic(logps, *, scores, counts, beta=0.1):
        gap = beta * (logps[:, 0] - logps[:, 1]) * (scores[:, 0] - scores[:, 1])
        return -torch.nn.functional.logsigmoid(gap) * counts.sum(1)

    problem = make_problem([4, 5, 3, 0])
    options = {
        "loss": pairwise_logistic,
        "scores": torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64),
        "beta": 0.4,
    }
    ours = fused_linear_preference_loss(*problem.inputs, **options, **problem.options)
    assert_equal_with_gradients(problem, ours.loss, unfused(problem, **options))


def test_an_empty_batch_has_a_loss_of_zero_with_a_graph():
    problem = make_problem([])
    ours = fused_linear_preference_loss(*problem.inputs, sft_weight=1.0, **problem.options)
    assert ours.loss.item() == 0
    ours.loss.backward()
    assert not problem.weight.grad.any()


def test_autocast_does_not_touch_the_arithmetic_inside():
    """Only the head's inputs are cast: also a loss with a matrix product runs in float32."""

    def weighted(logps):
        return torch.relu(20.0 - (logps @ torch.tensor([[1.0], [-1.0]])).squeeze(1))

    problem = make_problem([6, 5], dtype=torch.float32, width=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fused_linear_preference_loss(*problem.inputs, loss=weighted, **problem.options)
    ours.loss.backward()
    half = problem.to(torch.bfloat16)
    want = fused_linear_preference_loss(*half.inputs, loss=weighted, **half.options)
    want.loss.backward()
    assert torch.equal(ours.loss, want.loss)
    assert torch.equal(problem.weight.grad, half.weight.grad.float())


def test_sums_are_normalised_and_active_leaves_out_the_regulariser():
    problem = hinge_problem([2.0, -1.0])
    problem.cu_seqlens = torch.tensor([0, 1, 2, 3, 4])
    plain = fused_linear_preference_loss(*problem.inputs, sft_weight=0.5, **problem.options)
    assert plain.active.tolist() == [False, True]
    problem = make_problem([4, 9])
    halved = fused_linear_preference_loss(
        *problem.inputs, length_normalization=0.5, **problem.options
    )
    plain = fused_linear_preference_loss(*problem.inputs, **SUMS, **problem.options)
    torch.testing.assert_close(halved.sums, plain.sums / torch.tensor([2.0, 3.0]).double())


def test_gradients_come_several_at_a_time():
    """torch.autograd.grad(is_grads_batched=True), and jacobians that are made so: bit for bit."""
    problem = make_problem([4, 5, 3, 3], width=16, vocab=91, dtype=torch.float32)
    several = torch.tensor([0.0, 1.0, -2.5])
    fused = fused_linear_preference_loss(*problem.inputs, beta=9.0, **problem.options).loss
    op = linear_sequence_logprobs(*problem.inputs, **problem.options)
    logits = (problem.hidden @ problem.weight.T).detach().requires_grad_()
    given = sequence_logprobs(logits, problem.targets, problem.cu_seqlens)
    draw = torch.Generator().manual_seed(0)
    for output, leaves, upstream in (
        (fused, problem.leaves, several),
        (op.sums, problem.leaves, torch.randn(3, 4, generator=draw)),
        (op.token_logprobs, problem.leaves, torch.randn(2, 15, generator=draw)),
        (given.sums, [logits], torch.randn(3, 4, generator=draw)),
    ):
        found = torch.autograd.grad(
            output, leaves, upstream, is_grads_batched=True, retain_graph=True
        )
        each = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in upstream]
        for got, want in zip(found, zip(*each, strict=True), strict=True):
            assert torch.equal(got, torch.stack(want))


def test_inference_mode_tells_which_groups_are_active():
    problem = hinge_problem([2.0, -1.0])
    with torch.inference_mode():
        ours = fused_linear_preference_loss(*problem.inputs, **problem.options)
    assert ours.active.tolist() == [False, True]


@pytest.mark.parametrize("inference", [False, True])
def test_a_loss_may_write_into_its_scores_whatever_the_chunks(inference):
    """And keep what it is given for its derivative."""

    def loss(logps, *, scores, counts):
        scores[:, 0] = logps[:, 0]
        return (logps / counts * scores).sum(1)

    found = []
    for scratch_rows in (9, None):
        problem = make_problem([5, 4, 3, 6, 2, 2], scratch_rows=scratch_rows)
        with torch.inference_mode(inference):
            ours = fused_linear_preference_loss(
                *problem.inputs, loss=loss, scores=torch.arange(6.0), **problem.options
            )
        found.append(ours.group_losses)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("scratch_rows", [3, 9, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_default_device_does_not_matter(dtype, scratch_rows, monkeypatch):
    """Many set it to their GPU, while lengths and orders of rows are read on the CPU."""
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: True)
    scores = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, 2.0])
    found = []
    for device in ("meta", "cpu"):
        problem = make_problem(
            [5, 4, 3, 6, 2, 2], ignored=0.2, dtype=dtype, scratch_rows=scratch_rows
        )
        with torch.device(device):
            ours = fused_linear_preference_loss(
                *problem.inputs,
                loss=lambda logps, scores: (logps * scores).sum(1),
                scores=scores,
                num_groups=3,
                **problem.options,
            )
            ours.loss.backward()
        assert ours.active.tolist() == [True, False, True]
        found.append([ours.loss, *(leaf.grad for leaf in problem.leaves)])
    assert all(map(torch.equal, *found))


def test_gradients_are_freed_with_the_graph():
    """The tensors of the first backward are handed over, not kept beside `.grad`."""
    problem = make_problem([4, 4])
    ours = fused_linear_preference_loss(*problem.inputs, beta=9.0, **problem.options)
    ours.loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        ours.loss.backward()


def test_a_long_group_computes_only_its_first_rows_again(monkeypatch):
    """Of 10 rows in a buffer of 7 the last 7 are still there when the gradient is known."""
    seen = []
    real = products.Products.logits
    monkeypatch.setattr(
        products.Products,
        "logits",
        lambda self, hidden, out: seen.append(len(hidden)) or real(self, hidden, out),
    )
    problem = make_problem([6, 4], vocab=500, width=1, scratch_rows=7)
    problem.scratch_bytes = int((7 * (500 * 8 + 24)) * 16 / 15) + 64
    ours = fused_linear_preference_loss(*problem.inputs, beta=99.0, **problem.options)
    assert seen == [3, 7, 3]
    assert_equal_with_gradients(problem, ours.loss, unfused(problem, beta=99.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 3}, "4 sequences do not form groups of 3"),
        ({"loss": "nope"}, "unknown loss 'nope'"),
        ({"loss": "plad_margin"}, "needs scores"),
        ({"loss": "plad_margin", "scores": torch.zeros(3)}, r"scores must have shape \(4,\)"),
        ({"beta": -0.5}, "beta"),
        ({"impl": "triton3"}, "unknown impl"),
        ({"targets": torch.full((8,), 37)}, r"lie in \[0, 37\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 4, 6, 7])}, "end at the number of tokens"),
        ({"scores": torch.zeros(4, requires_grad=True)}, "scores are constants"),
        ({"loss": "ipo"}, "loss 'ipo' needs reference_logps"),
        ({"loss": "dpo", "reference_logps": torch.zeros(2, 2)}, r"must have shape \(4,\)"),
        (
            {"reference_logps": torch.zeros(4, requires_grad=True)},
            "reference_logps are constants",
        ),
        (
            {"loss": lambda logps, w=torch.ones(2, requires_grad=True): (logps * w).sum(1)},  # noqa: B008
            "has no option|uses a tensor that requires a gradient",
        ),
    ],
)
def test_refusals_say_what_was_wrong(options, message):
    problem = make_problem([2, 2, 2, 2])
    names = ("hidden", "weight", "targets", "cu_seqlens")
    arguments = dict(zip(names, problem.inputs, strict=True)) | options
    with pytest.raises(UsageError, match=message):
        fused_linear_preference_loss(**arguments)


def test_without_an_upstream_gradient_there_is_none():
    """What uses the loss may say that it has no gradient; the saved ones are not handed over."""
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    offsets = torch.tensor([0, 3, 5, 7, 9])
    loss = fused_linear_preference_loss(hidden, weight, torch.randint(30, (9,)), offsets).loss
    undefined = torch._C._functions.UndefinedGrad()(loss)
    undefined.backward()
    assert hidden.grad is None or not hidden.grad.any()
    assert weight.grad is None or not weight.grad.any()


def test_a_group_is_active_where_any_of_its_responses_has_a_gradient():
    """Of three responses the last is far below the first, and the second above it."""
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
    hidden = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [-50.0, 0.0, 0.0]]).double()
    out = fused_linear_preference_loss(
        hidden, weight, torch.zeros(3).long(), torch.arange(4), loss="plad_ranking", beta=1.0,
        sft_weight=0.0, group_size=3,
    )  # fmt: skip
    assert out.sums[0] - out.sums[2] > 1 > out.sums[0] - out.sums[1]
    assert out.active.tolist() == [True]
