"""Backends of the ops: modules with the functions of `Backend`, on the types below.

Backends see checked inputs and know nothing of autograd: `plad_fast.ops.autograd` joins forward and
backward. N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from plad_fast.ops.impl.workspace import Workspace

Denominators = tuple[float | Tensor, float | Tensor]
Head = tuple[Tensor, Tensor, Tensor | None]
"""hidden (N, D), weight (V, D), bias (V,)."""
Needs = tuple[bool, bool, bool]
"""Whether gradients of hidden, weight and bias are wanted."""


class HeadOptions(NamedTuple):
    """What stands between a matrix product and the softmax, and how it is computed.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature
    """

    softcap: float | None = None
    """Gemma 2's `final_logit_softcapping`; None leaves the tanh out."""
    logit_scale: float = 1.0
    temperature: float = 1.0
    ignore_index: int = -100
    impl: str = "auto"
    scratch_bytes: int = 0
    """0 for the device's default."""

    @property
    def slope(self) -> float:
        """dz / d(h W^T + b) where the tanh is not felt."""
        return self.logit_scale / self.temperature

    @property
    def of_logits(self) -> dict[str, Any]:
        """Those that kernels take, by name."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
        }

    def gradient_bound(self, grad: Tensor, grad_lse: Tensor | None) -> Tensor:  # (N,) -> ()
        """What no entry of the gradient of the raw products exceeds, in magnitude.

        Args:
            grad: of the log-probabilities.
            grad_lse: of the lse, or None for 0.
        """
        bound = grad.abs() if grad_lse is None else grad.abs() + grad_lse.abs()
        return bound.max() * abs(self.slope)

    def scratch_on(self, device: torch.device) -> int:
        """Bytes that temporaries may take."""
        return self.scratch_bytes or default_scratch_bytes(device)


class LinearProblem(NamedTuple):
    """Sequences under an LM head."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,) int64, in [0, V) or ignore_index
    cu_seqlens: Tensor  # (S + 1,) int64, on the device of the others or on the CPU
    options: HeadOptions

    @property
    def head(self) -> Head:
        return self.hidden, self.weight, self.bias

    def on_one_device(self) -> LinearProblem:
        return self._replace(cu_seqlens=sent(self.cu_seqlens, self.hidden.device))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the registered ops take them, one by one."""
        return *self[:-1], *self.options

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the options."""
        return self[:-1]


class LinearStatistics(NamedTuple):
    """Results of the forward, float32 (float64 for float64); 0 for ignored tokens."""

    token_logprobs: Tensor  # (N,)
    lse: Tensor  # (N,)
    tail: Tensor  # (N,) what rounding took from lse, or 0 from a backend that has no use for it
    miss: Tensor  # (N,) 1 - p(target)
    entropy: Tensor | None  # (N,)


