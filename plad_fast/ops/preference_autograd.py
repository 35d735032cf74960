"""The one-pass preference loss as an op registered with `torch.library`; see `ops.autograd`.

Its gradients are made in the forward, for an upstream of 1, and leave the op as outputs; the
backward scales them.

N tokens, V vocabulary, D hidden, S sequences, B groups of K sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.registry import available, get_loss
from plad_fast.losses.terms import length_normalized
from plad_fast.ops import validation as check
from plad_fast.ops.autograd import WAITING, alone_on
from plad_fast.ops.backend import LinearProblem, default_scratch_bytes, get_backend
from plad_fast.ops.first_order import first_order_only, is_batched, stub
from plad_fast.ops.impl.products import accumulation_dtype
from plad_fast.ops.impl.workspace import scaled_gradient
from plad_fast.ops.logit_spec import LogitSpec

# Schemas are read off these signatures, which must spell Optional out for older versions of torch.
# ruff: noqa: UP045

_OBJECTIVES: dict[str, Objective] = {}
"""Objectives of calls in progress, by a name for the op, whose arguments cannot be functions."""

_STUBS: dict[str, tuple[Tensor | None, ...]] = {}
"""By the same names, the inputs' places in the graph, which are not to be had inside of the op."""


def linear_preference_loss(
    problem: LinearProblem,
    scores: Tensor | None,  # (S,)
    reference_logps: Tensor | None,  # (S,)
    objective: Objective,
    num_groups: float | Tensor | None,
    num_tokens: float | Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), and detached: sums (S,), counts (S,), group losses (B,), active (B,) bool.

    While a graph is traced the loss must be a registered one with numbers as its options.
    """
    hidden, weight, bias, targets, cu_seqlens, spec, ignore_index, scratch_bytes = problem
    enabled = torch.is_grad_enabled()
    arguments = (
        hidden,
        weight,
        bias,
        targets,
        cu_seqlens,
        scores,
        reference_logps,
        _as_tensor("num_groups", num_groups),
        _as_tensor("num_tokens", num_tokens),
        objective.group_size,
        objective.sft_weight,
        objective.length_normalization,
        spec.softcap,
        spec.logit_scale,
        spec.temperature,
        ignore_index,
        impl,
        scratch_bytes,
        enabled and hidden.requires_grad,
        enabled and weight.requires_grad,
        enabled and bias is not None and bias.requires_grad,
    )
    if torch.compiler.is_compiling():
        name = objective.spec.name
        if name not in available() or get_loss(name).fn is not objective.spec.fn:
            raise UsageError(
                f"in a compiled graph the loss must be a registered one, and {name!r} is a "
                "function of your own: register it, or use preference_loss on "
                "linear_sequence_logprobs"
            )
        names, values = _flattened(objective.options)
        return _linear_preference_loss(*arguments, name, names, values)[:5]
    name = f"objective {id(objective)}"
    _OBJECTIVES[name] = objective
    _STUBS[name] = tuple(stub(leaf) for leaf in (hidden, weight, bias)) if enabled else ()
    try:
        return _linear_preference_loss(*arguments, name, "", [])[:5]
    finally:
        del _OBJECTIVES[name], _STUBS[name]


def _objective(
    name: str, group_size: int, sft_weight: float, alpha: float, names: str, values: Sequence[float]
) -> Objective:
    """The objective of a call in progress; in a compiled graph a registered loss with options."""
    if name in _OBJECTIVES:
        return _OBJECTIVES[name]
    return Objective(get_loss(name), group_size, _nested(names, values), sft_weight, alpha)


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
        if isinstance(value, Mapping):
            inner_names, inner_values = _flattened(value, f"{path}{name}.")
            # One that is empty, too, has to come out of this again.
            names.append(inner_names or f"{path}{name}.")
            values += inner_values
        elif isinstance(value, str):
            if "," in value:
                raise UsageError(
                    f"in a compiled graph the option {name} of a loss must not hold a comma, got "
                    f"{value!r}"
                )
            names.append(f"{path}{name}={value}")
        elif isinstance(value, bool):
            names.append(f"{path}{name}:bool")
            values.append(float(value))
        elif isinstance(value, int):
            if not -_LARGEST_INT <= value <= _LARGEST_INT:
                raise UsageError(
                    f"in a compiled graph the option {name} of a loss must lie within 2**53 of 0 "
                    f"where it is a whole number, got {value}"
                )
            names.append(f"{path}{name}:int")
            values.append(value)
        elif isinstance(value, float):
            names.append(f"{path}{name}")
            values.append(value)
        else:
            raise UsageError(
                f"in a compiled graph the option {name} of a loss must be a number or a name, not "
                f"a {type(value).__name__}"
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


def _as_tensor(name: str, count: float | Tensor | None) -> Tensor | None:
    if count is None or isinstance(count, Tensor):
        return count
    if not count >= 0:
        raise UsageError(f"{name} must not be negative, got {count}")
    return torch.tensor(count, dtype=torch.float64)


@torch.library.custom_op("plad_fast::linear_preference_loss", mutates_args=(), tags=WAITING)
def _linear_preference_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Optional[Tensor],  # (V,)
    targets: Tensor,  # (N,) int64
    cu_seqlens: Tensor,  # (S + 1,) int64
    scores: Optional[Tensor],  # (S,)
    reference_logps: Optional[Tensor],  # (S,)
    num_groups: Optional[Tensor],  # ()
    num_tokens: Optional[Tensor],  # ()
    group_size: int,
    sft_weight: float,
    length_normalization: float,
    softcap: Optional[float],
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    impl: str,
    scratch_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    loss: str,
    option_names: str,
    option_values: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums, counts, group losses, active; and the gradients for an upstream of 1."""
    check.check_sequences(targets, cu_seqlens, len(weight), ignore_index)
    objective = _objective(
        loss, group_size, sft_weight, length_normalization, option_names, option_values
    )
    rows, targets, cu_seqlens = _keep_counted(targets, cu_seqlens, ignore_index)
    counts = cu_seqlens.diff()
    problem = LinearProblem(
        hidden if rows is None else hidden[rows],
        weight,
        bias,
        targets,
        cu_seqlens,
        LogitSpec(softcap, logit_scale, temperature),
        ignore_index,
        scratch_bytes or default_scratch_bytes(hidden.device),
    )
    denominators = objective.denominators(counts.reshape(-1, group_size), num_groups, num_tokens)
    needs = (need_hidden, need_weight, need_bias)
    with alone_on(hidden):
        value, sums, group_losses, active, grads = get_backend(impl, hidden).linear_preference_loss(
            problem, scores, reference_logps, objective, denominators, needs
        )
    if rows is not None and grads.hidden is not None:
        spread = torch.zeros_like(hidden, dtype=grads.hidden.dtype)
        grads = grads._replace(hidden=spread.index_copy_(0, rows, grads.hidden))
    sums = length_normalized(sums, counts, length_normalization)
    first, second, third = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return value, sums, counts, group_losses, active, first, second, third


