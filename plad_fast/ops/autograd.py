"""Joins a backend's forward and backward to registered ops (`plad_fast.ops.registration`).

Fake implementations give `torch.compile` shapes that follow a dynamic N and S. What depends on the
values of a tensor (checks, dropping rows) or on the device (a budget of 0 bytes stands for its
default) happens inside of the ops. They take the options one by one, in the order of `HeadOptions`.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from plad_fast.losses.terms import length_normalized, segment_counts, segment_sums
from plad_fast.ops import validation as check
from plad_fast.ops.backend import HeadOptions, LinearProblem, Upstream, get_backend
from plad_fast.ops.impl.products import accumulation_dtype
from plad_fast.ops.registration import first_order_only, register_op

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor cu_seqlens"
OPTIONS = (
    "float? softcap, float logit_scale, float temperature, SymInt ignore_index, str impl, "
    "SymInt scratch_bytes"
)
"""Schemas of a `LinearProblem`'s tensors and of `HeadOptions`."""


@contextlib.contextmanager
def alone_on(tensor: Tensor) -> Iterator[None]:
    """Without autocast, and with the tensor's GPU as the current one: Triton launches there."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
        if tensor.is_cuda:
            stack.enter_context(torch.cuda.device(tensor.device))
        yield


def problem_of(*arguments: Any) -> LinearProblem:
    """The problem whose `arguments` these are."""
    hidden, weight, bias, targets, cu_seqlens, *options = arguments
    return LinearProblem(hidden, weight, bias, targets, cu_seqlens, HeadOptions(*options))


def empty_for_none(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What a registered op returns, which has no way to return None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def is_batched(tensor: Tensor | None) -> bool:
    """Whether a gradient stands for several, as under `torch.autograd.grad(is_grads_batched=True)`.

    By torch's own answer, which is no part of its public interface; no where it gives none.
    """
    names = ("is_batchedtensor", "is_legacy_batchedtensor")  # autograd.grad's are the latter
    asked = (getattr(torch._C._functorch, name, None) for name in names)
    return tensor is not None and any(ask is not None and ask(tensor) for ask in asked)


def _linear_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Sums (S,), counts (S,) and `LinearStatistics`, whose entropy is empty if not asked for."""
    *of_problem, alpha, _, entropy_order = arguments
    problem = problem_of(*of_problem)
    targets, cu_seqlens, options = problem.targets, problem.cu_seqlens, problem.options
    check.check_sequences(targets, cu_seqlens, len(problem.weight), options.ignore_index)
    with alone_on(problem.hidden):
        backend = get_backend(options.impl, problem.hidden)
        statistics = backend.linear_forward(problem, entropy_order)
        counts = segment_counts(targets != options.ignore_index, cu_seqlens)
        sums = length_normalized(segment_sums(statistics.token_logprobs, cu_seqlens), counts, alpha)
    return sums, counts, *empty_for_none(statistics.lse, *statistics)


def _fake_linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(hidden.dtype)
    entropy_order = options[-1]
    num_tokens, num_sequences = hidden.shape[0], cu_seqlens.shape[0] - 1

    def per_token() -> Tensor:
        return hidden.new_empty(num_tokens, dtype=dtype)

    return (
        hidden.new_empty(num_sequences, dtype=dtype),
        targets.new_empty(num_sequences),
        *(per_token() for _ in range(4)),
        per_token() if entropy_order else hidden.new_empty(0, dtype=dtype),
    )


