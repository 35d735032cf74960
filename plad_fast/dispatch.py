"""Which backend computes an op; see `plad_fast.backend` for what a backend is.

`impl="auto"` takes the first backend of `BACKENDS` that can and wants to; a backend named by the
caller is used or refused, never replaced.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, cast

import torch
from torch import Tensor

from plad_fast.backend import Backend
from plad_fast.errors import UsageError

logger = logging.getLogger("plad_fast")

BACKENDS: dict[str, str] = {
    "triton": "plad_fast.triton_backend",
    "torch": "plad_fast.chunked",
}
"""Name to module, in the order in which "auto" tries them."""

_CPU_SCRATCH_BYTES = 64 * 2**20
_MAX_CUDA_SCRATCH_BYTES = 2**30


def get_backend(impl: str, tensor: Tensor) -> Backend:
    """The backend for a tensor.

    Raises:
        UsageError: unknown name, or the named backend cannot take this tensor here.
    """
    if impl != "auto":
        if impl not in BACKENDS:
            known = ", ".join(["auto", *BACKENDS])
            raise UsageError(f"unknown impl {impl!r}; this version has: {known}")
        backend = _load(impl)
        if reason := backend.unavailable(tensor):
            raise UsageError(f"impl={impl!r} cannot be used here: {reason}")
        return backend
    for name in BACKENDS:
        backend = _load(name)
        if backend.preferred(tensor) and backend.unavailable(tensor) is None:
            _announce(name, tensor.device.type)
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


@functools.cache
def _load(name: str) -> Backend:
    return cast(Backend, cast(Any, importlib.import_module(BACKENDS[name])))


@functools.cache
def _announce(name: str, device_type: str) -> None:
    logger.info("impl='auto' on %s: using the %s backend", device_type, name)
