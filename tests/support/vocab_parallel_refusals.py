"""Cases of tests/ops/test_vocab_parallel.py: what ranks refuse, each of them, without a hang."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from plad_fast.ops.vocab_parallel.api import (
    vocab_parallel_preference_loss,
    vocab_parallel_sequence_logprobs,
)
from tests.support.problems import make_problem
from tests.support.vocab_parallel_ranks import SPLITS, case, refused, sharded


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
    one_alone("vocab_size must be", vocab_size="all")
    one_alone("vocab_size must be", vocab_size=0)
    told("span", targets=mine.targets + 37)
    told("vocab_size is 38", vocab_size=38)
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
