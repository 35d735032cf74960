"""Device and precision that models run in."""

from __future__ import annotations

import os

import torch

from plad_fast.ops.impl.products import cpu_bfloat16_units, cpu_multiplies_bfloat16


def autocast_dtype(precision: str) -> torch.dtype:
    """bfloat16 where the device multiplies it fast, unless the caller decided."""
    if precision == "float32":
        return torch.float32
    if precision == "bfloat16":
        return torch.bfloat16
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def why_autocast() -> str:
    """What `autocast_dtype("auto")` goes by on this machine, for the user."""
    if torch.cuda.is_available():
        capable = autocast_dtype("auto") == torch.bfloat16
        return f"the GPU has {'' if capable else 'no '}units for bfloat16"
    if units := cpu_bfloat16_units():
        return f"this CPU multiplies bfloat16 by {' and '.join(units)}"
    return "torch finds no units for bfloat16 here (AVX512-BF16 or AMX), and emulating it is slower"


def best_device() -> str:
    """Where this process runs its models; of several on a machine, each has a GPU of its own."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK", "")  # set by torchrun and accelerate launch
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if rank.isdecimal() else "cuda"
