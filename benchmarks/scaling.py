"""Predicted time and memory of a training step for 1B, 8B and 70B students on 1 to 64 GPUs.

    python -m benchmarks.scaling                    # prints; results/scaling.csv and .png
    python -m benchmarks.scaling --markdown         # the tables of docs/scaling.md
    python -m benchmarks.scaling --pairs 8 --prompt 1024 --response 256 --active 0.5 --no-save

Flops, bytes and collectives are counted (`scaling_count`), rates are assumed (`scaling_rates`).
Nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from benchmarks.common import RESULTS, Record, format_table, write_csv
from benchmarks.scaling_count import GIB, SHAPES, Shape, Workload
from benchmarks.scaling_plan import STRATEGIES, Plan, Strategy
from benchmarks.scaling_rates import GPUS, H100, Gpu
from benchmarks.scaling_table import all_tables

WORLDS = (1, 2, 4, 8, 16, 32, 64)
WORK = Workload(pairs=4, prompt=512, response=256)
CSV = RESULTS / "scaling.csv"


def plans(work: Workload = WORK, gpus: Sequence[Gpu] = GPUS) -> list[Plan]:
    """Every strategy at every size; without checkpointing on the first GPU only."""
    return [
        Plan(shape, work, strategy, world, gpu, checkpointing)
        for gpu in gpus
        for checkpointing in ((True, False) if gpu is H100 else (True,))
        for shape in SHAPES
        for strategy in STRATEGIES
        for world in WORLDS
        if sensible(shape, strategy, world)
    ]


def sensible(shape: Shape, strategy: Strategy, world: int) -> bool:
    """Sharding takes two GPUs; a tied head cannot be split apart from its embedding."""
    if strategy.vocab_parallel and shape.tied:
        return False
    return world > 1 or not strategy.sharded


def record(plan: Plan) -> Record:
    """One row of the CSV: GiB, TFLOP, seconds."""
    flops, memory, seconds = plan.flops, plan.memory, plan.seconds
    row: Record = {
        "model": plan.shape.name,
        "gpu": plan.gpu.name,
        "gpus": plan.world,
        "strategy": plan.strategy.name,
        "checkpointing": int(plan.checkpointing),
        "pairs_per_gpu": plan.work.pairs,
        "trainable": plan.trainable,
        "linears_tflop": _digits(flops.linears / 1e12),
        "attention_tflop": _digits(flops.attention / 1e12),
        "head_tflop": _digits(flops.head / 1e12),
        "received_gib": _digits(plan.collectives.received(plan.world) / GIB),
    }
    row |= {f"{name}_gib": _digits(value / GIB) for name, value in vars(memory).items()}
    row |= {"total_gib": _digits(memory.total / GIB), "fits": int(plan.fits)}
    row |= {f"{name}_s": _digits(value) for name, value in vars(seconds).items()}
    return row | {
        "step_s": _digits(seconds.total),
        "pairs_per_s": _digits(plan.pairs_per_second),
        "binds": seconds.binds,
    }


def _digits(value: float) -> str:
    return f"{value:.4g}"


def table(rows: Sequence[Record]) -> str:
    columns = ("model", "gpus", "strategy", "total_gib", "fits", "step_s", "pairs_per_s", "binds")
    cells = [[str(row[column]) for column in columns] for row in rows]
    return format_table(columns, cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=(__doc__ or "").partition("\n\n")[0]
    )
    for name in ("pairs", "prompt", "response"):
        parser.add_argument(f"--{name}", type=int, default=getattr(WORK, name))
    parser.add_argument("--active", type=float, default=1.0, help="share of the pairs")
    parser.add_argument("--concatenated", action="store_true", help="no shared prompts")
    parser.add_argument("--markdown", action="store_true", help="print the documentation's tables")
    parser.add_argument("--no-save", action="store_true", help="write no CSV and no picture")
    args = parser.parse_args(argv)
    if min(args.pairs, args.prompt, args.response) < 1 or not 0 <= args.active <= 1:
        parser.error("--pairs, --prompt and --response are at least 1, --active is from 0 to 1")
    work = dataclasses.replace(
        WORK,
        pairs=args.pairs,
        prompt=args.prompt,
        response=args.response,
        active=args.active,
        shared=not args.concatenated,
    )
    rows = [record(plan) for plan in plans(work)]
    if args.markdown:
        print("\n\n".join(all_tables(rows, work)))
        return 0
    shown = [row for row in rows if row["gpu"] == H100.name and row["checkpointing"]]
    print(table(shown))
    print(f"\n{H100.name}, checkpointing, {work}; rates are assumed, nothing was run on a GPU")
    if args.no_save:
        return 0
    if work != WORK:
        print("settings are not the standard ones: nothing is written")
        return 0
    write_csv(CSV, rows)
    from benchmarks.scaling_plot import draw

    draw(CSV, CSV.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
