"""The one-pass preference loss, whose gradients are made in the forward, for an upstream of 1.

Eagerly it is an autograd function; in a compiled graph it is a registered op, see
`plad_fast.ops.registration`, whose gradients leave it as outputs. The backward of both scales them.

N tokens, V vocabulary, D hidden, S sequences, B groups of K sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plad_fast.checks import shown
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.registry import available, get_loss
from plad_fast.losses.terms import length_normalized, segment_counts
from plad_fast.ops import validation as check
from plad_fast.ops.autograd import (
    HEAD,
    OPTIONS,
    alone_on,
    call_of,
    empty_for_none,
    is_batched,
)
from plad_fast.ops.backend import Head, HeadGradient, LinearProblem, Needs, get_backend
from plad_fast.ops.impl import onepass
from plad_fast.ops.impl.products import accumulation_dtype
from plad_fast.ops.impl.scaling import scaled_gradient
from plad_fast.ops.registration import first_order_only, register_op


class FusedLoss(NamedTuple):
    """A loss to call `backward()` on, and detached values for metrics."""

    loss: Tensor
    """() with a graph to hidden, weight and bias."""
    sums: Tensor
    """(S,) log-probabilities, divided by count ** length_normalization."""
    counts: Tensor
    """(S,) int64, tokens that counted."""
    group_losses: Tensor
    """(B,) without the regulariser."""
    active: Tensor
    """(B,) bool: the preference loss has a gradient for this group."""


Run = Callable[[Needs], tuple[FusedLoss, HeadGradient]]


def differentiable(head: Head, run: Run) -> FusedLoss:
    """What `run` finds, its loss with a graph to the head; the rest is detached."""
    stubs = tuple(map(_stub, head)) if torch.is_grad_enabled() else ()
    return FusedLoss(*_OnePass.apply(*head, stubs, run, wanted(head)))


def wanted(head: Head) -> Needs:
    """Which gradients autograd will ask for."""
    enabled = torch.is_grad_enabled()
    hidden, weight, bias = (enabled and leaf is not None and leaf.requires_grad for leaf in head)
    return hidden, weight, bias


def _stub(tensor: Tensor | None) -> Tensor | None:
    """Nothing of a tensor but its place in the graph, to be saved where the tensor need not be."""
    if tensor is None or not tensor.requires_grad:
        return None
    return tensor.narrow(0, 0, 0).clone()


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stubs: tuple[Tensor | None, ...],
        run: Run,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        results, grads = run(needs)
        # Saved as tensors, so that they are handed over and freed with the graph.
        ctx.save_for_backward(*grads, *stubs)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> Any:
        return *_scaled(ctx, grad_loss), None, None, None


def _scaled(ctx: Any, grad_loss: Tensor | None) -> list[Tensor | None]:
    """The saved gradients times the upstream one."""
    if grad_loss is None:  # what uses the loss has no gradient for it
        return [None] * 3
    # Reading the scalar would stall a GPU; on the CPU it saves a pass over every gradient.
    # A tracer's tensors, of classes of their own, cannot be read.
    traced = torch.compiler.is_compiling()
    plain = type(grad_loss) is Tensor and not traced
    several = plain and is_batched(grad_loss)
    factor: Tensor | None = grad_loss
    if plain and not several and grad_loss.device.type == "cpu" and grad_loss.item() == 1:
        factor = None
    scaled: list[Tensor | None] = []
    for grad, dtype, need in zip(
        ctx.saved_tensors[:3], ctx.dtypes, ctx.needs_input_grad[:3], strict=True
    ):
        if not need:
            scaled.append(None)
        elif several or traced:  # neither vmap nor a graph has blocks to write to
            scaled.append((grad.to(accumulation_dtype(grad.dtype)) * grad_loss).to(dtype))
        else:
            with alone_on(grad):
                scaled.append(scaled_gradient(grad, factor, dtype))
    return scaled


def linear_preference_loss(
    problem: LinearProblem,
    scores: Tensor | None,  # (S,)
    reference_logps: Tensor | None,  # (S,)
    objective: Objective,
    num_groups: float | Tensor | None,
    num_tokens: float | Tensor | None,
) -> FusedLoss:
    """Loss (), and detached: sums (S,), counts (S,), group losses (B,), active (B,) bool.

    While a graph is traced the loss must be a registered one with numbers as its options.
    """
    constants = scores, reference_logps, _as_tensor(num_groups), _as_tensor(num_tokens)
    if not torch.compiler.is_compiling():
        return differentiable(
            problem.head, lambda needs: _one_pass(problem, *constants, objective, needs)
        )
    name = objective.spec.name
    if name not in available() or get_loss(name).fn is not objective.spec.fn:
        raise UsageError(
            f"in a compiled graph the loss must be a registered one, and {name!r} is a "
            "function of your own: register it, or use preference_loss on "
            "linear_sequence_logprobs"
        )
    names, values = _flattened(objective.options)
    results = _compiled_preference_loss(
        *problem.on_one_device().arguments,
        *constants,
        objective.group_size,
        objective.sft_weight,
        objective.length_normalization,
        list(wanted(problem.head)),
        name,
        names,
        values,
    )
    return FusedLoss(*results[:5])


def _as_tensor(count: float | Tensor | None) -> Tensor | None:
    if count is None or isinstance(count, Tensor):
        return count
    return torch.tensor(count, dtype=torch.float64, device="cpu")


def _one_pass(
    problem: LinearProblem,
    scores: Tensor | None,  # (S,)
    reference_logps: Tensor | None,  # (S,)
    num_groups: Tensor | None,  # ()
    num_tokens: Tensor | None,  # ()
    objective: Objective,
    needs: Needs,
) -> tuple[FusedLoss, HeadGradient]:
    hidden, options = problem.hidden, problem.options
    check.check_sequences(
        problem.targets, problem.cu_seqlens, len(problem.weight), options.ignore_index
    )
    backend = get_backend(options.impl, hidden)
    if hidden.is_cuda and not problem.cu_seqlens.is_cuda and backend.TAKES_IGNORED:
        rows, counted, counts, bounds = None, *_with_ignored(problem)
    else:
        rows, counted, bounds = _keep_counted(problem)
        counts = counted.cu_seqlens.diff()
    denominators = objective.denominators(
        counts.reshape(-1, objective.group_size), num_groups, num_tokens
    )
    with alone_on(hidden):
        loss, sums, group_losses, active, grads = onepass.linear_preference_loss(
            counted,
            scores,
            reference_logps,
            objective,
            denominators,
            needs,
            counts,
            bounds,
            functools.partial(backend.workspace, needs=needs),
        )
    if rows is not None and grads.hidden is not None:
        spread = torch.zeros_like(hidden, dtype=grads.hidden.dtype)
        grads = grads._replace(hidden=spread.index_copy_(0, rows, grads.hidden))
    sums = length_normalized(sums, counts, objective.length_normalization)
    return FusedLoss(loss, sums, counts, group_losses, active), grads


class _Call(NamedTuple):
    """Arguments of the registered op."""

    problem: LinearProblem
    scores: Tensor | None  # (S,)
    reference_logps: Tensor | None  # (S,)
    num_groups: Tensor | None  # ()
    num_tokens: Tensor | None  # ()
    group_size: int
    sft_weight: float
    length_normalization: float
    needs: Sequence[bool]
    loss: str
    option_names: str
    option_values: Sequence[float]

    @property
    def objective(self) -> Objective:
        loss, options = get_loss(self.loss), _nested(self.option_names, self.option_values)
        return Objective(loss, self.group_size, options, self.sft_weight, self.length_normalization)


def _preference_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Loss, sums, counts, group losses, active; and the gradients for an upstream of 1."""
    call = call_of(_Call, arguments)
    of_hidden, of_weight, of_bias = call.needs
    results, grads = _one_pass(
        call.problem,
        call.scores,
        call.reference_logps,
        call.num_groups,
        call.num_tokens,
        call.objective,
        (of_hidden, of_weight, of_bias),
    )
    hidden = call.problem.hidden
    dtype = _gradient_dtype(hidden)
    rounded = (None if grad is None else grad.to(dtype) for grad in grads)
    return *results, *empty_for_none(hidden, *rounded)