@_linear_preference_loss.register_fake
def _(hidden, weight, bias, targets, cu_seqlens, *options):
    dtype = accumulation_dtype(hidden.dtype)
    num_sequences = cu_seqlens.shape[0] - 1
    num_groups = num_sequences // options[4]
    grad_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(num_sequences, dtype=dtype),
        targets.new_empty(num_sequences),
        hidden.new_empty(num_groups, dtype=dtype),
        hidden.new_empty(num_groups, dtype=torch.bool),
        *(
            torch.empty_like(leaf, dtype=grad_dtype) if need else hidden.new_empty(0)
            for leaf, need in zip((hidden, weight, bias), options[13:16], strict=True)
        ),
    )


def _save_preference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *_ = inputs
    # Saved as tensors, so that they are handed over and freed with the graph.
    ctx.save_for_backward(*output[5:], *_STUBS.get(inputs[-3], ()))
    # Otherwise the saved gradients, being outputs, would get zeros of their own size.
    ctx.set_materialize_grads(False)
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])


@first_order_only
def _differentiate_preference(
    ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None:  # what uses the loss has no gradient for it
        return (None,) * 24
    # Reading the scalar would stall a GPU; on the CPU it saves a pass over every gradient.
    # A tracer's tensors, of classes of their own, cannot be read.
    plain = type(grad_loss) is Tensor and not torch.compiler.is_compiling()
    if plain and is_batched(grad_loss):
        return *_scaled_by_several(ctx, grad_loss), *[None] * 21
    eager = plain and grad_loss.device.type == "cpu"
    factor = None if eager and grad_loss.item() == 1 else grad_loss
    scaled = (
        scaled_gradient(grad, factor, dtype) if need else None
        for grad, dtype, need in zip(
            ctx.saved_tensors[:3], ctx.dtypes, ctx.needs_input_grad[:3], strict=True
        )
    )
    return *scaled, *[None] * 21


def _scaled_by_several(ctx: Any, grad_loss: Tensor) -> Iterator[Tensor | None]:
    """The gradients for each one of several upstream ones: vmap knows no blocks to write to."""
    for grad, dtype, need in zip(
        ctx.saved_tensors[:3], ctx.dtypes, ctx.needs_input_grad[:3], strict=True
    ):
        wide = grad.to(accumulation_dtype(grad.dtype))
        yield (wide * grad_loss).to(dtype) if need else None


_linear_preference_loss.register_autograd(_differentiate_preference, setup_context=_save_preference)


def _keep_counted(
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    ignore_index: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Rows that count (None for all), their targets, and cu_seqlens of what is left."""
    keep = targets != ignore_index
    if keep.all():
        return None, targets, cu_seqlens
    kept_before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    rows = keep.nonzero().squeeze(1)
    return rows, targets[rows], kept_before[cu_seqlens]
