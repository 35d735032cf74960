"""Registration of the ops with `torch.library`, at no cost for eager code.

Registered ops are opaque to `torch.compile`: a compiled loss calls them without a graph break.

Derivatives are first ones, and asking for more is an error. A backward that torch does not see into
gives gradients without a graph of their own: a penalty on one would lose its second derivative
without a word, and forward mode would find a tangent of 0.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from plad_fast.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

WAITING = (torch.Tag.cudagraph_unsafe,)
"""Tags of ops that may wait for the device, as no captured CUDA graph can: Inductor leaves them out
of its graphs (`torch.compile(mode="reduce-overhead")`)."""

_NO_SECOND = (
    "the op has no second derivative, and a gradient of its gradient was asked for; leave "
    "create_graph=True out, or build that term on plain logits (plad_fast.ops.reference)"
)


def first_order_only(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """For a backward made of kernels: under `create_graph=True` its results have a graph to the
    saved tensors that want a gradient, and a UsageError is raised when it is walked.

    torch's `once_differentiable` does so only where the upstream gradient has a graph itself.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grads
        leaves = [t for t in ctx.saved_tensors if t is not None and t.requires_grad]
        if not leaves:
            # A compiled graph that autograd runs through (backend="eager") saved none of them.
            raise UsageError(_NO_SECOND)
        return tuple(grad if grad is None else _End.apply(grad, *leaves) for grad in grads)

    return once


def _refuse_second(ctx: Any, *_: Tensor) -> Any:
    raise UsageError(_NO_SECOND)


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        return grad.view_as(grad)

    backward = staticmethod(_refuse_second)


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """The function, never compiled: `torch.compiler.disable` loads torch._dynamo, this does not."""
    disabled = torch._disable_dynamo(function)  # loads it when called

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (disabled if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return call


_LIBRARY = torch.library.Library("plad_fast", "FRAGMENT")


def register_op(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] = _refuse_second,
    save: Callable[..., None] | None = None,
    tags: Sequence[torch.Tag] = WAITING,
) -> torch._ops.OpOverload:
    """The op `torch.ops.plad_fast.<name>`, made known to autograd and `torch.compile`.

    By hand, as `torch.library.custom_op` imports torch._dynamo at the first eager call: more than
    a second, and 90 MB.

    Args:
        schema: starts with the op's name. The op writes to none of its inputs, and none of its
            outputs is a view of one.
        fake: gives the outputs' shapes, strides and dtypes for tensors without values.
        backward, save: as `torch.library.register_autograd` wants them.
    """
    name, _, _ = schema.partition("(")
    qualified = f"{_LIBRARY.ns}::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, opaque(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=save, lib=_LIBRARY)
    op: torch._ops.OpOverload = getattr(torch.ops.plad_fast, name).default
    return op