def _gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Of the gradients that leave the op."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _fake_preference_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = call_of(_Call, arguments)
    hidden, targets = call.problem.hidden, call.problem.targets
    dtype = accumulation_dtype(hidden.dtype)
    num_sequences = call.problem.cu_seqlens.shape[0] - 1
    num_groups = num_sequences // call.group_size
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(num_sequences, dtype=dtype),
        targets.new_empty(num_sequences),
        hidden.new_empty(num_groups, dtype=dtype),
        hidden.new_empty(num_groups, dtype=torch.bool),
        *(
            torch.empty_like(leaf, dtype=_gradient_dtype(hidden))
            if need and leaf is not None
            else hidden.new_empty(0)
            for leaf, need in zip(call.problem.head, call.needs, strict=True)
        ),
    )


def _save_preference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = call_of(_Call, inputs).problem.head
    ctx.save_for_backward(*output[5:])
    # Otherwise the saved gradients, being outputs, would get zeros of their own size.
    ctx.set_materialize_grads(False)
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])


@first_order_only
def _differentiate_preference(
    ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    return *_scaled(ctx, grad_loss), *(None for _ in ctx.needs_input_grad[3:])


_compiled_preference_loss = register_op(
    f"linear_preference_loss({HEAD}, {OPTIONS}, Tensor? scores, Tensor? reference_logps, "
    "Tensor? num_groups, Tensor? num_tokens, SymInt group_size, float sft_weight, "
    "float length_normalization, bool[] needs, str loss, str option_names, float[] option_values) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _preference_forward,
    fake=_fake_preference_forward,
    backward=_differentiate_preference,
    save=_save_preference,
)


_MARKS = ",.:="  # that set entries, levels, kinds and texts apart
_LARGEST_INT = 2**53  # up to which a float64 holds every one


def _flattened(options: Mapping[str, Any], path: str = "") -> tuple[str, list[float]]:
    """Options as a list of numbers and their names, "beta,top:int,parts.dpo.weight,form=js": what
    an op can take, whose numbers are all of one kind."""
    names, values = [], []
    for name, value in options.items():
        if not isinstance(name, str) or not name or any(mark in name for mark in _MARKS):
            raise UsageError(
                f"in a compiled graph names in the options of a loss must be texts without any of "
                f"{_MARKS!r}, got {name!r}"
            )
        entry = f"{path}{name}"
        if isinstance(value, Mapping):
            inner, numbers = _flattened(value, f"{entry}.")
            names.append(inner or f"{entry}.")  # one that is empty, too, has to come out again
            values += numbers
        elif isinstance(value, str) and "," not in value:
            names.append(f"{entry}={value}")
        elif isinstance(value, bool):
            names.append(f"{entry}:bool")
            values.append(float(value))
        elif isinstance(value, int) and -_LARGEST_INT <= value <= _LARGEST_INT:
            names.append(f"{entry}:int")
            values.append(value)
        elif isinstance(value, float):
            names.append(entry)
            values.append(value)
        else:
            raise UsageError(
                f"in a compiled graph the option {name} of a loss must be a number (a whole one "
                f"within 2**53 of 0) or a name without a comma, got {shown(value)}"
            )
    return ",".join(names), values


_KINDS: dict[str, Callable[[float], float]] = {"": float, "int": int, "bool": bool}


def _nested(names: str, values: Sequence[float]) -> dict[str, Any]:
    """The options that `_flattened` took apart."""
    options: dict[str, Any] = {}
    numbers = iter(values)
    for entry in names.split(",") if names else ():
        path, is_text, text = entry.partition("=")
        path, _, kind = path.partition(":")
        *outer, name = path.split(".")
        place = options
        for part in outer:
            place = place.setdefault(part, {})
        if name:
            place[name] = text if is_text else _KINDS[kind](next(numbers))
    return options


def _keep_counted(problem: LinearProblem) -> tuple[Tensor | None, LinearProblem, list[int]]:
    """Rows that count (None for all), the problem that is left of them, and its cu_seqlens as the
    host knows them. A GPU is waited for, once.
    """
    problem = problem.on_one_device()
    targets = problem.targets
    keep = targets != problem.options.ignore_index
    cu_seqlens = torch.nn.functional.pad(keep.cumsum(0), (1, 0))[problem.cu_seqlens]
    bounds = cu_seqlens.tolist()
    if bounds[-1] == len(targets):
        return None, problem, bounds
    # Not all devices have the former, which does not wait again.
    found = torch.nonzero_static(keep, size=bounds[-1]) if keep.is_cuda else keep.nonzero()
    rows = found.squeeze(1)
    counted = problem._replace(
        hidden=problem.hidden[rows], targets=targets[rows], cu_seqlens=cu_seqlens
    )
    return rows, counted, bounds


def _with_ignored(problem: LinearProblem) -> tuple[LinearProblem, Tensor, list[int]]:
    """The problem with zeros for the hidden states of ignored targets, how many others a sequence
    has (S,), and cu_seqlens as the host knows them. No GPU is waited for.
    """
    bounds = problem.cu_seqlens.tolist()
    problem = problem.on_one_device()
    ignored = problem.targets == problem.options.ignore_index
    # Whatever an ignored token holds, even if it is not finite, adds nothing.
    hidden = problem.hidden.masked_fill(ignored[:, None], 0)
    return problem._replace(hidden=hidden), segment_counts(~ignored, problem.cu_seqlens), bounds
