"""Wrappers of DDP, FSDP and DeepSpeed: the model inside, and calls that go through them.

They gather weights and prepare gradients in hooks around a module's forward: work done outside of
it meets sharded weights, or leaves gradients unreduced.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_map, tree_structure

Result = TypeVar("Result")


def call_inside(
    wrapper: nn.Module, module: nn.Module, fn: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    """Calls `fn` as if it were the forward of `module`, through `wrapper`.

    Forward hooks of `module` run too.

    Args:
        wrapper: DDP, FSDP or a DeepSpeed engine around `module`, or `module` itself.
        module: the model inside (see `unwrap`), or any module of a model.
        fn: what to run. Its result passes through the wrapper, whose hooks may act on it; what it
            would only round (`output_dtype` of FSDP2) stays as it is.
        *args: what wrappers look at. FSDP2 rounds those of floating point to its `param_dtype`.
    """
    made: list[Result] = []

    def forward(*args: Any, **kwargs: Any) -> Result:
        made.append(fn(*args, **kwargs))
        return made[-1]

    with replaced_forward(module, forward):
        shown = wrapper(*args, **kwargs)
    return _unrounded(shown, made[-1])


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of the module's own, or of another that was put there."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def unwrap(wrapper: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP or a DeepSpeed engine; a bare model is returned as it is."""
    while isinstance(inner := getattr(wrapper, "module", None), nn.Module):
        wrapper = inner
    return wrapper


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The parameters are whole, where ZeRO-3 partitioned them as the model was loaded.

    For all processes together; outside of any forward, where nothing else gathers them.
    """
    parameters = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    deepspeed: Any = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(parameters):
        yield


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before FSDP2, which derives one of its own from it in place."""
    kind = type(module)
    is_made = kind.__bases__[0].__name__ == "FSDPModule"
    return kind.__bases__[-1] if is_made else kind


def _unrounded(shown: Any, made: Any) -> Any:
    """`shown`, with the tensors of `made` where the two differ in dtype."""
    if tree_structure(shown) != tree_structure(made):  # a hook made something else of it
        return shown
    return tree_map(_keep, shown, made)


def _keep(shown: Any, exact: Any) -> Any:
    if not isinstance(exact, Tensor) or shown.dtype == exact.dtype:
        return shown
    return _Unrounded.apply(exact, shown) if shown.requires_grad else exact


class _Unrounded(Function):
    """The first tensor. The second stays in the graph for the sake of the hooks on it.

    Its gradient is zero, and what made the first waits for it in a backward: hooks run before.
    """

    @staticmethod
    def forward(ctx: Any, exact: Tensor, shown: Tensor) -> Tensor:
        ctx.shown = shown.shape, shown.dtype
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.shown
        return grad, grad.new_zeros(shape, dtype=dtype)
