"""Cases of tests/ops/test_vocab_parallel.py for a set of four processes (see `process_sets`).

The processes are a group of four and two groups of two, whose ranks do not lie next to each other,
so that both sizes are met in one start. Every process computes the unsharded result itself, from
the same seeds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from plad_fast import fused_linear_preference_loss, linear_sequence_logprobs
from plad_fast.errors import UsageError
from plad_fast.losses.registry import available, get_loss
from plad_fast.ops.vocab_parallel.api import (
    vocab_parallel_preference_loss,
    vocab_parallel_sequence_logprobs,
)
from tests.support.problems import Problem, assert_within_budget, make_problem, oracle

CASES: dict[str, Callable[[Path], None]] = {}
WORLD = 4
SIZES = (2, WORLD)

# Rows of each rank, of a vocabulary of 37: none, one, many.
SPLITS: dict[int, list[list[int]]] = {2: [[36, 1], [0, 37]], 4: [[20, 0, 1, 16], [10, 10, 10, 7]]}


@functools.cache
def group_of(size: int) -> Any:
    """This process's group of so many ranks."""
    if size == WORLD:
        return dist.group.WORLD
    # Every process takes part in the making of both.
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return groups[dist.get_rank() % 2]


def case(function: Callable[[Any], None], sizes: Sequence[int] = SIZES) -> Callable[[Any], None]:
    """Adds what a group does, in groups of these sizes."""
    for size in sizes:

        def run(_folder: Path, size: int = size) -> None:
            function(group_of(size))

        CASES[f"{function.__name__}-{size}"] = run
    return function


def refused(match: str, run: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(match)):
        run(*args, **options)


def shard_of(tensor: Tensor | None, split: Sequence[int], group: Any) -> Tensor | None:
    """This rank's rows, as a leaf."""
    if tensor is None:
        return None
    return tensor.detach().split(list(split))[dist.get_rank(group)].clone().requires_grad_()


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def sharded(problem: Problem, split: Sequence[int], group: Any) -> Problem:
    """The same hidden states, and this rank's rows of weight and bias."""
    return Problem(
        problem.hidden.detach().clone().requires_grad_(),
        shard_of(problem.weight, split, group),
        shard_of(problem.bias, split, group),
        problem.targets,
        problem.cu_seqlens,
        problem.spec,
        problem.scratch_bytes,
    )


def check_gradients(
    mine: Problem, whole: Problem, split: Sequence[int], group: Any, what: str
) -> None:
    close(mine.hidden.grad, whole.hidden.grad, f"{what}: d hidden")
    rank = dist.get_rank(group)
    for name in ("weight", "bias"):
        leaf = getattr(whole, name)
        if leaf is not None:
            expected = leaf.grad.split(list(split))[rank]
            close(getattr(mine, name).grad, expected, f"{what}: d {name}")


@case
def values_and_gradients_equal_the_unsharded_op(group):
    """Every option, uneven and empty shards, buffers of one row and of many, any upstream."""
    draw = torch.Generator().manual_seed(1)
    kinds: list[dict[str, Any]] = [
        {},
        {"bias": True, "softcap": 0.7, "logit_scale": -1.5, "temperature": 0.7, "ignored": 0.3},
        {"bias": True, "scale": 10.0, "scratch_rows": 1, "contiguous": False},
        {"softcap": 30.0, "scale": 10.0, "scratch_rows": 3, "ignored": 0.3},
        {"ignored": 1.0},
    ]
    for split in SPLITS[dist.get_world_size(group)]:
        for alpha, kind in zip((0.0, 1.0, 0.5, 0.0, 1.0), kinds, strict=True):
            whole = make_problem([3, 0, 5, 1], **kind)
            mine = sharded(whole, split, group)
            options = {
                "length_normalization": alpha,
                "return_lse": True,
            }
            expected = linear_sequence_logprobs(
                *whole.inputs, **whole.options, impl="torch", **options
            )
            found = vocab_parallel_sequence_logprobs(
                *mine.inputs, **mine.options, group=group, **options
            )
            for name in ("sums", "counts", "token_logprobs", "lse"):
                close(getattr(found, name), getattr(expected, name), f"{kind} {split} {name}")
            upstream = [torch.randn(n, generator=draw, dtype=torch.float64) for n in (4, 9, 9)]
            upstream[0][1:] *= torch.tensor([1, 0, -1])  # a sequence without a gradient of its own
            for result in (expected, found):
                outputs = (result.sums, result.token_logprobs, result.lse)
                sum((o * g).sum() for o, g in zip(outputs, upstream, strict=True)).backward()
            check_gradients(mine, whole, split, group, f"{kind} {split}")


