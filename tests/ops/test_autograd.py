"""torch.compile of a user's loss: one graph, no break at an op, no recompile for a new length."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from plad_fast import (
    UsageError,
    fused_linear_preference_loss,
    linear_sequence_logprobs,
    losses,
    preference_loss,
    sequence_logprobs,
)
from plad_fast.ops.preference_autograd import _flattened, _nested
from tests.support.loss_options import REQUIRED
from tests.support.problems import make_problem

OPTIONS = {
    "plain": {},
    "all": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7, "length_normalization": 1.0},
}


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


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((loss, "all") for loss in (ranking, registered, one_pass, on_a_reference, stored)),
        *((loss, "plain") for loss in (ranking, one_pass)),
    ],
)
def test_one_graph_for_all_lengths(loss, options):
    options = OPTIONS[options]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compilations = set()
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for seed, lengths in enumerate([[4, 3, 2, 2], [9, 2, 5, 6], [3, 3, 1, 7, 8, 8]]):
        problem = make_problem(lengths, bias=True, ignored=0.2, seed=seed)
        ours = compiled(*arguments(problem), **options)
        gradients = torch.autograd.grad(ours, problem.leaves)
        want = loss(*arguments(problem), **options)
        torch.testing.assert_close(ours, want)
        compilations.add(counter.frame_count)
        for mine, other in zip(gradients, torch.autograd.grad(want, problem.leaves), strict=True):
            torch.testing.assert_close(mine, other)
    assert len(compilations) == 1


def options_of(name):
    """Names, numbers and mappings among them: all have to reach the op."""
    divergence = {"f_divergence": "js_divergence"}
    options = divergence if "f_divergence" in losses.get_loss(name).options else {}
    return {**options, **REQUIRED.get(name, {})}


OF_EACH_KIND = ("dpo", "kto", "mixture", "sft")
"""With names, scores, mappings and nothing to bind them to; the others when slow."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in OF_EACH_KIND else pytest.mark.slow)
        for name in losses.available()
    ],
)
def test_every_loss_compiles_into_one_graph(name):
    """In the op and on it, with all that it takes."""
    torch._dynamo.reset()

    def loss_of(hidden, weight, bias, targets, cu_seqlens):
        constants = {
            key: -cu_seqlens.diff().to(hidden.dtype)
            for key in ("scores", "reference_logps")
            if key in losses.get_loss(name).takes
        }
        options = {"loss": name, **constants, **options_of(name)}
        head = hidden, weight, targets, cu_seqlens
        fused = fused_linear_preference_loss(*head, bias=bias, **options)
        ours = linear_sequence_logprobs(*head, bias=bias)
        return fused.loss + 2 * preference_loss(ours.sums, ours.counts, **options)

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=True)
    problem = make_problem([4, 3, 2, 2], bias=True, ignored=0.2)
    got, want = compiled(*arguments(problem)), loss_of(*arguments(problem))
    torch.testing.assert_close(got, want)
    for mine, other in zip(
        torch.autograd.grad(got, problem.leaves),
        torch.autograd.grad(want, problem.leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_options_come_out_of_the_op_as_they_went_in():
    for options in (
        {},
        {"beta": 0.5, "f_divergence": "forward_kl", "tau": 1},
        {"parts": {"dpo": {"weight": 0.8, "f_divergence": "forward_kl"}, "cpo": {}}, "beta": 2.0},
        {"flag": True, "parts": {"own": {"off": False, "top": -3}}, "form": "a=b:c", "big": 2**53},
    ):
        # How they are written tells 1 from 1.0 and True.
        assert repr(_nested(*_flattened(options))) == repr(options)


@pytest.mark.parametrize("value", [None, torch.tensor(1.0), [1.0], "a,b", 2**53 + 1, len, 1j])
def test_options_that_an_op_cannot_take_are_refused(value):
    """They would come out of it as something else."""
    with pytest.raises(UsageError, match="the option tau of a loss must"):
        _flattened({"beta": 1.0, "tau": value})


@pytest.mark.parametrize("name", [1, "", "own.loss", "a,b", "a=b", "top:int"])
def test_names_that_an_op_cannot_take_are_refused(name):
    with pytest.raises(UsageError, match=r"names in the options of a loss .* got"):
        _flattened({"parts": {name: {"weight": 1.0}}})


@pytest.mark.parametrize("dynamic", [False, True])
def test_truth_values_and_whole_numbers_reach_a_compiled_loss_as_such(dynamic):
    @losses.register_loss("test_only_options")
    def of_all_kinds(logps, *, flag=False, top=1, factor=1.0):
        best = logps[:, :top].sum(dim=1)  # a slice takes no float
        return factor * (best if flag is True else -best)

    def loss_of(problem, **options):
        return fused_linear_preference_loss(
            *problem.inputs, bias=problem.bias, loss="test_only_options", **options
        ).loss

    try:
        torch._dynamo.reset()
        compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        problem = make_problem([4, 3, 2, 2], bias=True)
        for options in (
            {"flag": True, "top": 2, "factor": 3},
            {"flag": False, "top": 2, "factor": 0.5},
            {"flag": True, "top": 1},
        ):
            torch.testing.assert_close(compiled(problem, **options), loss_of(problem, **options))
    finally:
        del losses.registry._REGISTRY["test_only_options"]


@pytest.mark.parametrize("bias", [False, True])
def test_registrations_are_sound(bias):
    """Schema, fake shapes, autograd and dynamic shapes, by torch's own checks."""
    problem = make_problem([4, 0, 3], bias=bias, ignored=0.3)
    options = (None, 1.0, 1.0, -100, "torch", 2**16)  # HeadOptions
    torch.library.opcheck(
        torch.ops.plad_fast.linear_sequence_logprobs.default,
        (*arguments(problem), *options, 1.0, True, True),
    )
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        torch.ops.plad_fast.stored_token_logprobs.default,
        (logits, problem.targets.clamp(max=10), problem.cu_seqlens, *options),
    )


@pytest.mark.parametrize("loss", ["plad_margin", "ipo"])
def test_the_one_pass_registration_is_sound(loss):
    """With and without the bias, scores and a reference."""
    problem = make_problem([4, 0, 3, 2], bias=loss == "ipo", ignored=0.3)
    constants = torch.randn(4, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.plad_fast.linear_preference_loss.default,
        (
            *arguments(problem),
            *(None, 1.0, 1.0, -100, "torch", 2**16),  # HeadOptions
            constants if loss == "plad_margin" else None,
            constants if loss == "ipo" else None,
            torch.tensor(3.0),
            None,
            *(2, 0.1, 0.5),  # group_size, sft_weight, length_normalization
            [True, True, problem.bias is not None],
            *(loss, "beta", [0.5]),
        ),
    )


def test_a_function_of_ones_own_is_not_taken_for_a_registered_loss():
    def sft(logps):
        return logps.sum(1)

    def loss_of(problem):
        return fused_linear_preference_loss(*problem.inputs, loss=sft).loss

    problem = make_problem([2, 3])
    # torch 2.8 says that there was an error in tracing, and not what it said.
    old = torch.__version__.startswith("2.8.")
    with pytest.raises(Exception, match="UsageError" if old else "must be a registered one"):
        torch.compile(loss_of, backend="aot_eager", fullgraph=True)(problem)


LENGTHS = [
    ([5, 7], [(4, 3), (2, 6)]),
    ([9, 4], [(5, 5), (7, 2)]),
    ([3, 12], [(8, 3), (4, 9)]),
]
"""Prompts, and the responses to each: a step for each of them."""


def train(layout, backend=None, **options):
    """Backbone, gather of the response rows, one-pass loss, backward, AdamW.

    Returns losses, weights, and frames compiled by the end of every step.
    """
    from plad_fast.data.packing import PreferenceCollator
    from plad_fast.models.head import head_arguments
    from plad_fast.models.sharing import prepare
    from tests.support.naive import features
    from tests.support.tiny_models import make_model

    model = make_model("llama")
    model.model.layers = model.model.layers[:1]  # which compiles sooner than three
    model.config.num_hidden_layers = 1
    prepare(model, layout, check=False)
    collate = PreferenceCollator(0, 2, layout=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss_of(batch):
        arguments = head_arguments(model, batch)
        return fused_linear_preference_loss(**arguments, beta=50.0, sft_weight=0.1).loss

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend or "aot_eager")
    run = torch.compile(loss_of, backend=counter, **options) if backend else loss_of
    losses, frames = [], []
    for lengths in LENGTHS:
        loss = run(collate(features(*lengths)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        frames.append(counter.frame_count)
    return losses, list(model.parameters()), frames


def assert_trains_alike(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    # AdamW's first steps have the size of the learning rate, whatever the gradient's.
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_a_training_step_on_padded_rows_is_one_graph_for_all_lengths():
    found = train("padded", "aot_eager", fullgraph=True, dynamic=True)
    assert_trains_alike(found, train("padded"))
    assert len(set(found[2])) == 1


def test_a_training_step_on_shared_rows_breaks_at_the_attention_and_not_at_the_op():
    """Spans and rows to cut depend on the layout; what lies between is compiled once."""
    torch._dynamo.utils.counters.clear()
    found = train("shared", "eager", dynamic=True)
    breaks = "\n".join(torch._dynamo.utils.counters["graph_break"])
    assert_trains_alike(found, train("shared"))
    assert "packed_attention" in breaks
    assert not any(op in breaks for op in ("fused_linear", "linear_preference", "ops.py"))
    assert found[2][-1] == found[2][1], "a new layout was compiled anew"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_training_step_under_inductor(layout):
    found = train(layout, "inductor", dynamic=True)
    assert_trains_alike(found, train(layout))


@pytest.mark.parametrize("loss", [ranking, one_pass])
def test_a_penalty_on_the_gradient_is_refused(loss):
    """In a graph that autograd runs through, too: its gradient would be lost."""
    problem = make_problem([3, 4], dtype=torch.float64)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    value = compiled(*problem.inputs[:2], None, *problem.inputs[2:])

    def penalty() -> None:
        (of_weight,) = torch.autograd.grad(value, problem.weight, create_graph=True)
        of_weight.square().sum().backward()

    with pytest.raises(UsageError, match="no second derivative"):
        penalty()


def test_no_cuda_graph_is_captured_over_an_op_that_waits():
    for name in (
        "linear_sequence_logprobs",
        "linear_sequence_logprobs_backward",
        "linear_preference_loss",
        "stored_token_logprobs_backward",
    ):
        op = getattr(torch.ops.plad_fast, name).default
        assert torch.Tag.cudagraph_unsafe in op.tags
