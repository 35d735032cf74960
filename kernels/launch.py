"""Block sizes, warps and stages of launches, and helpers of the launchers.

Every launcher takes a configuration from here unless its caller passes one: `linear_config`,
`rows_config` and `vocab_splits` choose by dtype, shapes and GPU; a `SegmentsConfig` and `COMBINE`
are constants. `python -m plad_fast.kernels.aot` compiles these. With PLAD_FAST_AUTOTUNE=1 the
linear kernels take what `kernels.autotune` measures instead.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

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
    WARP_SPECIALIZE: bool = False
    """Warps of their own load the operands; with TMA on 9.0, by some versions of Triton."""


@dataclass(frozen=True)
class RowsConfig:
    """A row of logits is read BLOCK_V entries at a time."""

    BLOCK_V: int
    num_warps: int
    num_stages: int = 2


@dataclass(frozen=True)
class SegmentsConfig:
    """Values of tokens are read BLOCK_N at a time."""

    BLOCK_N: int = 128
    num_warps: int = 4
    num_stages: int = 2


COMBINE = SegmentsConfig(64, num_warps=2, num_stages=3)
"""Of the kernel that folds the parts of a token's statistics."""


@dataclass(frozen=True)
class Device:
    """What of a GPU the choice of a configuration depends on."""

    capability: tuple[int, int]
    num_sms: int


TOKEN_GROUP = 16
"""Tiles of tokens that take all parts of the vocabulary before the next ones do: with 8 parts they
fill a GPU of 132 multiprocessors, and their hidden states, 1 MiB a tile where D is 4096, take 16 of
the 50 MiB of its L2.
"""

# A stand-in for tensors on the CPU, which the interpreter runs.
_INTERPRETER = Device((9, 0), 2)


@dataclass(frozen=True)
class AotEntry:
    """A kernel with all that a compiler must know, for `plad_fast.kernels.aot`."""

    kernel: Any
    dtype: str  # of the operands: "fp32", "bf16", "fp16"
    tile: LinearConfig | RowsConfig | SegmentsConfig
    constants: Mapping[str, Any]
    types: Mapping[str, str]
    """Of the other arguments: "*bf16", "i32" and so on."""
    aligned: tuple[str, ...]
    """Arguments divisible by 16: pointers, and strides and sizes of the common case."""

    @property
    def flags(self) -> str:
        order = self.constants.get("ENTROPY_ORDER")
        named = [k for k, v in self.constants.items() if v is True]
        return " ".join([*named, f"ENTROPY_{order}"] if order else named)

    @property
    def linear(self) -> bool:
        return isinstance(self.tile, LinearConfig)


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
    dtype: torch.dtype, num_tokens: int, device: Device, *, loads: str, lean: bool
) -> LinearConfig:
    """Of the forward and of the gradient of the logits, which are the same product.

    The largest tile whose accumulators stay in registers and whose pipeline fits shared memory.
    16-bit operands: with TMA on 9.0 and 10.0 128 x 256, else 128 x 128; a bias, a softcap or a
    vocabulary that 16 does not divide needs registers of its own and takes a narrower tile. On 8.6,
    8.9 and 12.0, where a block has 99 KiB of shared memory, steps are shorter. float32 runs on the
    ordinary units, which a tile of 64 x 64 keeps busy. Operands that cannot be read in vectors pass
    through registers, of which a small tile has enough. With few tokens BLOCK_N shrinks to them, as
    far as the instruction allows.

    Args:
        loads: of `load_kind`.
        lean: of `is_lean`.
    """
    rows = max(16, triton.next_power_of_2(num_tokens))
    major, minor = device.capability
    if loads == "scalar":
        width, step = 64, 32
        if dtype == torch.float32:
            width, step = (32, 32) if major == 10 else (32 if rows == 16 else 64, 16)
        return LinearConfig(min(rows, 32), width, step, num_warps=4, num_stages=2)
    if dtype == torch.float32:
        many = rows >= 64
        # What compiles without a spilled register, which no rule foretells.
        width, step, stages = 64, 32, 3
        if major in (8, 12):
            step, stages = (16, 3) if many else (32, 2)
        elif major == 9 and many:
            stages = 2
        elif major == 10 and rows == 16:
            width = 32
        return LinearConfig(min(rows, 64), width, step, 8 if many else 4, stages)
    if major in (9, 10):
        if lean and loads == "tma":
            width = 256 if rows >= 128 else 128
        else:
            width = 128 if major == 9 else 64
        # The instructions of a warp group multiply 64 rows at least.
        many = rows >= 128
        return LinearConfig(128 if many else 64, width, 64, 8 if many else 4, num_stages=4)
    step, stages = (64, 3) if (major, minor) == (8, 0) else (32, 4)
    return LinearConfig(min(rows, 128), 128, step, 8 if rows >= 128 else 4, stages)