class HeadGradient(NamedTuple):
    """In the dtypes of what they belong to; None where none was asked for."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


class Upstream(NamedTuple):
    """Gradients of the token outputs, (N,) each, 0 for ignored tokens."""

    logprobs: Tensor
    lse: Tensor | None

    def active(self) -> Tensor:  # (N,) bool
        """Which rows have a gradient at all."""
        active = self.logprobs != 0
        return active if self.lse is None else active | (self.lse != 0)


class Backend(Protocol):
    """A module's functions."""

    TAKES_IGNORED: bool
    """Whether a `workspace` knows ignored targets, which cost as much as others there."""

    def unavailable(self, tensor: Tensor) -> str | None:
        """Why the backend cannot take a tensor of this dtype and device here, or None."""

    def preferred(self, tensor: Tensor) -> bool:
        """Whether impl="auto" should take this backend for a tensor it can take."""

    def linear_forward(self, problem: LinearProblem, entropy_order: int) -> LinearStatistics: ...

    def linear_backward(
        self,
        problem: LinearProblem,
        lse: Tensor,  # (N,)
        tail: Tensor,  # (N,)
        miss: Tensor,  # (N,)
        upstream: Upstream,
        needs: Needs,
        skip_inactive: bool,
    ) -> HeadGradient:
        """skip_inactive: leave rows without a gradient out of the products, for which their number
        must be known; a GPU is waited for.
        """

    def workspace(
        self, head: Head, options: HeadOptions, num_rows: int, *, for_gradient: bool, needs: Needs
    ) -> Workspace:
        """Logits of some rows at a time, for the one pass (`plad_fast.ops.impl.onepass`)."""

    def stored_forward(
        self,
        logits: Tensor,  # (N, V) or (S, T, V), of any strides
        targets: Tensor,  # (N,) or (S, T) int64
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token log-probabilities, lse, tail and miss, of the targets' shape."""

    def stored_backward(
        self,
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        tail: Tensor,
        miss: Tensor,
        grad: Tensor,  # of the targets' shape
        options: HeadOptions,
    ) -> Tensor:
        """The gradient of the logits."""


logger = logging.getLogger("plad_fast")

BACKENDS: dict[str, str] = {
    "triton": "plad_fast.ops.impl.triton_backend",
    "torch": "plad_fast.ops.impl.chunked",
}
"""Name to module, in the order in which "auto" tries them."""

_CPU_SCRATCH_BYTES = 64 * 2**20
_MAX_CUDA_SCRATCH_BYTES = 2**30
_ROWS_OF_A_CHUNK = 4096


def get_backend(impl: str, tensor: Tensor) -> Backend:
    """The backend for a tensor; a UsageError where the named one is unknown or cannot take it.

    "auto" takes the first that is preferred and can, and logs which; as a warning where one that is
    preferred cannot, unless the tensor is float64.
    """
    if impl != "auto":
        if impl not in BACKENDS:
            known = ", ".join(["auto", *BACKENDS])
            raise UsageError(f"unknown impl {impl!r}; this version has: {known}")
        backend = _load(impl)
        if reason := backend.unavailable(tensor):
            raise UsageError(f"impl={impl!r} cannot be used here: {reason}")
        return backend
    why = ""
    for name in BACKENDS:
        backend = _load(name)
        if not backend.preferred(tensor):
            continue
        if reason := backend.unavailable(tensor):
            why += f"; impl={name!r} cannot be used here: {reason}"
            continue
        # float64 is asked for; whatever else keeps a preferred backend away should be known.
        level = logging.WARNING if why and tensor.dtype != torch.float64 else logging.INFO
        _announce(name, tensor.device.type, why, level)
        return backend
    raise AssertionError("the torch backend takes every tensor")


def default_scratch_bytes(device: torch.device) -> int:
    """64 MiB; on CUDA a 64th of the device's memory if that is more, at most 1 GiB.

    Not of the memory that is free: the size of chunks decides the order of sums, and what is free
    differs from call to call.
    """
    if device.type != "cuda":
        return _CPU_SCRATCH_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(_CPU_SCRATCH_BYTES, min(total // 64, _MAX_CUDA_SCRATCH_BYTES))


def one_pass_scratch_bytes(device: torch.device, vocab: int, width: int) -> int:
    """For the one-pass loss in kernels: room for 4,096 tokens, more under a wide head, and 1 GiB at
    least, as far as it is a 16th of the device's memory; on the CPU `default_scratch_bytes`.

    Each chunk reads and writes the gradient of the weight, 4 V D bytes, beside its own logits.
    """
    if device.type != "cuda":
        return default_scratch_bytes(device)
    total = torch.cuda.get_device_properties(device).total_memory
    wanted = max(_MAX_CUDA_SCRATCH_BYTES, 5 * vocab * max(width, _ROWS_OF_A_CHUNK))
    return max(_CPU_SCRATCH_BYTES, min(total // 16, wanted))


def sent(values: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU is not waited for."""
    if device.type != "cuda" or values.is_cuda or torch.compiler.is_compiling():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@functools.cache
def _load(name: str) -> Backend:
    return cast(Backend, cast(Any, importlib.import_module(BACKENDS[name])))


@functools.cache
def _announce(name: str, device_type: str, why: str, level: int) -> None:
    """Once for each device and reason."""
    logger.log(level, "impl='auto' on %s: using the %s backend%s", device_type, name, why)