def _linear_gradients(
    grad_sums: Tensor | None,  # (S,)
    grad_token: Tensor | None,  # (N,)
    grad_lse: Tensor | None,  # (N,)
    counts: Tensor,  # (S,)
    lse: Tensor,  # (N,)
    tail: Tensor,  # (N,)
    miss: Tensor,  # (N,)
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight and bias; empty where they are not needed."""
    *of_problem, alpha, skip_inactive, needs = arguments
    problem = problem_of(*of_problem)
    keep = problem.targets != problem.options.ignore_index
    grad = torch.zeros_like(lse)
    if grad_sums is not None:
        per_token = grad_sums
        if alpha:
            per_token = grad_sums / counts.clamp(min=1).to(lse.dtype) ** alpha
        grad += per_token.repeat_interleave(problem.cu_seqlens.diff(), output_size=len(grad))
    if grad_token is not None:
        grad += grad_token
    upstream = Upstream(grad.where(keep, 0), None if grad_lse is None else grad_lse.where(keep, 0))
    with alone_on(problem.hidden):
        grads = get_backend(problem.options.impl, problem.hidden).linear_backward(
            problem, lse, tail, miss, upstream, tuple(needs), skip_inactive
        )
    return empty_for_none(problem.hidden, *grads)


def _fake_linear_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    leaves, needs = arguments[7:10], arguments[-1]
    return tuple(
        torch.empty_like(leaf) if need and leaf is not None else leaves[0].new_empty(0)
        for leaf, need in zip(leaves, needs, strict=True)
    )


_linear_backward = register_op(
    "linear_sequence_logprobs_backward(Tensor? grad_sums, Tensor? grad_token, Tensor? grad_lse, "
    f"Tensor counts, Tensor lse, Tensor tail, Tensor miss, {HEAD}, {OPTIONS}, "
    "float length_normalization, bool skip_inactive, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _linear_gradients,
    fake=_fake_linear_gradients,
)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, counts, _, lse, tail, miss, entropy = output
    ctx.save_for_backward(counts, lse, tail, miss, *inputs[:5])
    ctx.options = inputs[5:-1]
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
        grad_sums, grad_token, grad_lse, *ctx.saved_tensors, *ctx.options, list(needs)
    )
    of_head = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *of_head, *(None for _ in ctx.needs_input_grad[3:])


linear_sequence_logprobs = register_op(
    f"linear_sequence_logprobs({HEAD}, {OPTIONS}, float length_normalization, bool skip_inactive, "
    "int entropy_order) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_forward,
    fake=_fake_linear_forward,
    backward=_differentiate_linear,
    save=_save_linear,
)


def _stored_forward(
    logits: Tensor,  # (N, V) or (S, T, V)
    targets: Tensor,  # (N,) or (S, T) int64
    cu_seqlens: Tensor,  # (S + 1,) int64, checked here only
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token log-probabilities, lse, its tail and 1 - p(target), of the targets' shape."""
    options = HeadOptions(*arguments)
    check.check_sequences(targets.reshape(-1), cu_seqlens, logits.shape[-1], options.ignore_index)
    with alone_on(logits):
        return get_backend(options.impl, logits).stored_forward(logits, targets, options)


def _fake_stored_forward(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(logits.dtype)
    return tuple(logits.new_empty(targets.shape, dtype=dtype) for _ in range(4))


def _stored_gradient(
    grad: Tensor,  # of the targets' shape
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    tail: Tensor,
    miss: Tensor,
    *arguments: Any,
) -> Tensor:
    options = HeadOptions(*arguments)
    with alone_on(logits):
        return get_backend(options.impl, logits).stored_backward(
            logits, targets, lse, tail, miss, grad, options
        )


def _fake_stored_gradient(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


_stored_backward = register_op(
    "stored_token_logprobs_backward(Tensor grad, Tensor logits, Tensor targets, Tensor lse, "
    f"Tensor tail, Tensor miss, {OPTIONS}) -> Tensor",
    _stored_gradient,
    fake=_fake_stored_gradient,
)


def _save_stored(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _, *ctx.options = inputs
    _, lse, tail, miss = output
    ctx.save_for_backward(logits, targets, lse, tail, miss)
    ctx.mark_non_differentiable(lse, tail, miss)


@first_order_only
def _differentiate_stored(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    of_logits = _stored_backward(grad, *ctx.saved_tensors, *ctx.options)
    return of_logits, *(None for _ in ctx.needs_input_grad[1:])


stored_token_logprobs = register_op(
    f"stored_token_logprobs(Tensor logits, Tensor targets, Tensor cu_seqlens, {OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _stored_forward,
    fake=_fake_stored_forward,
    backward=_differentiate_stored,
    save=_save_stored,
    tags=(),
)