def linear_candidates(
    dtype: torch.dtype, num_tokens: int, device: Device, *, loads: str, lean: bool
) -> list[LinearConfig]:
    """For `kernels.autotune`: what `linear_config` returns, then its neighbours in one field each,
    and its loop with specialised warps. Some may not fit the GPU.
    """
    first = linear_config(dtype, num_tokens, device, loads=loads, lean=lean)
    # A tensor descriptor's block has 256 rows at most.
    widths = (v for v in (first.BLOCK_V // 2, first.BLOCK_V * 2) if 32 <= v <= 256)
    stages = (s for s in (first.num_stages - 1, first.num_stages + 1) if s >= 2)
    neighbours = [
        *(replace(first, BLOCK_V=v) for v in widths),
        *(replace(first, num_warps=w) for w in (4, 8)),
        *(replace(first, num_stages=s) for s in stages),
    ]
    wide = first.BLOCK_N == 128 and loads == "tma" and device.capability == (9, 0)
    if wide and specialises_warps():
        neighbours.append(replace(first, num_warps=4, WARP_SPECIALIZE=True))
    return list(dict.fromkeys([first, *neighbours]))


def specialises_warps() -> bool:
    """Whether this Triton compiles the product's loop with specialised warps for 9.0: of those
    tried 3.6.0 does; 3.7.1 and 3.8.0 fail on it.
    """
    return triton.__version__.startswith("3.6.")


def load_kind(device: Device, *matrices: Tensor) -> str:
    """How rows of matrices can be read: "tma", through tensor descriptors, where the GPU has the
    unit and operands of 16 bits lie as it wants them; "vector", 16 bytes at a time; or "scalar".
    """
    # Rows that overlap, or are the same row, are no matrix for a descriptor.
    if any(
        x.stride(1) != 1 or x.stride(0) < x.shape[1] or x.stride(0) == 0 or x.data_ptr() % 16
        for x in matrices
    ):
        return "scalar"
    if device.capability[0] in (9, 10) and all(
        x.element_size() == 2 and x.stride(0) * 2 % 16 == 0 for x in matrices
    ):
        return "tma"
    # Triton sees that 16 divides a stride or size, not that 4 does.
    aligned = all(x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 for x in matrices)
    return "vector" if aligned else "scalar"


class LibraryFrom(NamedTuple):
    """Hidden sizes from which logits go through memory."""

    forward: int
    gradient: int


LIBRARY_FROM: dict[tuple[int, int], LibraryFrom] = {(9, 0): LibraryFrom(2048, 3072)}
"""By compute capability: from where on 16-bit operands are multiplied by the library, to logits in
float32, which a kernel then reads row by row, rather than by our product, which keeps them in
registers. What is measured on a GPU goes here. 9.0 are the H100, H200, GH200 and H20; its sizes are
a count for the H100 SXM, in picoseconds a logit:

    D                            896    1024    2048    3072    4096
    ours, 450 to 560 TFLOP/s     4.0     4.4     7.8    11.2    14.6
    library, 720 TFLOP/s         2.5     2.8     5.7     8.5    11.4
      and the forward            4.5     4.8     7.7    10.5    13.4
      and the gradient           5.2     5.5     8.4    11.2    14.0

Memory takes 3 TB/s, and our rates are predictions of `plad_fast.kernels.aot`. The library's rate
includes 16-bit results: 2 bytes of a logit are written beyond these, 4 are read again, and for the
gradient 2 more are written.
"""


def uses_library(hidden: Tensor, *, gradient: bool) -> bool:
    """Whether logits of these hidden states go through memory; see `LIBRARY_FROM`."""
    least = LIBRARY_FROM.get(device_of(hidden).capability)
    if least is None or hidden.element_size() != 2:
        return False
    return hidden.shape[1] >= (least.gradient if gradient else least.forward)


def is_lean(bias: Tensor | None, softcap: float | None, vocab: int) -> bool:
    """Whether a tile of logits needs few registers beside its accumulators."""
    return bias is None and softcap is None and vocab % 16 == 0


def operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, config: LinearConfig, loads: str
) -> tuple[Any, Any, Tensor]:
    """Hidden, weight and bias as a kernel takes them: of the former two tensors or, for TMA,
    descriptors of their blocks; any tensor in place of no bias.
    """
    bias = hidden if bias is None else bias
    if loads != "tma":
        return hidden, weight, bias
    return (
        TensorDescriptor.from_tensor(hidden, [config.BLOCK_N, config.BLOCK_D]),
        TensorDescriptor.from_tensor(weight, [config.BLOCK_V, config.BLOCK_D]),
        bias,
    )


def head_strides(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """stride_hn, stride_hd, stride_wv, stride_wd, stride_b."""
    return *hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)


def linear_constants(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    config: LinearConfig,
    loads: str,
) -> dict[str, Any]:
    """What kernels on `logits_tile` are compiled for."""
    return {
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "EVEN_D": hidden.shape[1] % config.BLOCK_D == 0,
        "EVEN_V": len(weight) % config.BLOCK_V == 0,
        "USE_TMA": loads == "tma",
        "PRECISION": dot_precision(hidden.dtype),
        "WIDEN": must_widen(hidden.dtype),
        "GROUP": TOKEN_GROUP,
        **asdict(config),
    }


def rows_config(vocab: int) -> RowsConfig:
    """8 kB of float32 at a time: enough loads in flight, and no more than registers hold."""
    block = min(2048, max(128, triton.next_power_of_2(vocab)))
    return RowsConfig(block, num_warps=8 if block >= 2048 else 4)


@functools.lru_cache(maxsize=1024)
def vocab_splits(num_tokens: int, vocab: int, config: LinearConfig, device: Device) -> int:
    """Parts of the vocabulary that run side by side, so that few tokens still fill the GPU.

    At least as many as let a group of tiles of tokens fill it, at most four times that: of those
    the number that ends first, in waves of programs; of equals the fewest.
    """
    token_tiles = triton.cdiv(num_tokens, config.BLOCK_N)
    vocab_tiles = triton.cdiv(vocab, config.BLOCK_V)

    def duration(splits: int) -> int:
        waves = math.ceil(token_tiles * splits / device.num_sms)
        return waves * math.ceil(vocab_tiles / splits)

    fewest = max(1, device.num_sms // min(token_tiles, TOKEN_GROUP))
    return min(range(min(fewest, vocab_tiles), min(4 * fewest, vocab_tiles) + 1), key=duration)


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as `torch.set_float32_matmul_precision` says, or
    `torch.backends.cuda.matmul.fp32_precision`, which makes the former refuse to answer.
    """
    if dtype != torch.float32:
        return "ieee"
    try:
        said = torch.get_float32_matmul_precision()
    except RuntimeError:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[said]


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
