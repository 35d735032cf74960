"""Importing this mends the interpreter of Triton 3.4, which takes entries for bytes.

It wants the strides of a tensor descriptor to be multiples of 16 entries, where the GPU wants
multiples of 16 bytes.
"""

from __future__ import annotations

import importlib.util
from typing import Any


def _validate(self: Any) -> None:
    size = self.base.dtype.element_ty.primitive_bitwidth // 8
    assert self.base.data.item() % 16 == 0, "base must be 16-byte aligned"
    for stride in self.strides[:-1]:
        assert stride.data.item() * size % 16 == 0, "stride must be 16-byte aligned"
    assert self.strides[-1].data.item() == 1, "last dim must be contiguous"


if importlib.util.find_spec("triton"):
    import triton

    if triton.__version__.startswith("3.4."):
        from triton.runtime.interpreter import TensorDescHandle

        TensorDescHandle.validate = _validate
