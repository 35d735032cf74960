"""The GPU's product of 16-bit operands that hands out its float32 accumulators, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plad_fast.ops.impl import products


def install(monkeypatch: pytest.MonkeyPatch, *, adds_to_wide: bool = True) -> None:
    """`torch.mm` and `torch.addmm` take `out_dtype`.

    Args:
        adds_to_wide: whether what a product is added to may be wide too, as from torch 2.10 on.
    """
    real = {name: getattr(torch, name) for name in ("mm", "addmm")}

    def wide(name: str) -> Any:
        def product(*operands: Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> Any:
            if out_dtype is None:
                return real[name](*operands, **options)
            *added, first, second = operands
            allowed = {first.dtype, out_dtype} if adds_to_wide else {first.dtype}
            assert first.dtype == second.dtype
            assert {x.dtype for x in added} <= allowed
            return real[name](*(x.to(out_dtype) for x in operands), **options)

        return product

    for name in real:
        monkeypatch.setattr(torch, name, wide(name))
    monkeypatch.setattr(products, "_ADDS_TO_WIDE", adds_to_wide)
