"""How kernels are launched: block sizes, warps and stages, chosen here and nowhere else.

Configurations are frozen. They follow from dtype, shapes and compute capability by the two
functions below; `python -m plad_fast.kernels.aot` compiles everything these can return.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class LinearConfig:
    """Tile of a product hidden (N, D) x weight (V, D)^T: BLOCK_N x BLOCK_V, in steps of BLOCK_D."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowsConfig:
    """A row of logits is read BLOCK_V entries at a time."""

    BLOCK_V: int
    num_warps: int
    num_stages: int = 2


@dataclass(frozen=True)
class SegmentsConfig:
    """A sequence is read BLOCK_N tokens at a time."""

    BLOCK_N: int = 128
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Device:
    """What of a GPU the choice of a configuration depends on."""

    capability: tuple[int, int]
    num_sms: int


# A stand-in for tensors on the CPU, which the interpreter runs.
_INTERPRETER = Device((9, 0), 2)


@dataclass(frozen=True)
class AotEntry:
    """A kernel with everything that a compiler must know, for `plad_fast.kernels.aot`."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Types of the arguments that are not constants; pointers and integers named in `aligned`
    are divisible by 16."""
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int
    kind: str
    """linear, combine, rows or segments."""
    dtype: str
    tile: Mapping[str, int] = field(default_factory=dict)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_of(tensor: Tensor) -> Device:
    return _cuda_device(tensor.device.index or 0) if tensor.is_cuda else _INTERPRETER


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def linear_config(dtype: torch.dtype, num_tokens: int, device: Device) -> LinearConfig:
    """Of the forward and of the gradient of the logits, which are the same product.

    16-bit operands: the largest tile whose accumulators and pipeline fit: 128 x 256 with four
    stages where a block has 227 KiB (9.0, 10.0), 128 x 128 with three where it has 163 (8.0) and
    narrower steps where it has 99 (8.6, 8.9, 12.0). float32 runs on the ordinary units, which a
    tile of 64 x 64 keeps busy. With few tokens BLOCK_N shrinks to them, 16 at least.
    """
    rows = max(16, triton.next_power_of_2(num_tokens))
    if dtype == torch.float32:
        return LinearConfig(min(rows, 64), 64, 32, num_warps=4, num_stages=3)
    if device.capability[0] in (9, 10):
        if rows >= 128:
            return LinearConfig(128, 256, 64, num_warps=8, num_stages=4)
        return LinearConfig(max(rows, 64), 256, 64, num_warps=4, num_stages=4)
    if device.capability == (8, 0):
        return LinearConfig(
            min(rows, 128), 128, 64, num_warps=8 if rows >= 128 else 4, num_stages=3
        )
    return LinearConfig(min(rows, 128), 128, 32, num_warps=8 if rows >= 128 else 4, num_stages=4)


def rows_config(vocab: int) -> RowsConfig:
    """16 kB of float32 at a time: enough loads in flight for a row of any length."""
    block = min(4096, max(128, triton.next_power_of_2(vocab)))
    return RowsConfig(block, num_warps=8 if block >= 2048 else 4)


def vocab_splits(num_tokens: int, vocab: int, config: LinearConfig, device: Device) -> int:
    """Parts of the vocabulary that run side by side, so that few tokens still fill the GPU.

    Among one to four waves of programs the one that ends first; of equals the fewest parts.
    """
    token_tiles = triton.cdiv(num_tokens, config.BLOCK_N)
    vocab_tiles = triton.cdiv(vocab, config.BLOCK_V)

    def duration(splits: int) -> int:
        waves = math.ceil(token_tiles * splits / device.num_sms)
        return waves * math.ceil(vocab_tiles / splits)

    candidates = {1}
    for waves in range(1, 5):
        candidates.add(min(vocab_tiles, max(1, waves * device.num_sms // token_tiles)))
    return min(sorted(candidates), key=duration)


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as `torch.set_float32_matmul_precision` says."""
    if dtype != torch.float32:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[
        torch.get_float32_matmul_precision()
    ]


def must_widen(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bit patterns of bfloat16 operands. A product of two is
    exact in float32, so that widening them first gives what a GPU computes.
    """
    return interpreted() and dtype == torch.bfloat16


def logit_scales(
    softcap: float | None, logit_scale: float, temperature: float
) -> tuple[float, float]:
    """(cap_scale, z_scale) of `primitives.capped_logits`."""
    if softcap is None:
        return 0.0, logit_scale / temperature
    return logit_scale / softcap, softcap / temperature


def shipped_linear_configs(
    capability: tuple[int, int],
) -> Iterator[tuple[torch.dtype, LinearConfig]]:
    """Everything `linear_config` can return for a GPU."""
    device = Device(capability, 1)
    seen = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for num_tokens in (1, 17, 33, 65, 129):
            config = linear_config(dtype, num_tokens, device)
            if (dtype, config) not in seen:
                seen.add((dtype, config))
                yield dtype, config
