"""A counted model of the linear kernels' speed. Everything it returns is a prediction.

The time of a launch is taken as that of its busiest unit, as if all overlapped perfectly:

    tensor   2 N D V flop at the data sheet's rate, stretched by the last wave's idle SMs
    memory   hidden and weight from HBM: the weight once if all tiles of tokens run together
    L2       (BLOCK_N + BLOCK_V) D bytes x 2 for every tile of logits
    exp      one exponential per logit, three with a softcap, on the special function units
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from plad_fast.kernels.launch import Device, LinearConfig, vocab_splits
from plad_fast.kernels.resources import Gpu

TOKENS = 4096
MODELS = {
    # name: (D, V, whether logits are capped)
    "SmolLM2-135M": (576, 49_152, False),
    "Qwen2.5-0.5B": (896, 151_936, False),
    "Llama-3.2-1B": (2048, 128_256, False),
    "Llama-3.1-8B": (4096, 128_256, False),
    "Gemma-2-9B": (3584, 256_000, True),
}


@dataclass(frozen=True)
class Prediction:
    """Of the forward on `TOKENS` tokens with 16-bit operands."""

    bound: str  # "tensor", "memory", "L2" or "exp"
    milliseconds: float
    share_of_peak: float  # of the tensor cores' rate


def predict_forward(
    gpu: Gpu,
    tile: LinearConfig,
    blocks_per_sm: int,
    width: int,
    vocab: int,
    capped: bool,
    num_tokens: int = TOKENS,
) -> Prediction:
    """Time of `_linear_forward_kernel` by the counts above."""
    token_tiles = math.ceil(num_tokens / tile.BLOCK_N)
    vocab_tiles = math.ceil(vocab / tile.BLOCK_V)
    device = Device((gpu.arch // 10, gpu.arch % 10), gpu.sms)
    per_split = math.ceil(vocab_tiles / vocab_splits(num_tokens, vocab, tile, device))
    programs = token_tiles * math.ceil(vocab_tiles / per_split)
    slots = gpu.sms * max(1, blocks_per_sm)
    # An SM's resident blocks share it: what counts is how many tiles the busiest SM gets.
    tiles_of_busiest = math.ceil(programs / gpu.sms) * per_split
    stretch = tiles_of_busiest * gpu.sms / (token_tiles * vocab_tiles)
    flop = 2.0 * num_tokens * width * vocab
    passes = math.ceil(token_tiles / min(token_tiles, slots))
    seconds = {
        "tensor": flop / (gpu.tensor_tflops * 1e12) * stretch,
        "memory": 2.0 * width * (vocab * passes + num_tokens) / (gpu.hbm_tbps * 1e12),
        "L2": 2.0 * width * token_tiles * vocab_tiles * (tile.BLOCK_N + tile.BLOCK_V)
        / (gpu.l2_tbps * 1e12),
        "exp": (3 if capped else 1) * num_tokens * vocab
        / (gpu.exps_per_clock * gpu.sms * gpu.clock_ghz * 1e9),
    }  # fmt: skip
    bound = max(seconds, key=lambda unit: seconds[unit])
    peak = flop / (gpu.tensor_tflops * 1e12)
    return Prediction(bound, seconds[bound] * 1e3, peak / seconds[bound])
