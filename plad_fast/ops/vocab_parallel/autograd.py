"""Vocabulary-parallel forward and backward, joined for autograd.

N tokens, none of them ignored; V rows of this rank's shard, D hidden, S sequences in B groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.terms import length_normalized
from plad_fast.ops.autograd import alone_on, is_batched
from plad_fast.ops.backend import (
    Denominators,
    HeadGradient,
    HeadOptions,
    LinearProblem,
    Needs,
    Upstream,
)
from plad_fast.ops.impl import onepass
from plad_fast.ops.impl.softmax_rows import SoftmaxStatistics
from plad_fast.ops.impl.workspace import HeadGradients
from plad_fast.ops.preference_autograd import FusedLoss, differentiable
from plad_fast.ops.registration import first_order_only
from plad_fast.ops.vocab_parallel.group import Shards
from plad_fast.ops.vocab_parallel.workspace import (
    WIDTH,
    ShardWorkspace,
    seen_by_shard,
    whole_statistics,
)


class ShardedHead(NamedTuple):
    """What is done with a shard of the head, beside its tensors."""

    shards: Shards
    options: HeadOptions

    def workspace(self, *, together: bool) -> Callable[..., ShardWorkspace]:
        return functools.partial(ShardWorkspace, shards=self.shards, together=together)

    def reduced(self, grads: HeadGradient, dtype: torch.dtype) -> HeadGradient:
        """The gradient of the hidden states summed over the ranks, before it is rounded."""
        if grads.hidden is None:
            return grads
        if grads.hidden.numel():
            self.shards.sum_(grads.hidden)
        return grads._replace(hidden=grads.hidden.to(dtype))


class ShardedTokens(torch.autograd.Function):
    """(hidden, weight, bias) to token log-probabilities (N,) and lse (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,) of the whole vocabulary
        sharded: ShardedHead,
    ) -> tuple[Tensor, Tensor]:
        with alone_on(hidden):
            workspace = sharded.workspace(together=False)(
                (hidden, weight, bias), sharded.options, len(hidden), for_gradient=False
            )
            empty = hidden.new_empty(0, WIDTH, dtype=workspace.products.dtype)
            parts = [
                workspace.part(hidden[chunk], targets[chunk])
                for chunk in workspace.chunks(len(hidden))
            ]
            whole = whole_statistics(sharded.shards.gather(torch.cat([empty, *parts])))
        ctx.save_for_backward(hidden, weight, bias, targets, *whole[:2], whole.miss)
        ctx.sharded = sharded
        ctx.set_materialize_grads(False)
        return whole.token_logprobs, whole.row_max + whole.sum_exp.log()

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _refuse_batched(grad, grad_lse)
        hidden, weight, bias, targets, row_max, sum_exp, miss = ctx.saved_tensors
        sharded: ShardedHead = ctx.sharded
        head = hidden, weight, bias
        upstream = Upstream(torch.zeros_like(miss) if grad is None else grad, grad_lse)
        active_rows = upstream.active().nonzero().squeeze(1)
        with alone_on(hidden):
            workspace = sharded.workspace(together=False)(
                head, sharded.options, len(active_rows), for_gradient=True
            )
            grads = HeadGradients(
                head,
                ctx.needs_input_grad[:3],
                workspace,
                hidden_dtype=workspace.grad_hidden_dtype,
            )
            for chunk in workspace.chunks(len(active_rows)):
                rows = active_rows[chunk]
                h, t = hidden[rows], targets[rows]
                whole = SoftmaxStatistics(
                    row_max[rows], sum_exp[rows], miss[rows], miss[rows], None
                )
                statistics = seen_by_shard(whole, workspace.part(h, t))
                of_lse = None if grad_lse is None else grad_lse[rows]
                d_logits = workspace.gradient(t, statistics, upstream.logprobs[rows], of_lse)
                grads.add(d_logits, h, rows)
            del workspace
            return *sharded.reduced(grads.finish(weight.dtype), hidden.dtype), None, None


def sharded_preference_loss(
    problem: LinearProblem,  # none of its targets is ignored
    scores: Tensor | None,  # (S,)
    reference_logps: Tensor | None,  # (S,)
    objective: Objective,
    denominators: Denominators,
    sharded: ShardedHead,
) -> FusedLoss:
    hidden, counts = problem.hidden, problem.cu_seqlens.diff()

    def run(needs: Needs) -> tuple[FusedLoss, HeadGradient]:
        with alone_on(hidden):
            loss, sums, group_losses, active, grads = onepass.linear_preference_loss(
                problem,
                scores,
                reference_logps,
                objective,
                denominators,
                needs,
                None,
                None,
                sharded.workspace(together=True),
            )
            # float16 stays float32 until a loss scale has come with the upstream.
            half = hidden.dtype == torch.float16
            grads = sharded.reduced(grads, torch.float32 if half else hidden.dtype)
        sums = length_normalized(sums, counts, objective.length_normalization)
        return FusedLoss(loss, sums, counts, group_losses, active), grads

    return differentiable(problem.head, run)


def _refuse_batched(*upstream: Tensor | None) -> None:
    """Several gradients at a time would be several collectives."""
    if any(map(is_batched, upstream)):
        raise UsageError(
            "the vocabulary-parallel op does not work under is_grads_batched=True (nor under a "
            "vectorised jacobian); call torch.autograd.grad once for each gradient"
        )