@case
def a_sequence_without_a_gradient_has_none(group):
    """Rows with a zero upstream are left out of the products on every rank alike."""
    split = SPLITS[dist.get_world_size(group)][0]
    whole = make_problem([3, 2], scratch_rows=2)
    mine = sharded(whole, split, group)
    vocab_parallel_sequence_logprobs(*mine.inputs, **mine.options, group=group).sums[1].backward()
    linear_sequence_logprobs(*whole.inputs, **whole.options, impl="torch").sums[1].backward()
    check_gradients(mine, whole, split, group, "one of two")
    assert not mine.hidden.grad[:3].any()


@case
def a_satisfied_loss_and_no_gradients_at_all(group):
    split = SPLITS[dist.get_world_size(group)][0]
    mine = sharded(make_problem([3, 2]), split, group)
    out = vocab_parallel_preference_loss(
        *mine.inputs, **mine.options, group=group, loss=lambda logps: torch.relu(logps[:, 0])
    )
    out.loss.backward()
    assert not out.active.any()
    for leaf in mine.leaves:
        assert not leaf.grad.any()
    with torch.no_grad():
        again = vocab_parallel_preference_loss(
            *mine.inputs, **mine.options, group=group, loss="sft"
        )
    assert not again.loss.requires_grad


def loss_options(name: str, num_sequences: int) -> dict[str, Any]:
    spec = get_loss(name)
    draw = torch.Generator().manual_seed(2)
    needed = {"kl": 0.3, "parts": {"dpo": {"weight": 0.8}, "sppo_hard": {"weight": 0.5}}}
    options = {name: needed[name] for name in spec.options if name in needed}
    if spec.needs_scores:
        options["scores"] = torch.rand(num_sequences, generator=draw, dtype=torch.float64)
    if spec.needs_reference_for(options):
        options["reference_logps"] = -9 * torch.rand(
            num_sequences, generator=draw, dtype=torch.float64
        )
    return options


def losses_of_every_kind() -> list[str]:
    """One for each set of constants that losses take, and each way to normalise and to average."""
    kinds = {}
    for name in available():
        spec = get_loss(name)
        kinds[spec.takes, spec.mean_over, spec.length_normalized] = name
    return sorted(kinds.values())


@case
def losses_in_one_pass_equal_the_unsharded_ones(group):
    """Budgets that differ between the ranks, some below a group; tokens ignored, an SFT term."""
    split = SPLITS[dist.get_world_size(group)][0]
    kinds: list[tuple[dict[str, Any], int | None]] = [
        ({"bias": True, "softcap": 3.0, "ignored": 0.2, "scale": 3.0}, None),
        ({"temperature": 0.7, "ignored": 0.2}, 2),
        ({}, 1),
    ]
    for place, name in enumerate(losses_of_every_kind()):
        kind, rows = kinds[place % len(kinds)]
        whole = make_problem([3, 2, 5, 4, 1, 2], seed=place, scratch_rows=rows, **kind)
        mine = sharded(whole, split, group)
        mine.scratch_bytes *= 1 + dist.get_rank(group)
        options = {"loss": name, "sft_weight": 0.3, **loss_options(name, 6)}
        if name == "sft":
            del options["sft_weight"]
        if get_loss(name).length_normalized or name == "mixture":
            options["length_normalization"] = 0.5
        expected = fused_linear_preference_loss(
            *whole.inputs, **whole.options, impl="torch", **options
        )
        found = vocab_parallel_preference_loss(*mine.inputs, **mine.options, group=group, **options)
        for field in expected._fields:
            close(getattr(found, field), getattr(expected, field), f"{name} {field}")
        for out in (expected, found):
            (-1.7 * out.loss).backward()
        check_gradients(mine, whole, split, group, name)


