"""A counted model of the kernels' speed. Everything it returns is a prediction.

It counts clocks of a streaming multiprocessor (SM). A tile of BLOCK_N x BLOCK_V logits takes

    product   ceil(D / BLOCK_D) steps, each the longest of
                tensor   2 BLOCK_N BLOCK_V BLOCK_D flop at the data sheet's rate
                L2       (BLOCK_N + BLOCK_V) BLOCK_D operands of 2 bytes
                issue    instructions of the inner loop x warps / 4
    epilogue  the longer of
                issue    instructions around the inner loop x warps / 4
                exp      those of them that are exp, log or 1/x x warps x 32 / 16
    fill      1000 clocks (assumed) until a tile's first operands arrive

where instructions are counted in the SASS, and a clock is longer than at boost as far as the
tensor cores' load slows a GPU down (`Gpu.loaded`). Blocks that share an SM hide each other's
phases: of b blocks a tile costs max(product, epilogue, (product + epilogue + fill) / b). A launch
lasts as long as the SM with the most tiles, or as HBM takes for what it carries: the weights once
for every group of token tiles that run together, hidden once, results. Row kernels are the longest
of the bytes they move, their instructions and their exponentials, at the boost clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from plad_fast.kernels.aot.resources import Gpu, Resources
from plad_fast.kernels.launch import (
    TOKEN_GROUP,
    Device,
    LinearConfig,
    RowsConfig,
    vocab_splits,
)

TOKENS = 2048
MODELS = {
    # name: (D, V, whether logits are capped)
    "SmolLM2-135M": (576, 49_152, False),
    "Qwen2.5-0.5B": (896, 151_936, False),
    "Llama-3.2-1B": (2048, 128_256, False),
    "Llama-3.1-8B": (4096, 128_256, False),
    "Gemma-2-9B": (3584, 256_000, True),
}
_FILL_CLOCKS = 1000
_SCHEDULERS = 4


@dataclass(frozen=True)
class Prediction:
    bound: str
    """The unit with the most to do: tensor, L2, HBM, exp, or issue (of instructions)."""
    milliseconds: float
    share_of_peak: float
    """Of the tensor cores' rate for products, of HBM's for rows."""


def predict_linear(
    gpu: Gpu,
    tile: LinearConfig,
    resources: Resources,
    width: int,
    vocab: int,
    *,
    backward: bool,
    num_tokens: int = TOKENS,
) -> Prediction:
    """Of `_linear_forward_kernel` or `_logits_gradient_kernel` on 16-bit operands."""
    code, boost = resources.code, gpu.clock_ghz * 1e9
    clock = boost * gpu.loaded
    flop_per_clock = gpu.tensor_tflops * 1e12 / gpu.sms / boost
    step = {
        "tensor": 2 * tile.BLOCK_N * tile.BLOCK_V * tile.BLOCK_D / flop_per_clock,
        "L2": 2 * (tile.BLOCK_N + tile.BLOCK_V) * tile.BLOCK_D / (gpu.l2_bytes_per_clock / gpu.sms),
        "issue": code.inner * tile.num_warps / _SCHEDULERS,
    }
    product = math.ceil(width / tile.BLOCK_D) * max(step.values())
    around = _clocks(gpu, code.outer, code.outer_special, tile.num_warps)
    epilogue = max(around.values())

    token_tiles = math.ceil(num_tokens / tile.BLOCK_N)
    vocab_tiles = math.ceil(vocab / tile.BLOCK_V)
    per_program = 1
    if not backward:
        device = Device((gpu.arch // 10, gpu.arch % 10), gpu.sms)
        per_program = math.ceil(vocab_tiles / vocab_splits(num_tokens, vocab, tile, device))
    programs = token_tiles * math.ceil(vocab_tiles / per_program)
    busiest = math.ceil(programs / gpu.sms)
    together = min(max(1, resources.blocks_per_sm), busiest)
    per_tile = max(product, epilogue, (product + epilogue + _FILL_CLOCKS) / together)

    passes = math.ceil(token_tiles / TOKEN_GROUP)
    results = vocab if backward else 2 * 4 * programs // token_tiles
    carried = 2 * width * (vocab * passes + num_tokens) + 2 * num_tokens * results
    seconds = {
        "SM": busiest * per_program * per_tile / clock,
        "HBM": carried / (gpu.hbm_tbps * 1e12),
    }
    slowest = max(seconds.values())
    if seconds["HBM"] == slowest:
        bound = "HBM"
    elif product >= epilogue:
        bound = max(step, key=lambda unit: step[unit])
    else:
        bound = max(around, key=lambda unit: around[unit])
    peak = 2.0 * num_tokens * width * vocab / (gpu.tensor_tflops * 1e12)
    return Prediction(bound, slowest * 1e3, peak / slowest)


def predict_rows(
    gpu: Gpu,
    tile: RowsConfig,
    resources: Resources,
    vocab: int,
    *,
    bytes_per_logit: int,
    num_tokens: int = TOKENS,
) -> Prediction:
    """Of a kernel that runs over rows of logits, `bytes_per_logit` read and written."""
    code = resources.code
    steps = num_tokens * math.ceil(vocab / tile.BLOCK_V) / gpu.sms
    clocks = _clocks(gpu, code.inner, code.inner_special, tile.num_warps)
    seconds = {unit: steps * x / (gpu.clock_ghz * 1e9) for unit, x in clocks.items()}
    seconds["HBM"] = num_tokens * vocab * bytes_per_logit / (gpu.hbm_tbps * 1e12)
    bound = max(seconds, key=lambda unit: seconds[unit])
    return Prediction(bound, seconds[bound] * 1e3, seconds["HBM"] / seconds[bound])


def _clocks(gpu: Gpu, instructions: int, special: int, warps: int) -> dict[str, float]:
    return {
        "issue": instructions * warps / _SCHEDULERS,
        "exp": special * warps * 32 / gpu.specials_per_clock,
    }
