"""Resources of a compiled kernel: registers, spills, shared memory, blocks per SM.

From the log of `ptxas -v` and from the SASS; the tools come with Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from plad_fast.kernels.aot.sass import Code, analyse, parse_sass

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """Limits of a streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities),
    and, for predictions, rates of one product: data sheets, dense, without sparsity.
    """

    arch: int
    name: str
    sms: int
    clock_ghz: float  # boost, at which tensor_tflops are reached
    tensor_tflops: float  # 16-bit operands, float32 accumulation
    hbm_tbps: float
    l2_bytes_per_clock: int
    """Of the whole GPU. The A100's is published (Ampere white paper); 9.0 is assumed to have the
    same, 10.0 twice as much (two dies), the others half."""
    max_warps: int = 64
    max_blocks: int = 32
    shared_per_sm: int = 228 * _KIB
    tensor_columns: int = 0  # of tensor memory, where 10.0 accumulates
    specials_per_clock: int = 16  # exp and the like, per SM
    loaded: float = 1.0
    """The share of the boost clock that is left under the tensor cores' load, assumed: 0.775 on the
    H100, whose libraries reach 720 of 989 TFLOP/s, and on the B200."""

    @property
    def shared_per_block(self) -> int:
        """What one block can have."""
        return self.shared_per_sm - _RESERVED_SHARED


_RESERVED_SHARED = 1 * _KIB  # the driver's, per block

GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu(80, "A100 SXM 80GB", 108, 1.41, 312, 2.04, 5120, shared_per_sm=164 * _KIB),
        Gpu(86, "RTX A6000", 84, 1.80, 155, 0.77, 2560, 48, 16, 100 * _KIB),
        Gpu(89, "L40S", 142, 2.52, 362, 0.86, 2560, 48, 24, 100 * _KIB),
        Gpu(90, "H100 SXM", 132, 1.83, 989, 3.35, 5120, loaded=0.775),
        Gpu(100, "B200", 148, 1.85, 2250, 8.0, 10240, tensor_columns=512, loaded=0.775),
        Gpu(120, "RTX 5090", 170, 2.41, 210, 1.79, 2560, 48, 24, 100 * _KIB),
    )
}
"""By compute capability, 90 for 9.0."""

_REGISTERS_PER_SM = 64 * _KIB


@dataclass(frozen=True)
class Usage:
    """What `ptxas -v` says of a kernel. Spills are a thread's, shared memory is a block's."""

    registers: int
    spill_bytes: int  # stores and loads
    static_shared: int


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    registers: int
    spill_bytes: int
    shared_bytes: int  # static and dynamic
    tensor_columns: int
    blocks_per_sm: int
    code: Code


def ptxas_log(ptx: str) -> str:
    """What `ptxas -v` says of a kernel, assembled as Triton 3.4 does."""
    target = re.search(r"^\.target (\w+)", ptx, flags=re.MULTILINE)
    if target is None:
        raise RuntimeError(f"PTX without a target:\n{ptx[:500]}")
    options = ["-lineinfo", "-v", f"--gpu-name={target[1]}", "-o", os.devnull]
    return _run_tool("ptxas", options, ptx.encode()).stderr


def parse_ptxas(log: str) -> Usage:
    """The log of one kernel; functions that were not inlined spill on its account."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas has said nothing of registers and spills:\n{log[-2000:]}")
    shared = re.findall(r"(\d+) bytes smem", log)
    return Usage(max(map(int, registers)), sum(map(int, spills)), sum(map(int, shared)))


def blocks_per_sm(
    gpu: Gpu, *, warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """How many blocks are resident on an SM at once; 0 if one does not fit.

    Registers are handed out to a warp in units of 256 and to warps in fours, one for each part of
    an SM; shared memory in units of 128 bytes (NVIDIA's occupancy calculator).
    """
    warps_with_registers = _REGISTERS_PER_SM // _up(registers * 32, 256) // 4 * 4
    limits = [
        gpu.max_blocks,
        gpu.max_warps // warps,
        warps_with_registers // warps,
        gpu.shared_per_sm // (_up(shared_bytes, 128) + _RESERVED_SHARED),
    ]
    if tensor_columns:
        limits.append(gpu.tensor_columns // tensor_columns)
    return min(limits)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def resources_of(
    arch: int, log: str, cubin: bytes, shared_bytes: int, tensor_columns: int, warps: int
) -> Resources:
    """From the log of ptxas, the cubin that it made, and what Triton wants at launch."""
    usage = parse_ptxas(log)
    shared_bytes += usage.static_shared
    blocks = blocks_per_sm(
        GPUS[arch],
        warps=warps,
        registers=usage.registers,
        shared_bytes=shared_bytes,
        tensor_columns=tensor_columns,
    )
    code = analyse(parse_sass(disassemble(cubin)))
    return Resources(usage.registers, usage.spill_bytes, shared_bytes, tensor_columns, blocks, code)


def disassemble(cubin: bytes) -> str:
    """SASS, with labels where branches go."""
    return _run_tool("nvdisasm", ["-ndf", "-c"], cubin).stdout


def _run_tool(
    name: str, options: Sequence[str], content: bytes
) -> subprocess.CompletedProcess[str]:
    """One of Triton's own tools on a file of this content; what it complains of is raised."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run(
            [str(_TOOLS / name), *options, file.name], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return done
