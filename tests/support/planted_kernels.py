"""A kernel with nothing wrong and three with something, for test_aot.py."""

from __future__ import annotations

import triton
import triton.language as tl
from plad_fast.kernels.launch import AotEntry, LinearConfig


@triton.jit
def _product_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    width,
    stride,
    SCALAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_n, offs_v, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    out = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        x = tl.load(x_ptr + offs_n[:, None] * stride + (start + offs_d)[None, :])
        w = tl.load(w_ptr + offs_v[None, :] * stride + (start + offs_d)[:, None])
        if SCALAR:
            out += tl.sum(x[:, :, None].to(tl.float32) * w[None, :, :].to(tl.float32), axis=1)
        else:
            out = tl.dot(x, w, out)
    tl.store(out_ptr + offs_n[:, None] * BLOCK_V + offs_v[None, :], out)


_TILES = {
    "good": LinearConfig(64, 64, 32, num_warps=4, num_stages=2),
    # 512 accumulators a thread.
    "spill": LinearConfig(128, 128, 32, num_warps=1, num_stages=2),
    # Four buffers of 64 KiB each.
    "shared": LinearConfig(128, 128, 128, num_warps=8, num_stages=5),
    "scalar": LinearConfig(16, 16, 16, num_warps=4, num_stages=1),
}


def aot_entries(capability: tuple[int, int]) -> list[AotEntry]:
    types = {
        "x_ptr": "*bf16",
        "w_ptr": "*bf16",
        "out_ptr": "*fp32",
        "width": "i32",
        "stride": "i32",
    }
    entries = []
    for planted, tile in _TILES.items():
        blocks = {k: v for k, v in vars(tile).items() if k.startswith("BLOCK")}
        constants = {"SCALAR": planted == "scalar", **blocks}
        entries.append(AotEntry(_product_kernel, "bf16", tile, constants, types, tuple(types)))
    return entries
