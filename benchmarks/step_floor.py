"""Time of a step by kind of work, and its lower bound: one step of plad_fast, profiled.

    python -m benchmarks.step_floor                   # 4 pairs, prompt 256, responses 48
    python -m benchmarks.step_floor --kind short-prompt --max-tokens 1408

The products are counted from their shapes. What they would take at the rate that bare products of
the model's own shapes reach here is the floor of every exact step that keeps its activations.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import MIB, format_table, resident_bytes
from benchmarks.measure import PRODUCTS
from benchmarks.step_data import LENGTHS, PAIRS_PER_STEP, made_pairs
from benchmarks.step_impls import MAX_TOKENS
from benchmarks.step_models import load
from plad_fast import fused_linear_preference_loss
from plad_fast.data.packing import PreferenceCollator
from plad_fast.models.head import head_arguments
from plad_fast.models.sharing import prepare
from plad_fast.training.micro_batches import pack

GROUPS = {
    "matrix products": PRODUCTS.keys(),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "AdamW": ("aten::_fused_adamw_",),
}


def bare_rate(tokens: int, hidden: int, width: int, repeats: int = 20) -> float:
    """FLOP/s of a linear layer's three products, the better of two tries."""
    x, w, g = torch.randn(tokens, hidden), torch.randn(width, hidden), torch.randn(tokens, width)
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(repeats):
            _ = x @ w.T, g @ w, g.T @ x
        took = time.perf_counter() - start
        best = max(best, 6 * tokens * hidden * width * repeats / took)
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_floor", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--kind", choices=LENGTHS, default="fixed")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--repeats", type=int, default=5, help="steps timed without the profiler")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model, _ = load(args.quick, "cpu")
    pairs = made_pairs(args.kind, model.config.vocab_size, quick=args.quick)[:PAIRS_PER_STEP]
    collate = PreferenceCollator(0, 2, layout=prepare(model))
    bins = pack([pair.distinct_tokens for pair in pairs], args.max_tokens)
    batches = [
        collate(
            [
                {
                    "prompt_ids": pairs[i].prompt,
                    "response_ids": [pairs[i].chosen, pairs[i].rejected],
                }
                for i in packed
            ]
        )
        for packed in bins
    ]
    resident = resident_bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def step() -> float:
        start = time.perf_counter()
        for batch in batches:
            out = fused_linear_preference_loss(
                **head_arguments(model, batch),
                beta=1e9,
                sft_weight=0.0,
                length_normalization=0.0,
                num_groups=len(pairs),
            )
            out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step()
    plain = statistics.median(step() for _ in range(args.repeats))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        profiled = step()
    averages = {event.key: event for event in profiler.key_averages()}
    # Counting slows a step down, so that it is not the one whose parts are timed.
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as counter:
        step()
    counted = {event.key: event.flops for event in counter.key_averages()}
    times = {
        group: sum(averages[name].self_cpu_time_total for name in names if name in averages) / 1e6
        for group, names in GROUPS.items()
    }
    times["all else"] = sum(event.self_cpu_time_total for event in averages.values()) / 1e6 - sum(
        times.values()
    )
    flop = sum(counted.get(name, 0) for name in PRODUCTS)
    rate = bare_rate(
        batches[0]["input_ids"].numel(), model.config.hidden_size, model.config.intermediate_size
    )
    total = sum(times.values())
    rows = [(name, f"{took:.2f}", f"{took / total:.0%}") for name, took in times.items()]
    print(format_table(("part", "s", "share"), rows))
    print(
        f"\na step takes {plain:.2f} s (median of {args.repeats}), {profiled:.2f} s under the "
        "profiler"
    )
    print(
        f"its products are {flop / 1e9:.4g} GFLOP; bare ones reach {rate / 1e9:.0f} GFLOP/s here: "
        f"{flop / rate:.2f} s"
    )
    print(
        f"by the same count, with half of the pairs satisfied {flop / rate * 2 / 3:.2f} s, "
        f"with gradient checkpointing {flop / rate * 4 / 3:.2f} s"
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(
        f"weights, gradients and AdamW's two states are {4 * weights / MIB:.0f} MiB, "
        f"this process without a step {resident / MIB:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
