"""Joins a backend's forward and backward to registered ops (`plad_fast.ops.registration`).

Fake implementations give `torch.compile` shapes that follow a dynamic N and S. What depends on the
values of a tensor (checks, dropping rows) or on the device (a budget of 0 bytes stands for its
default) happens inside of the ops. They take the options one by one, in the order of `HeadOptions`;
a NamedTuple for each op has names for its arguments.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

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

_NUM_TENSORS = len(LinearProblem._fields) - 1
_NUM_ARGUMENTS = _NUM_TENSORS + len(HeadOptions._fields)

Call = TypeVar("Call", bound=tuple[Any, ...])


@contextlib.contextmanager
def alone_on(tensor: Tensor) -> Iterator[None]:
    """Without autocast, and with the tensor's GPU as the current one: Triton launches there."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
        if tensor.is_cuda:
            stack.enter_context(torch.cuda.device(tensor.device))
        yield


def call_of(kind: Callable[..., Call], arguments: Sequence[Any]) -> Call:
    """The arguments of a registered op as a NamedTuple, whose field `problem` stands for several of
    them.
    """
    start = cast(Any, kind)._fields.index("problem")
    options_at, stop = start + _NUM_TENSORS, start + _NUM_ARGUMENTS
    options = HeadOptions(*arguments[options_at:stop])
    problem = LinearProblem._make([*arguments[start:options_at], options])
    return kind(*arguments[:start], problem, *arguments[stop:])


def arguments_of(call: Any) -> tuple[Any, ...]:
    """What `call_of` makes the call of."""
    start = call._fields.index("problem")
    return *call[:start], *call.problem.arguments, *call[start + 1 :]


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


class _Forward(NamedTuple):
    """Arguments of `linear_sequence_logprobs`."""

    problem: LinearProblem
    length_normalization: float
    skip_inactive: bool
    """For the backward."""
    entropy_order: int


class _Backward(NamedTuple):
    """Arguments of `linear_sequence_logprobs_backward`."""

    grad_sums: Tensor | None  # (S,)
    grad_token: Tensor | None  # (N,)
    grad_lse: Tensor | None  # (N,)
    counts: Tensor  # (S,)
    lse: Tensor  # (N,)
    tail: Tensor  # (N,)
    miss: Tensor  # (N,)
    problem: LinearProblem
    length_normalization: float
    skip_inactive: bool
    needs: Sequence[bool]


def _linear_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Sums (S,), counts (S,) and `LinearStatistics`, whose entropy is empty if not asked for."""
    problem, alpha, _, entropy_order = call_of(_Forward, arguments)
    targets, cu_seqlens, options = problem.targets, problem.cu_seqlens, problem.options
    check.check_sequences(targets, cu_seqlens, len(problem.weight), options.ignore_index)
    with alone_on(problem.hidden):
        backend = get_backend(options.impl, problem.hidden)
        statistics = backend.linear_forward(problem, entropy_order)
        counts = segment_counts(targets != options.ignore_index, cu_seqlens)
        sums = length_normalized(segment_sums(statistics.token_logprobs, cu_seqlens), counts, alpha)
    return sums, counts, *empty_for_none(statistics.lse, *statistics)


def _fake_linear_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = call_of(_Forward, arguments)
    hidden, targets = call.problem.hidden, call.problem.targets
    dtype = accumulation_dtype(hidden.dtype)
    num_tokens, num_sequences = hidden.shape[0], call.problem.cu_seqlens.shape[0] - 1

    def per_token() -> Tensor:
        return hidden.new_empty(num_tokens, dtype=dtype)

    return (
        hidden.new_empty(num_sequences, dtype=dtype),
        targets.new_empty(num_sequences),
        *(per_token() for _ in range(4)),
        per_token() if call.entropy_order else hidden.new_empty(0, dtype=dtype),
    )


def _linear_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight and bias; empty where they are not needed."""
    call = call_of(_Backward, arguments)
    problem, alpha, grad_lse = call.problem, call.length_normalization, call.grad_lse
    keep = problem.targets != problem.options.ignore_index
    grad = torch.zeros_like(call.lse)
    if call.grad_sums is not None:
        per_token = call.grad_sums
        if alpha:
            per_token = per_token / call.counts.clamp(min=1).to(grad.dtype) ** alpha
        grad += per_token.repeat_interleave(problem.cu_seqlens.diff(), output_size=len(grad))
    if call.grad_token is not None:
        grad += call.grad_token
    upstream = Upstream(grad.where(keep, 0), None if grad_lse is None else grad_lse.where(keep, 0))
    hidden, weight, bias = call.needs
    with alone_on(problem.hidden):
        grads = get_backend(problem.options.impl, problem.hidden).linear_backward(
            problem,
            call.lse,
            call.tail,
            call.miss,
            upstream,
            (hidden, weight, bias),
            call.skip_inactive,
        )
    return empty_for_none(problem.hidden, *grads)


def _fake_linear_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    call = call_of(_Backward, arguments)
    return tuple(
        torch.empty_like(leaf) if need and leaf is not None else call.problem.hidden.new_empty(0)
        for leaf, need in zip(call.problem.head, call.needs, strict=True)
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
    problem, ctx.length_normalization, ctx.skip_inactive, _ = call_of(_Forward, inputs)
    ctx.save_for_backward(counts, lse, tail, miss, *problem.tensors)
    ctx.options = problem.options
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
    counts, lse, tail, miss, *tensors = ctx.saved_tensors
    call = _Backward(
        grad_sums,
        grad_token,
        grad_lse,
        counts,
        lse,
        tail,
        miss,
        LinearProblem._make([*tensors, ctx.options]),
        ctx.length_normalization,
        ctx.skip_inactive,
        list(needs),
    )
    grads = _linear_backward(*arguments_of(call))
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
