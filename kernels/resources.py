"""What a compiled kernel takes of a GPU: registers, spills, shared memory, blocks per SM.

From `ptxas -v` on its PTX and from its SASS; both tools come with Triton.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TENSOR_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


@dataclass(frozen=True)
class Gpu:
    """Limits of a streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities),
    and, for predictions, rates of one product: data sheets, dense, without sparsity.
    """

    arch: int
    name: str
    sms: int
    clock_ghz: float
    tensor_tflops: float  # 16-bit operands
    fp32_tflops: float
    hbm_tbps: float
    l2_tbps: float
    """Assumed: no data sheet has it."""
    max_threads: int = 2048
    max_blocks: int = 32
    shared_per_sm: int = 228 * 1024
    shared_per_block: int = 227 * 1024
    exps_per_clock: int = 16  # per SM


GPUS = {
    80: Gpu(80, "A100 SXM 80GB", 108, 1.41, 312, 19.5, 2.04, 5.0,
            shared_per_sm=164 * 1024, shared_per_block=163 * 1024),
    86: Gpu(86, "RTX A6000", 84, 1.80, 155, 38.7, 0.77, 3.0, max_threads=1536, max_blocks=16,
            shared_per_sm=100 * 1024, shared_per_block=99 * 1024),
    89: Gpu(89, "L40S", 142, 2.52, 362, 91.6, 0.86, 4.0, max_threads=1536, max_blocks=24,
            shared_per_sm=100 * 1024, shared_per_block=99 * 1024),
    90: Gpu(90, "H100 SXM", 132, 1.83, 989, 66.9, 3.35, 6.0),
    100: Gpu(100, "B200", 148, 1.85, 2250, 75.0, 8.0, 10.0),
    120: Gpu(120, "RTX 5090", 170, 2.41, 210, 104.8, 1.79, 5.0, max_threads=1536, max_blocks=24,
             shared_per_sm=100 * 1024, shared_per_block=99 * 1024),
}  # fmt: skip

_REGISTERS_PER_SM = 65536
_RESERVED_SHARED = 1024  # the driver's, per block


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    registers: int
    spill_bytes: int  # stores and loads
    shared_bytes: int
    blocks_per_sm: int
    tensor_instruction: str  # "tcgen05", "wgmma", "mma" or ""
    load_bits: tuple[int, ...]  # widths of global loads, by the SASS; 0 for bulk tensor copies


def read_ptxas(log: str) -> tuple[int, int]:
    """Registers, and bytes of spill stores and loads together, from the log of `ptxas -v`."""
    used = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or spills is None:
        raise RuntimeError(f"ptxas has said nothing of registers and spills:\n{log[-2000:]}")
    return int(used[1]), int(spills[1]) + int(spills[2])


def read_load_bits(sass: str) -> tuple[int, ...]:
    """Widths of the loads from global memory, ascending; 0 for the tensor memory accelerator."""
    widths = set()
    for name, modifiers in re.findall(r"\b(LDG|LDGSTS|UTMALDG)((?:\.\w+)*)", sass):
        if name == "UTMALDG":
            widths.add(0)
            continue
        parts = modifiers.split(".")
        named = [int(part) for part in parts if part in ("64", "128", "256")]
        small = 16 if "U16" in parts or "S16" in parts else 8 if {"U8", "S8"} & {*parts} else 32
        widths.add(named[0] if named else small)
    return tuple(sorted(widths))


def blocks_per_sm(gpu: Gpu, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many blocks are resident on an SM at once.

    Registers are handed out per warp in units of 256, shared memory in units of 128 bytes.
    """
    per_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = _REGISTERS_PER_SM // per_warp // num_warps if registers else gpu.max_blocks
    shared = math.ceil((shared_bytes + _RESERVED_SHARED) / 128) * 128
    by_shared = gpu.shared_per_sm // shared
    by_threads = gpu.max_threads // (32 * num_warps)
    return min(by_registers, by_shared, by_threads, gpu.max_blocks)


def tensor_instruction(ptx: str) -> str:
    """Which tensor core instruction the code multiplies with, or "" for none."""
    return next((name for name, text in TENSOR_INSTRUCTIONS.items() if text in ptx), "")


def resources_of(arch: int, ptx: str, cubin: bytes, shared_bytes: int, num_warps: int) -> Resources:
    """Assembles the PTX once more, for its log, and disassembles the cubin."""
    registers, spill_bytes = read_ptxas(_ptxas(arch, ptx))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _run(_TOOLS / "cuobjdump", "-sass", file.name)
    return Resources(
        registers,
        spill_bytes,
        shared_bytes,
        blocks_per_sm(GPUS[arch], registers, shared_bytes, num_warps),
        tensor_instruction(ptx),
        read_load_bits(sass),
    )


def _ptxas(arch: int, ptx: str) -> str:
    tool = _TOOLS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    if not tool.exists():
        tool = _TOOLS / "ptxas"
    # The target that the code itself names: sm_90a, sm_100a.
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        out = Path(folder) / "kernel.cubin"
        return _run(tool, "-v", "--gpu-name", target[1], str(source), "-o", str(out))


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr
