"""Cases of tests/ops/test_vocab_parallel.py: dtypes, derivatives and extreme numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plad_fast import fused_linear_preference_loss, linear_sequence_logprobs
from plad_fast.ops.vocab_parallel.api import (
    vocab_parallel_preference_loss,
    vocab_parallel_sequence_logprobs,
)
from tests.support.problems import Problem, assert_within_budget, make_problem, oracle
from tests.support.vocab_parallel_ranks import (
    SPLITS,
    case,
    close,
    shard_of,
    sharded,
)

DRAWS = 16
"""Problems of which the largest float32 errors are compared. On one so small torch's own is luck:
that of d weight goes from 4e-7 to 2e-6 over draws, and doubles with a CPU's instructions.
"""


@case
def sixteen_bits_stay_within_the_error_budget(group):
    """And float32."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for seed in range(DRAWS if dtype == torch.float32 else 1):
            for what, results in _sums_and_gradients(dtype, seed, group).items():
                found.setdefault(what, []).append(results)
        for what, draws in found.items():
            ours, same, truth = (torch.stack(each) for each in zip(*draws, strict=True))
            assert_within_budget(ours, same, truth, f"{dtype} {what}")


def _sums_and_gradients(
    dtype: torch.dtype, seed: int, group: Any
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Ours, torch's in the same dtype, and torch's in float64, of a drawn problem."""
    split = SPLITS[dist.get_world_size(group)][1]
    base = make_problem([3, 2, 5, 4], bias=True, width=32, scale=0.5, scratch_rows=4, seed=seed)
    low = base.to(dtype)
    truth, same = low.to(torch.float64), low.to(dtype)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = []
    for problem in (same, truth):
        sums, _ = oracle(problem)
        (sums * upstream).sum().backward()
        expected.append(sums)
    found = {}
    for kind in ("two phases", "one pass"):
        mine = sharded(low, split, group)
        if kind == "two phases":
            sums = vocab_parallel_sequence_logprobs(*mine.inputs, **mine.options, group=group).sums
            (sums * upstream).sum().backward()
        else:
            out = vocab_parallel_preference_loss(
                *mine.inputs,
                **mine.options,
                group=group,
                loss=lambda logps, scores: (logps * scores).sum(1),
                scores=upstream,
                num_groups=1,
            )
            sums = out.sums
            out.loss.backward()
        assert mine.hidden.grad.dtype == mine.weight.grad.dtype == dtype
        found[f"{kind} sums"] = (sums, *expected)
        for name in ("hidden", "weight", "bias"):
            grads = [getattr(p, name).grad for p in (mine, same, truth)]
            if name != "hidden":
                grads[1:] = [g.split(split)[dist.get_rank(group)] for g in grads[1:]]
            found[f"{kind} d {name}"] = tuple(grads)
    return found


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
