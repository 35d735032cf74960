"""Joins a backend's forward and backward, and registers the ops with `torch.library`.

Registered ops are opaque to `torch.compile`: a compiled loss calls them without a graph break,
and their fake implementations give it shapes that follow a dynamic N and S. What depends on the
values of a tensor (checks, dropping rows) or on the device (a budget of 0 bytes stands for its
default) happens inside of them.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor

from plad_fast.ops import validation as check
from plad_fast.ops.backend import LinearProblem, Upstream, default_scratch_bytes, get_backend
from plad_fast.ops.first_order import first_order_only
from plad_fast.ops.impl.products import accumulation_dtype
from plad_fast.ops.logit_spec import LogitSpec

# Schemas are read off these signatures, which must spell Optional out for older versions of torch.
# ruff: noqa: UP045

WAITING = (torch.Tag.cudagraph_unsafe,)
"""Tags of ops that may wait for the device, as no captured CUDA graph can: Inductor leaves them out
of its graphs (`torch.compile(mode="reduce-overhead")`)."""


@contextlib.contextmanager
def alone_on(tensor: Tensor) -> Iterator[None]:
    """Without autocast, and with the tensor's GPU as the current one: Triton launches there."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
        if tensor.is_cuda:
            stack.enter_context(torch.cuda.device(tensor.device))
        yield


@torch.library.custom_op("plad_fast::linear_sequence_logprobs", mutates_args=(), tags=WAITING)
def linear_sequence_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Optional[Tensor],  # (V,)
    targets: Tensor,  # (N,) int64
    cu_seqlens: Tensor,  # (S + 1,) int64
    softcap: Optional[float],
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    length_normalization: float,
    with_entropy: bool,
    impl: str,
    scratch_bytes: int,
    skip_inactive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`LinearStatistics`, with an empty entropy where none is asked for."""
    check.check_sequences(targets, cu_seqlens, len(weight), ignore_index)
    spec = LogitSpec(softcap, logit_scale, temperature)
    scratch = scratch_bytes or default_scratch_bytes(hidden.device)
    problem = LinearProblem(hidden, weight, bias, targets, cu_seqlens, spec, ignore_index, scratch)
    with alone_on(hidden):
        statistics = get_backend(impl, hidden).linear_forward(
            problem, length_normalization, with_entropy
        )
    entropy = statistics.lse.new_empty(0) if statistics.entropy is None else statistics.entropy
    return (*statistics[:6], entropy)


@linear_sequence_logprobs.register_fake
def _(hidden, weight, bias, targets, cu_seqlens, *options):
    dtype = accumulation_dtype(hidden.dtype)
    with_entropy = options[5]
    num_tokens, num_sequences = hidden.shape[0], cu_seqlens.shape[0] - 1

    def per_token() -> Tensor:
        return hidden.new_empty(num_tokens, dtype=dtype)

    return (
        hidden.new_empty(num_sequences, dtype=dtype),
        targets.new_empty(num_sequences),
        *(per_token() for _ in range(4)),
        per_token() if with_entropy else hidden.new_empty(0, dtype=dtype),
    )


@torch.library.custom_op(
    "plad_fast::linear_sequence_logprobs_backward", mutates_args=(), tags=WAITING
)
def _linear_backward(
    grad_sums: Optional[Tensor],  # (S,)
    grad_token: Optional[Tensor],  # (N,)
    grad_lse: Optional[Tensor],  # (N,)
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    targets: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,  # (S,)
    lse: Tensor,  # (N,)
    tail: Tensor,  # (N,)
    miss: Tensor,  # (N,)
    softcap: Optional[float],
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    length_normalization: float,
    impl: str,
    scratch_bytes: int,
    skip_inactive: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where they are not needed."""
    keep = targets != ignore_index
    grad = torch.zeros_like(lse)
    if grad_sums is not None:
        per_token = grad_sums
        if length_normalization:
            per_token = grad_sums / counts.clamp(min=1).to(lse.dtype) ** length_normalization
        grad += per_token.repeat_interleave(cu_seqlens.diff(), output_size=len(grad))
    if grad_token is not None:
        grad += grad_token
    upstream = Upstream(grad.where(keep, 0), None if grad_lse is None else grad_lse.where(keep, 0))
    spec = LogitSpec(softcap, logit_scale, temperature)
    scratch = scratch_bytes or default_scratch_bytes(hidden.device)
    problem = LinearProblem(hidden, weight, bias, targets, cu_seqlens, spec, ignore_index, scratch)
    needs = (need_hidden, need_weight, need_bias)
    with alone_on(hidden):
        grads = get_backend(impl, hidden).linear_backward(
            problem, lse, tail, miss, upstream, needs, skip_inactive
        )
    first, second, third = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return first, second, third


