"""The ops have first derivatives in reverse mode, and no others: asking for more is an error.

Without these checks it would not be one. A backward that torch does not see into gives gradients
without a graph of their own, so a penalty on a gradient would lose its second derivative without a
word; forward mode and `torch.func.jvp` would find a tangent of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from plad_fast.errors import UsageError

Backward = Callable[..., tuple[Tensor | None, ...]]

_NO_SECOND = (
    "the op has no second derivative, and a gradient of its gradient was asked for; leave "
    "create_graph=True out, or build that term on plain logits (plad_fast.ops.reference)"
)


def first_order_only(backward: Backward) -> Backward:
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


def stub(tensor: Tensor | None) -> Tensor | None:
    """Nothing of a tensor but its place in the graph, to be saved where the tensor need not be."""
    if tensor is None or not tensor.requires_grad:
        return None
    return tensor.narrow(0, 0, 0).clone()


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise a UsageError inside of `torch.func` transforms, or for tensors with a tangent."""
    if torch.compiler.is_compiling():
        return
    if _transforms_are_active():
        raise UsageError(
            "the op does not work inside of torch.func transforms (grad, vmap, jvp, ...); call it "
            "outside, and take gradients with torch.autograd or backward()"
        )
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise UsageError(
                "the op has no forward-mode derivative; take gradients with torch.autograd or "
                "backward()"
            )


def is_batched(tensor: Tensor | None) -> bool:
    """Whether a gradient stands for several, as under `torch.autograd.grad(is_grads_batched=True)`.

    By torch's own answer, which is no part of its public interface; no where it gives none.
    """
    names = ("is_batchedtensor", "is_legacy_batchedtensor")  # autograd.grad's are the latter
    asked = (getattr(torch._C._functorch, name, None) for name in names)
    return tensor is not None and any(ask is not None and ask(tensor) for ask in asked)


def refuse_batched(*upstream: Tensor | None) -> None:
    """Raise a UsageError for upstream gradients that stand for several."""
    if not torch.compiler.is_compiling() and any(map(is_batched, upstream)):
        raise UsageError(
            "the vocabulary-parallel op does not work under is_grads_batched=True (nor under a "
            "vectorised jacobian); call torch.autograd.grad once for each gradient"
        )


def _transforms_are_active() -> bool:
    """torch's own answer, which is no part of its public interface; no where it gives none."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return ask is not None and bool(ask())


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise UsageError(_NO_SECOND)
