"""The torch backend: any device, any floating dtype, memory within a scratch budget.

Two-phase: the forward keeps no logits, the backward computes a chunk's anew, so four products of
2NVD flop in all, and fewer where upstream gradients are zero.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plad_fast.logit_spec import LogitSpec
from plad_fast.onepass import linear_preference_loss
from plad_fast.segments import segment_sums
from plad_fast.softmax_rows import RowStatistics
from plad_fast.stored_logits import stored_token_logprobs
from plad_fast.workspace import HeadGradients, Workspace

__all__ = [
    "linear_preference_loss",
    "linear_sequence_logprobs",
    "stored_token_logprobs",
    "unavailable",
]


def unavailable(tensor: Tensor) -> str | None:
    """Why this backend cannot take the tensor: it can take every one."""
    return None


def linear_sequence_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,), none of them ignored
    cu_seqlens: Tensor,  # (S + 1,)
    spec: LogitSpec,
    scratch_bytes: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sums (S,), token log-probabilities (N,), lse (N,) and detached entropy (N,) or None."""
    sums, token_logprobs, lse, entropy = _LinearSequenceLogprobs.apply(
        hidden, weight, bias, targets, cu_seqlens, spec, scratch_bytes, with_entropy
    )
    return sums, token_logprobs, lse, entropy if with_entropy else None


class _LinearSequenceLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cu_seqlens: Tensor,
        spec: LogitSpec,
        scratch_bytes: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            space = Workspace(hidden, weight, bias, spec, scratch_bytes, for_gradient=False)
            num_tokens = len(hidden)
            row_max = hidden.new_empty(num_tokens, dtype=space.products.dtype)
            sum_exp = torch.empty_like(row_max)
            token_logprobs = torch.empty_like(row_max)
            entropy = torch.empty_like(row_max) if with_entropy else row_max.new_empty(0)
            for rows in space.chunks(0, num_tokens):
                statistics = space.forward(hidden[rows], targets[rows], with_entropy)
                row_max[rows] = statistics.row_max
                sum_exp[rows] = statistics.sum_exp
                token_logprobs[rows] = statistics.token_logprobs
                if statistics.entropy is not None:
                    entropy[rows] = statistics.entropy
            sums = segment_sums(token_logprobs, cu_seqlens)
        ctx.save_for_backward(hidden, weight, bias, targets, cu_seqlens)
        ctx.spec, ctx.scratch_bytes, ctx.dtype = spec, scratch_bytes, space.products.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(entropy)
        return sums, token_logprobs, row_max + sum_exp.log(), entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_sums: Tensor | None,  # (S,)
        grad_token: Tensor | None,  # (N,)
        grad_lse: Tensor | None,  # (N,)
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, cu_seqlens = ctx.saved_tensors
        grad = hidden.new_zeros(len(hidden), dtype=ctx.dtype)
        if grad_sums is not None:
            grad += grad_sums.repeat_interleave(cu_seqlens.diff(), output_size=len(grad))
        if grad_token is not None:
            grad += grad_token
        active = grad != 0 if grad_lse is None else (grad != 0) | (grad_lse != 0)
        active_rows = active.nonzero().squeeze(1)
        with torch.autocast(hidden.device.type, enabled=False):
            space = Workspace(
                hidden[: len(active_rows)],
                weight,
                bias,
                ctx.spec,
                ctx.scratch_bytes,
                for_gradient=True,
            )
            needs = ctx.needs_input_grad
            grads = HeadGradients(
                hidden if needs[0] else None,
                weight if needs[1] else None,
                bias if bias is not None and needs[2] else None,
                space.products,
            )
            for chunk in space.chunks(0, len(active_rows)):
                rows = active_rows[chunk]
                h, t = hidden[rows], targets[rows]
                statistics: RowStatistics = space.forward(h, t)
                upstream_lse = None if grad_lse is None else grad_lse[rows]
                grads.add(space.gradient(t, statistics, grad[rows], upstream_lse), h, rows)
        grads.finish()
        return *_cast(grads, weight, bias), None, None, None, None, None


def _cast(
    grads: HeadGradients, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in the dtypes of what they belong to."""
    d_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
    d_bias = None if grads.bias is None or bias is None else grads.bias.to(bias.dtype)
    return grads.hidden, d_weight, d_bias