@case
def sixteen_bits_stay_within_the_error_budget(group):
    split = SPLITS[dist.get_world_size(group)][1]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        base = make_problem([3, 2, 5, 4], bias=True, width=32, scale=0.5, scratch_rows=4)
        low = base.to(dtype)
        truth, same = low.to(torch.float64), low.to(dtype)
        upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
        for problem in (truth, same):
            sums, _ = oracle(problem)
            (sums * upstream).sum().backward()
        for kind in ("two phases", "one pass"):
            mine = sharded(low, split, group)
            if kind == "two phases":
                sums = vocab_parallel_sequence_logprobs(
                    *mine.inputs, **mine.options, group=group
                ).sums
                (sums * upstream).sum().backward()
            else:
                factors = dict(zip(range(4), upstream.tolist(), strict=True))
                out = vocab_parallel_preference_loss(
                    *mine.inputs,
                    **mine.options,
                    group=group,
                    loss=lambda logps, scores: (logps * scores).sum(1),
                    scores=torch.tensor(list(factors.values())),
                    num_groups=1,
                )
                sums = out.sums
                out.loss.backward()
            assert mine.hidden.grad.dtype == mine.weight.grad.dtype == dtype
            assert_within_budget(sums, oracle(same)[0], oracle(truth)[0], f"{kind} sums")
            for name in ("hidden", "weight", "bias"):
                grads = [getattr(p, name).grad for p in (mine, same, truth)]
                if name != "hidden":
                    grads[1:] = [g.split(split)[dist.get_rank(group)] for g in grads[1:]]
                assert_within_budget(*grads, f"{kind} {dtype} d {name}")


@case
def numerical_derivatives_agree(group):
    """By finite differences in float64, over all ranks together; not by another of our ops."""
    split = SPLITS[dist.get_world_size(group)][1]
    mine = sharded(make_problem([2, 1], width=3, bias=True, softcap=2.0), split, group)

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = vocab_parallel_sequence_logprobs(
            hidden,
            weight,
            mine.targets,
            mine.cu_seqlens,
            group=group,
            bias=bias,
            softcap=2.0,
            return_lse=True,
        )
        return out.sums, out.lse

    # Every rank moves the same entry of its copy at the same time.
    assert torch.autograd.gradcheck(lambda h: outputs(h, mine.weight, mine.bias), mine.hidden)
    # Of the rows of all ranks: a step along a direction, which they walk together.
    draw = torch.Generator().manual_seed(dist.get_rank(group))
    steps = [
        torch.randn(leaf.shape, generator=draw, dtype=torch.float64)
        for leaf in (mine.weight, mine.bias)
    ]

    def total(distance: float) -> Tensor:
        moved = [
            leaf + distance * step
            for leaf, step in zip((mine.weight, mine.bias), steps, strict=True)
        ]
        sums, lse = outputs(mine.hidden, *moved)
        return sums @ torch.tensor([1.0, -0.3]).double() + 0.7 * lse.sum()

    total(0.0).backward()
    slope = sum(
        (leaf.grad * step).sum() for leaf, step in zip((mine.weight, mine.bias), steps, strict=True)
    )
    dist.all_reduce(slope, group=group)
    with torch.no_grad():
        numerical = (total(1e-5) - total(-1e-5)) / 2e-5
    close(slope, numerical, "slope", 1e-7)


@case
def masked_shards_have_no_probability(group):
    """Padding by a bias of -inf, which may cover whole shards."""
    size = dist.get_world_size(group)
    split = [13] * size
    vocab = 15
    whole = make_problem([3, 2], vocab=vocab, bias=True)
    generator = torch.Generator().manual_seed(3)
    padding = torch.randn(sum(split) - vocab, 8, generator=generator, dtype=torch.float64) * 50
    masked = Problem(
        whole.hidden,
        torch.cat([whole.weight.detach(), padding]),
        torch.cat([whole.bias.detach(), padding[:, 0].fill_(-torch.inf)]),
        whole.targets,
        whole.cu_seqlens,
        scratch_bytes=whole.scratch_bytes,
    )
    mine = sharded(masked, split, group)
    found = vocab_parallel_sequence_logprobs(*mine.inputs, **mine.options, group=group).sums
    expected = linear_sequence_logprobs(*whole.inputs, **whole.options, impl="torch").sums
    close(found, expected, "sums")
    found.sum().backward()
    expected.sum().backward()
    close(mine.hidden.grad, whole.hidden.grad, "d hidden")
    of_weight = torch.cat([whole.weight.grad, torch.zeros_like(padding)])
    close(mine.weight.grad, of_weight.split(split)[dist.get_rank(group)], "d weight")


