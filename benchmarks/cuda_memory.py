"""The memory of a GPU that is not there: how much of it lives, and the values of what is small.

Tensors of the device are meta tensors. A storage of at most `KNOWN_BYTES` has its values on the
CPU, so that views share them; a larger one has none.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

KNOWN_BYTES = 2**22

REAL = {name: getattr(torch._C.TensorBase, name) for name in ("device", "is_cuda", "is_meta")}
"""Properties of tensors as torch has them, whatever `counting` makes of them."""


def on_device(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and REAL["is_meta"].__get__(tensor)


@dataclass
class _Storage:
    shape: tuple[int, ...]
    """Of the tensor that it was made for."""
    values: torch.UntypedStorage | None = None


class DeviceMemory:
    def __init__(self) -> None:
        self.live = self.peak = 0
        """Bytes of the storages that exist, and the most there were."""
        self.as_meta = False
        """Whether tensors say that they are meta tensors, as torch wants them for their shapes."""
        self._storages: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @contextlib.contextmanager
    def shapes_only(self) -> Iterator[None]:
        """Operations of torch on meta tensors, which nobody counts."""
        before, self.as_meta = self.as_meta, True
        try:
            with torch._C._DisableTorchDispatch():
                yield
        finally:
            self.as_meta = before

    def register(self, tensor: Tensor) -> Tensor:
        """A new tensor takes its place."""
        storage = tensor.untyped_storage()
        if storage not in self._storages:
            size = storage.nbytes()
            self._storages[storage] = _Storage(tuple(tensor.shape))
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)
        return tensor

    def _free(self, size: int) -> None:
        self.live -= size

    def made_for(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape of the tensor that this one is a view of, or its own."""
        storage = self._storages.get(tensor.untyped_storage())
        return None if storage is None else storage.shape

    def place(self, values: Tensor) -> Tensor:
        """A new tensor with these values."""
        with self.shapes_only():
            tensor = torch.empty_like(values, device="meta")
        self.register(tensor)
        self.write(tensor, values)
        return tensor

    def is_small(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() <= KNOWN_BYTES

    def clear(self, tensor: Tensor) -> None:
        """Its storage holds zeros."""
        if self.is_small(tensor):
            size = tensor.untyped_storage().nbytes()
            values = torch.zeros(size, dtype=torch.uint8).untyped_storage()
            self._storages[tensor.untyped_storage()].values = values

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Of a storage of which nothing was known, what is not written is 0."""
        if self._storages[tensor.untyped_storage()].values is None:
            self.clear(tensor)
        known = self.known(tensor)
        if known is not None:
            with torch._C._DisableTorchDispatch():
                known.copy_(values.detach().reshape(known.shape))

    def forget(self, tensor: Tensor) -> None:
        """Something unknown was written to it."""
        if on_device(tensor):
            self._storages[tensor.untyped_storage()].values = None

    def known(self, tensor: Any) -> Tensor | None:
        """The values of a tensor of the device, to be read or written; one of the host is its own.
        None for anything else.
        """
        if not on_device(tensor):
            return tensor if isinstance(tensor, Tensor) else None
        storage = self._storages.get(tensor.untyped_storage())
        if storage is None or storage.values is None:
            return None
        with torch._C._DisableTorchDispatch():
            view = torch.empty(0, dtype=tensor.dtype)
            return view.set_(storage.values, tensor.storage_offset(), tensor.shape, tensor.stride())
