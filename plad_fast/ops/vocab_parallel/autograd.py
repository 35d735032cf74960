"""Vocabulary-parallel forward and backward, joined for autograd.

N tokens, none of them ignored; V rows of this rank's shard, D hidden, S sequences in B groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plad_fast.losses.objective import Objective
from plad_fast.losses.terms import length_normalized
from plad_fast.ops.autograd import alone_on
from plad_fast.ops.backend import Denominators, LinearProblem
from plad_fast.ops.first_order import first_order_only, refuse_batched
from plad_fast.ops.impl import onepass
from plad_fast.ops.impl.products import accumulation_dtype
from plad_fast.ops.impl.softmax_rows import RowStatistics
from plad_fast.ops.impl.workspace import HeadGradients, scaled_gradient
from plad_fast.ops.logit_spec import LogitSpec
from plad_fast.ops.vocab_parallel.group import Shards
from plad_fast.ops.vocab_parallel.workspace import ShardStatistics, ShardWorkspace, whole_statistics


class ShardedHead(NamedTuple):
    """What is done with a shard of the head, beside its tensors."""

    shards: Shards
    spec: LogitSpec
    scratch_bytes: int
    reduce_hidden_grad: bool

    def workspace(self, *, together: bool) -> Callable[..., ShardWorkspace]:
        return functools.partial(ShardWorkspace, shards=self.shards, together=together)

    def reduced(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of the hidden states, summed over the ranks before it is rounded."""
        if self.reduce_hidden_grad and grad.numel():
            self.shards.sum_(grad)
        return grad.to(dtype)


class ShardedTokens(torch.autograd.Function):
    """(hidden, weight, bias) to token log-probabilities (N,), lse (N,) and entropy (N,) or (0,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,) of the whole vocabulary
        head: ShardedHead,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with alone_on(hidden):
            make = head.workspace(together=False)
            space = make(hidden, weight, bias, head.spec, head.scratch_bytes, for_gradient=False)
            empty = hidden.new_empty(0, 5 if with_entropy else 3, dtype=space.products.dtype)
            parts = [
                space.part(hidden[chunk], targets[chunk], with_entropy)
                for chunk in space.chunks(0, len(hidden))
            ]
            whole = whole_statistics(head.shards.gather(torch.cat([empty, *parts])))
        ctx.save_for_backward(
            hidden, weight, bias, targets, whole.row_max, whole.sum_exp, whole.miss
        )
        ctx.head = head
        ctx.set_materialize_grads(False)
        entropy = whole.row_max.new_empty(0) if whole.entropy is None else whole.entropy
        ctx.mark_non_differentiable(entropy)
        return whole.token_logprobs, whole.row_max + whole.sum_exp.log(), entropy

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_batched(grad, grad_lse)
        hidden, weight, bias, targets, row_max, sum_exp, miss = ctx.saved_tensors
        head: ShardedHead = ctx.head
        grad = torch.zeros_like(miss) if grad is None else grad
        active = grad != 0 if grad_lse is None else (grad != 0) | (grad_lse != 0)
        active_rows = active.nonzero().squeeze(1)
        with alone_on(hidden):
            make = head.workspace(together=False)
            space = make(
                hidden[: len(active_rows)],
                weight,
                bias,
                head.spec,
                head.scratch_bytes,
                for_gradient=True,
            )
            needs = ctx.needs_input_grad
            grads = HeadGradients(
                hidden if needs[0] else None,
                weight if needs[1] else None,
                bias if needs[2] else None,
                space.products,
                hidden_dtype=space.grad_hidden_dtype,
            )
            for chunk in space.chunks(0, len(active_rows)):
                rows = active_rows[chunk]
                h, t = hidden[rows], targets[rows]
                part = space.part(h, t)
                whole = RowStatistics(row_max[rows], sum_exp[rows], miss[rows], miss[rows], None)
                statistics = ShardStatistics(whole, part[:, 0])
                of_lse = None if grad_lse is None else grad_lse[rows]
                grads.add(space.gradient(t, statistics, grad[rows], of_lse), h, rows)
            del space
            of_hidden, of_weight, of_bias = grads.finish(weight.dtype)
            if of_hidden is not None:
                of_hidden = head.reduced(of_hidden, hidden.dtype)
        return of_hidden, of_weight, of_bias, None, None, None


class ShardedPreference(torch.autograd.Function):
    """(hidden, weight, bias) to loss (), sums (S,), group losses (B,) and active (B,).

    The gradients are made in the forward, for an upstream of 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,) of the whole vocabulary
        cu_seqlens: Tensor,  # (S + 1,)
        scores: Tensor | None,  # (S,)
        reference_logps: Tensor | None,  # (S,)
        objective: Objective,
        denominators: Denominators,
        needs: tuple[bool, bool, bool],
        stubs: tuple[Tensor | None, ...],  # of hidden, weight and bias
        head: ShardedHead,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        no_index = -1  # nothing is ignored
        problem = LinearProblem(
            hidden, weight, bias, targets, cu_seqlens, head.spec, no_index, head.scratch_bytes
        )
        with alone_on(hidden):
            value, sums, group_losses, active, grads = onepass.linear_preference_loss(
                problem,
                scores,
                reference_logps,
                objective,
                denominators,
                needs,
                workspace=head.workspace(together=True),
            )
            if grads.hidden is not None:
                # float16 stays float32 until a loss scale has come with the upstream.
                half = hidden.dtype == torch.float16
                dtype = accumulation_dtype(hidden.dtype) if half else hidden.dtype
                grads = grads._replace(hidden=head.reduced(grads.hidden, dtype))
        ctx.save_for_backward(*grads, *stubs)
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        sums = length_normalized(sums, cu_seqlens.diff(), objective.length_normalization)
        ctx.mark_non_differentiable(sums, group_losses, active)
        return value, sums, group_losses, active

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_batched(grad_loss)
        scaled = (
            None if grad is None else scaled_gradient(grad, grad_loss, dtype)
            for grad, dtype in zip(ctx.saved_tensors[:3], ctx.dtypes, strict=True)
        )
        return *scaled, *[None] * 9
