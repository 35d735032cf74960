"""The Triton backend: kernels that never store all logits, library products for the gradients.

The op is in `two_phase`; the one pass has library products around row kernels. Kernels are imported
where they run: Triton may be missing.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from plad_fast.ops.backend import HeadOptions
from plad_fast.ops.impl.kernel_workspace import KernelWorkspace
from plad_fast.ops.impl.two_phase import linear_backward, linear_forward

__all__ = [
    "linear_backward",
    "linear_forward",
    "preferred",
    "stored_backward",
    "stored_forward",
    "unavailable",
    "workspace",
]

_OLDEST_TRITON = (3, 4)
TAKES_IGNORED = True
workspace = KernelWorkspace


def unavailable(tensor: Tensor) -> str | None:
    """Triton, a GPU it compiles for, and a dtype of at most 32 bits are needed."""
    if reason := _missing():
        return reason
    if tensor.dtype == torch.float64:
        return "the kernels compute in float32; float64 is the torch backend's"
    if tensor.is_cuda and torch.version.hip:
        return "the kernels are not ready for ROCm"
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        if major < 8:
            return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0"
        return None
    if tensor.device.type != "cpu":
        return f"there are no kernels for {tensor.device.type} tensors"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
    return None


def preferred(tensor: Tensor) -> bool:
    """On a GPU; the interpreter only for those who name it."""
    return tensor.is_cuda


@functools.cache
def _missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton is {triton.__version__}; the kernels need {oldest} or newer"
    return None


def stored_forward(
    logits: Tensor, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from plad_fast.kernels.logits_rows import logits_rows_forward

    statistics = logits_rows_forward(
        logits, targets, bias=None, **options.of_logits, entropy_order=0
    )
    return statistics[:4]


def stored_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    tail: Tensor,
    miss: Tensor,
    grad: Tensor,
    options: HeadOptions,
) -> Tensor:
    from plad_fast.kernels.logits_rows import logits_rows_backward

    return logits_rows_backward(
        logits,
        targets,
        lse,
        tail,
        miss,
        grad.contiguous(),
        None,
        bias=None,
        **options.of_logits,
        out=torch.empty_like(logits),
        rows=None,
    )
