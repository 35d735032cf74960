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
from tests.support.problems import Problem, make_problem

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
                "return_entropy": True,
            }
            expected = linear_sequence_logprobs(
                *whole.inputs, **whole.options, impl="torch", **options
            )
            found = vocab_parallel_sequence_logprobs(
                *mine.inputs, **mine.options, group=group, **options
            )
            for name in ("sums", "counts", "token_logprobs", "lse", "entropy"):
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
def the_sum_over_ranks_can_be_left_to_the_caller(group):
    split = SPLITS[dist.get_world_size(group)][0]
    whole = make_problem([3, 2])
    linear_sequence_logprobs(*whole.inputs, **whole.options, impl="torch").sums.sum().backward()
    for op in (vocab_parallel_sequence_logprobs, vocab_parallel_preference_loss):
        mine = sharded(whole, split, group)
        more = {"loss": lambda logps: logps.sum(1)} if "preference" in op.__name__ else {}
        out = op(*mine.inputs, **mine.options, group=group, reduce_hidden_grad=False, **more)
        (out.loss if more else out.sums.sum()).backward()
        assert not torch.allclose(mine.hidden.grad, whole.hidden.grad)
        dist.all_reduce(mine.hidden.grad, group=group)
        check_gradients(mine, whole, split, group, op.__name__)


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