@_linear_backward.register_fake
def _(grad_sums, grad_token, grad_lse, hidden, weight, bias, *options):
    return tuple(
        torch.empty_like(leaf) if need and leaf is not None else hidden.new_empty(0)
        for leaf, need in zip((hidden, weight, bias), options[-3:], strict=True)
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, cu_seqlens, *options = inputs
    _, counts, _, lse, tail, miss, entropy = output
    ctx.save_for_backward(hidden, weight, bias, targets, cu_seqlens, counts, lse, tail, miss)
    softcap, logit_scale, temperature, ignore_index, alpha, _, impl, scratch, skip = options
    ctx.options = softcap, logit_scale, temperature, ignore_index, alpha, impl, scratch, skip
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(counts, tail, miss, entropy)


@first_order_only
def _differentiate_linear(
    ctx: Any,
    grad_sums: Tensor | None,
    _counts: Tensor | None,
    grad_token: Tensor | None,
    grad_lse: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = _linear_backward(
        grad_sums, grad_token, grad_lse, *ctx.saved_tensors, *ctx.options, *needs
    )
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 11


linear_sequence_logprobs.register_autograd(_differentiate_linear, setup_context=_save_linear)


@torch.library.custom_op("plad_fast::stored_token_logprobs", mutates_args=())
def stored_token_logprobs(
    logits: Tensor,  # (N, V) or (S, T, V)
    targets: Tensor,  # (N,) or (S, T) int64
    cu_seqlens: Tensor,  # (S + 1,) int64, checked here only
    softcap: Optional[float],
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    impl: str,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token log-probabilities, lse, its tail and 1 - p(target), of the targets' shape."""
    check.check_sequences(targets.reshape(-1), cu_seqlens, logits.shape[-1], ignore_index)
    spec = LogitSpec(softcap, logit_scale, temperature)
    scratch = scratch_bytes or default_scratch_bytes(logits.device)
    with alone_on(logits):
        return get_backend(impl, logits).stored_forward(
            logits, targets, spec, ignore_index, scratch
        )


@stored_token_logprobs.register_fake
def _(logits, targets, *_):
    dtype = accumulation_dtype(logits.dtype)
    return tuple(logits.new_empty(targets.shape, dtype=dtype) for _ in range(4))


@torch.library.custom_op("plad_fast::stored_token_logprobs_backward", mutates_args=(), tags=WAITING)
def _stored_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    tail: Tensor,
    miss: Tensor,
    softcap: Optional[float],
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    impl: str,
    scratch_bytes: int,
) -> Tensor:
    spec = LogitSpec(softcap, logit_scale, temperature)
    scratch = scratch_bytes or default_scratch_bytes(logits.device)
    with alone_on(logits):
        return get_backend(impl, logits).stored_backward(
            logits, targets, lse, tail, miss, grad, spec, ignore_index, scratch
        )


@_stored_backward.register_fake
def _(grad, logits, *_):
    return torch.empty_like(logits)


def _save_stored(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _, *ctx.options = inputs
    _, lse, tail, miss = output
    ctx.save_for_backward(logits, targets, lse, tail, miss)
    ctx.mark_non_differentiable(lse, tail, miss)


@first_order_only
def _differentiate_stored(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _stored_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


stored_token_logprobs.register_autograd(_differentiate_stored, setup_context=_save_stored)