@case
def confident_targets_keep_their_digits(group):
    """1 - p of 1e-7 in float32, whichever shard the target lies in."""
    size = dist.get_world_size(group)
    hidden = torch.eye(2).requires_grad_()
    weight = torch.zeros(8, 2)
    weight[1, 0], weight[6, 1] = 18.0, 18.0
    leaf = shard_of(weight, [8 // size] * size, group)
    out = vocab_parallel_sequence_logprobs(
        hidden, leaf, torch.tensor([1, 6]), torch.tensor([0, 1, 2]), group=group
    )
    exact = -torch.log1p(7 * torch.exp(torch.tensor(-18.0).double()))
    close(out.sums.double(), exact.expand(2), "log p", 1e-14)
    assert (out.sums < 0).all()
    out.sums.sum().backward()
    target_rows = [leaf.grad[i] for i in range(len(leaf)) if leaf[i].any()]
    assert all((row.max() > 1e-8) for row in target_rows)


@case
def same_bits_every_time_and_on_every_rank(group):
    split = SPLITS[dist.get_world_size(group)][0]
    runs = []
    for _ in range(2):
        mine = sharded(
            make_problem([5, 4, 3, 6], dtype=torch.float32, scratch_rows=2), split, group
        )
        out = vocab_parallel_preference_loss(*mine.inputs, **mine.options, group=group)
        out.loss.backward()
        sums = vocab_parallel_sequence_logprobs(*mine.inputs, **mine.options, group=group).sums
        (sums**2).sum().backward()
        runs.append([out.loss.detach(), sums.detach(), *(leaf.grad for leaf in mine.leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for replicated in runs[0][:3]:
        others = [torch.empty_like(replicated) for _ in split]
        dist.all_gather(others, replicated, group=group)
        assert all(torch.equal(other, replicated) for other in others)


@case
def autocast_casts_as_for_the_unsharded_op(group):
    split = SPLITS[dist.get_world_size(group)][1]
    base = make_problem([3, 2, 5, 4], bias=True, width=32, scale=0.5, scratch_rows=4)
    whole = base.to(torch.float32)
    mine = sharded(whole, split, group)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [
            (
                linear_sequence_logprobs(*whole.inputs, **whole.options, impl="torch").sums,
                vocab_parallel_sequence_logprobs(*mine.inputs, **mine.options, group=group).sums,
            ),
            (
                fused_linear_preference_loss(*whole.inputs, **whole.options, impl="torch").loss,
                vocab_parallel_preference_loss(*mine.inputs, **mine.options, group=group).loss,
            ),
        ]
    plain = linear_sequence_logprobs(*whole.inputs, **whole.options, impl="torch").sums
    assert not torch.allclose(pairs[0][0], plain, rtol=1e-5)  # else nothing was cast
    for expected, found in pairs:
        assert found.dtype == torch.float32
        close(found, expected, "under autocast", 1e-5)
        for problem, value in ((whole, expected), (mine, found)):
            for leaf in problem.leaves:
                leaf.grad = None
            (value**2).sum().backward()
        for name in ("hidden", "weight", "bias"):
            grad, truth = getattr(mine, name).grad, getattr(whole, name).grad
            if name != "hidden":
                truth = truth.split(split)[dist.get_rank(group)]
            assert grad.dtype == torch.float32, name
            assert (grad - truth).norm() <= 2**-7 * truth.norm() + 1e-6, name


@case
def second_derivatives_are_refused(group):
    """Rather than left out without a word."""
    split = SPLITS[dist.get_world_size(group)][1]
    mine = sharded(make_problem([3, 2]), split, group)
    values = [
        vocab_parallel_sequence_logprobs(*mine.inputs, **mine.options, group=group).sums.sum(),
        vocab_parallel_preference_loss(*mine.inputs, **mine.options, group=group, loss="sft").loss,
    ]
    for value in values:
        (grad,) = torch.autograd.grad(value, mine.hidden, create_graph=True)
        refused("no second derivative", (grad**2).sum().backward)


@case
def several_gradients_at_a_time(group):
    """Of the one-pass loss they are multiples; of the op they would be several collectives."""
    split = SPLITS[dist.get_world_size(group)][1]
    mine = sharded(make_problem([3, 2]), split, group)
    sums = vocab_parallel_sequence_logprobs(*mine.inputs, **mine.options, group=group).sums
    several = functools.partial(torch.autograd.grad, is_grads_batched=True, retain_graph=True)
    refused("is_grads_batched", several, sums, mine.hidden, torch.eye(2).double())
    loss = vocab_parallel_preference_loss(*mine.inputs, **mine.options, group=group).loss
    (found,) = several(loss, mine.hidden, torch.tensor([1.0, -2.5]).double())
    (once,) = torch.autograd.grad(loss, mine.hidden)
    assert torch.equal(found, torch.stack([once, -2.5 * once]))


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Collectives and the numbers that a rank gives to each of them."""
    seen: list[tuple[str, int]] = []
    gathers = (
        "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    )
    gather, reduce = getattr(dist, gathers), dist.all_reduce

    def counting_gather(output, values, **options):
        seen.append(("gather", values.numel()))
        return gather(output, values, **options)

    def counting_reduce(values, **options):
        seen.append(("reduce", values.numel()))
        return reduce(values, **options)

    setattr(dist, gathers, counting_gather)
    dist.all_reduce = counting_reduce
    try:
        yield seen
    finally:
        setattr(dist, gathers, gather)
        dist.all_reduce = reduce


@case
def collectives_are_those_of_the_table(group):
    """The table of the module: nothing of the size of tokens times vocabulary is sent."""
    size = dist.get_world_size(group)
    tokens, width = 9, 8
    problem = make_problem([3, 2, 3, 1], vocab=400)
    mine = sharded(problem, [400 // size] * size, group)
    with counted() as seen:
        sums = vocab_parallel_sequence_logprobs(*mine.inputs, **mine.options, group=group).sums
        sums.sum().backward()
    assert seen == [("gather", 10), ("gather", 3 * tokens), ("reduce", tokens * width)], seen
    row = 400 // size * 8 + 3 * width * 8
    mine.scratch_bytes = 5 * row * 16 // 15 + 16
    with counted() as seen:
        vocab_parallel_preference_loss(*mine.inputs, **mine.options, group=group, loss="sft")
    expected = [("gather", 10), ("reduce", 1), ("gather", 15), ("gather", 12)]
    assert seen == [*expected, ("reduce", tokens * width)], seen
    mine.hidden.requires_grad_(False)
    with counted() as seen:
        vocab_parallel_preference_loss(*mine.inputs, **mine.options, group=group, loss="sft")
    assert seen == expected, seen


def doubled(logps: Tensor, *, by: Any = None) -> Tensor:
    return 2 * logps[:, 0] + 0 * torch.as_tensor(by).sum()


def shifted(logps: Tensor, *, by: Any = None) -> Tensor:
    return doubled(logps, by=by) - 1


@case
def ranks_that_disagree_are_told_so(group):
    """On every rank, without a hang; the next call works."""
    split = SPLITS[dist.get_world_size(group)][0]
    rank = dist.get_rank(group)
    mine = sharded(make_problem([3, 2]), split, group)
    last = rank == dist.get_world_size(group) - 1

    arguments = {
        "hidden": mine.hidden,
        "weight": mine.weight,
        "targets": mine.targets,
        "cu_seqlens": mine.cu_seqlens,
        "group": group,
    }

    def told(match: str, op=vocab_parallel_sequence_logprobs, **changes: Any) -> None:
        refused(match, op, **{**arguments, **changes})

    def one_alone(match: str, **changes: Any) -> None:
        """The last rank's arguments are bad, and the others hear of it."""
        told(match if last else "refused its arguments", **(changes if last else {}))

    loss = vocab_parallel_preference_loss
    moved = mine.targets.roll(1)
    told("targets differ", targets=moved if last else mine.targets)
    told("targets differ", loss, targets=moved if last else mine.targets)
    shorter = {
        "hidden": mine.hidden[1:],
        "targets": mine.targets[1:],
        "cu_seqlens": (mine.cu_seqlens - 1).clamp(min=0),
    }
    told("numbers of tokens differ", **(shorter if last else {}))
    told("cu_seqlens differ", cu_seqlens=torch.tensor([0, 2, 5] if last else [0, 3, 5]))
    told("options differ", temperature=0.9 if last else 1.0)
    told("options differ", loss, beta=0.9 if last else 1.0)
    for number in (0.1, torch.tensor(0.1)):
        kto = {"loss": "kto", "reference_logps": -torch.ones(2)}
        told("options differ", loss, kl=number * (1 + last), **kto)
        loss(**arguments, kl=number, **kto)

        def weighed(logps: Tensor, *, factors: Any, by: Any = None) -> Tensor:
            return logps[:, 0] * factors[0] * factors[1]["of"]

        for holder in ([1.0, {"of": number}], (2, {"of": number})):
            other = type(holder)([holder[0], {"of": 3 * number if last else number}])
            told("options differ", loss, loss=weighed, factors=other)
            told("options differ", loss, loss=functools.partial(weighed, factors=other))
            loss(**arguments, loss=functools.partial(weighed, factors=holder), by=print)
    told("options differ", loss, loss=functools.partial(shifted if last else doubled, by=2.0))
    told("options differ", loss, loss=shifted if last else doubled, by=2.0)
    told("options differ", loss, loss=doubled, by=torch.ones(2, 1) if last else torch.ones(1, 2))
    told("options differ", loss, loss=doubled, by=numpy.array([1.0, 1 + last]))
    told("scores or reference_logps differ", loss, scores=torch.ones(2) * (2 if last else 1))
    told("num_groups or num_tokens differ", loss, num_tokens=3 if last else 4)
    told("num_groups or num_tokens differ", loss, num_tokens=2**24 + last)
    frozen = mine.hidden.detach() if last else mine.hidden
    told("gradients differ", hidden=frozen)
    # Who wants no gradient would take no part in the second forward of a group that is too long.
    frozen_rows = mine.weight.detach() if last else mine.weight
    told("gradients differ", loss, hidden=mine.hidden.detach(), weight=frozen_rows)
    told("the ops called differ", loss if last else vocab_parallel_sequence_logprobs)
    one_alone("temperature", temperature=0.0)
    one_alone("last dimension", hidden=mine.hidden[:, 1:])
    one_alone("hidden must be a tensor", hidden=None)
    one_alone("targets must be a tensor", targets=[1, 2])
    one_alone("cu_seqlens must be a tensor", cu_seqlens=None)
    one_alone("weight is torch.float64 on meta", weight=mine.weight.to("meta"))
    told("'none'", loss, loss="none") if last else told("refused its arguments", loss)
    told("span", targets=mine.targets + 37)
    told("impl='torch'", impl="triton")
    told("no rows on any rank", weight=mine.weight[:0])
    refused("process group", vocab_parallel_sequence_logprobs, **{**arguments, "group": None})

    class Broken(float):
        def __float__(self) -> float:
            raise RuntimeError("no number")

    # An error of another kind is passed on as it is.
    if last:
        with pytest.raises(RuntimeError, match="no number"):
            vocab_parallel_sequence_logprobs(**{**arguments, "temperature": Broken(1.0)})
    else:
        told("refused its arguments")
    # Nor does a rank wait for one that cannot read what it would tell.
    if last:
        with pytest.raises(NotImplementedError, match="meta"):
            loss(**arguments, num_tokens=torch.tensor(3.0, device="meta"))
    else:
        told("refused its arguments", loss, num_tokens=3.0)
    vocab_parallel_sequence_logprobs(*mine.inputs, group=group)
