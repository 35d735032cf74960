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
from triton.tools.tensor_descriptor import TensorDescriptor


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


# One of every size that `linear_config` tells apart.
_TOKENS = (1, 17, 33, 65, 129)

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


def linear_config(
    dtype: torch.dtype, num_tokens: int, device: Device, *, lean: bool, tma: bool
) -> LinearConfig:
    """Of the forward and of the gradient of the logits, which are the same product.

    The largest tile whose accumulators stay in registers and whose pipeline fits shared memory.
    16-bit operands: with TMA on 9.0 and 10.0 128 x 256, else 128 x 128; a bias or softcap needs
    registers of its own and takes a narrower tile. On 8.6, 8.9 and 12.0, where a block has 99 KiB
    of shared memory, steps are shorter. float32 runs on the ordinary units, which a tile of
    64 x 64 keeps busy. With few tokens BLOCK_N shrinks to them, as far as the instruction allows.

    Args:
        lean: neither bias nor softcap.
        tma: operands come through tensor descriptors; see `use_tma`.
    """
    rows = max(16, triton.next_power_of_2(num_tokens))
    if dtype == torch.float32:
        return LinearConfig(min(rows, 64), 64, 32, num_warps=8 if rows >= 64 else 4, num_stages=3)
    major, minor = device.capability
    if major == 9:
        width = 256 if lean and tma and rows >= 128 else 128
        return _hopper_tile(rows, width)
    if major == 10:
        if lean and tma:
            return _hopper_tile(rows, 256 if rows >= 128 else 128)
        return _hopper_tile(rows, 64)
    step, stages = (64, 3) if (major, minor) == (8, 0) else (32, 4)
    return LinearConfig(min(rows, 128), 128, step, 8 if rows >= 128 else 4, stages)


def _hopper_tile(rows: int, width: int) -> LinearConfig:
    # The instructions of a warp group multiply 64 rows at least.
    return LinearConfig(
        128 if rows >= 128 else 64, width, 64, num_warps=8 if rows >= 128 else 4, num_stages=4
    )


def use_tma(device: Device, *operands: Tensor) -> bool:
    """Whether matrices can be read through tensor descriptors: 16 bits, rows contiguous, every
    row aligned to 16 bytes, on a GPU that has the unit.
    """
    return device.capability[0] in (9, 10) and all(
        x.element_size() == 2
        and x.stride(1) == 1
        and x.stride(0) * 2 % 16 == 0
        and x.stride(0) > 0
        and x.data_ptr() % 16 == 0
        for x in operands
    )


def operands(hidden: Tensor, weight: Tensor, config: LinearConfig, tma: bool) -> tuple[Any, Any]:
    """Hidden and weight as a kernel takes them: tensor descriptors of their blocks, or tensors."""
    if not tma:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [config.BLOCK_N, config.BLOCK_D]),
        TensorDescriptor.from_tensor(weight, [config.BLOCK_V, config.BLOCK_D]),
    )


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
) -> Iterator[tuple[torch.dtype, bool, bool, LinearConfig]]:
    """Everything `linear_config` can return for a GPU, with what it was asked for: dtype, lean
    and tma.
    """
    device = Device(capability, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tma in (False, True) if capability[0] in (9, 10) and dtype.itemsize == 2 else (False,):
            for lean in (False, True):
                tiles = (linear_config(dtype, n, device, lean=lean, tma=tma) for n in _TOKENS)
                yield from ((dtype, lean, tma, tile) for tile in dict.fromkeys(tiles))
