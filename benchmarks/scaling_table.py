"""The tables of docs/scaling.md, from the rows of the CSV and from the counts."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import MIB, RESULTS
from benchmarks.scaling_count import GIB, LLAMA_8B, LLAMA_70B, SHAPES, Shape, Workload, step_flops
from benchmarks.scaling_plan import DDP, FSDP, Plan
from benchmarks.scaling_rates import H100, Assumptions

Row = Mapping[str, Any]

PEERS = {
    "naive": "whole logits",
    "trl": "TRL 1.16, chunked",
    "liger": "Liger 0.8.5, chunked",
    "cut-cross-entropy": "cut-cross-entropy 25.1.1, torch_compile",
}


def all_tables(rows: Sequence[Row], work: Workload) -> list[str]:
    """In the order of the page."""
    models = [what_fits(rows, shape.name) for shape in SHAPES]
    return [*models, memory_parts(rows), time_parts(rows), heads(work), sharing(work)]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows on the H100 with checkpointing, and with these values."""
    wanted = {"gpu": H100.name, "checkpointing": 1, **wanted}
    return [row for row in rows if all(str(row[k]) == str(v) for k, v in wanted.items())]


def what_fits(rows: Sequence[Row], model: str) -> str:
    """GiB of a GPU and pairs a second; in brackets what does not fit."""
    found = _select(rows, model=model)
    worlds = sorted({int(row["gpus"]) for row in found})
    cells: dict[str, dict[int, str]] = {}
    for row in found:
        memory = f"{float(row['total_gib']):.0f} GiB"
        rate = float(row["pairs_per_s"])
        shown = f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"
        text = f"{memory}, {shown}/s" if int(row["fits"]) else f"({memory})"
        cells.setdefault(str(row["strategy"]), {})[int(row["gpus"])] = text
    body = [[name, *(line.get(world, "") for world in worlds)] for name, line in cells.items()]
    return _markdown([f"{model}, GPUs:", *map(str, worlds)], body)


_SHOWN = (
    ("Llama-3.2-1B", 1, "DDP, float32"),
    ("Llama-3.2-1B", 8, "DDP, float32"),
    ("Llama-3.1-8B", 1, "DDP, float32"),
    ("Llama-3.1-8B", 1, "DDP, bfloat16"),
    ("Llama-3.1-8B", 1, "DDP, bfloat16, 8-bit AdamW"),
    ("Llama-3.1-8B", 1, "DDP, LoRA"),
    ("Llama-3.1-8B", 8, "FSDP2, float32"),
    ("Llama-3.1-70B", 8, "FSDP2, float32"),
    ("Llama-3.1-70B", 8, "FSDP2, LoRA"),
    ("Llama-3.1-70B", 16, "FSDP2, float32"),
    ("Llama-3.1-70B", 32, "FSDP2, float32"),
    ("Llama-3.1-70B", 32, "FSDP2, vocabulary-parallel"),
    ("Llama-3.1-70B", 64, "FSDP2, float32"),
)


def _parts(rows: Sequence[Row], columns: Sequence[str], unit: float = 1) -> list[list[str]]:
    body = []
    for model, gpus, strategy in _SHOWN:
        (row,) = _select(rows, model=model, gpus=gpus, strategy=strategy)
        numbers = [unit * float(row[column]) for column in columns]
        values = [f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in numbers]
        body.append([f"{model} on {gpus}, {strategy}", *values, row])
    return body


def memory_parts(rows: Sequence[Row]) -> str:
    """GiB of one GPU."""
    names = ("weights", "gradients", "optimizer", "activations", "head", "buffers", "total")
    body = _parts(rows, [f"{name}_gib" for name in names])
    body = [[*line, "yes" if int(row["fits"]) else "no"] for *line, row in body]
    return _markdown(["GiB of a GPU", *names, "fits"], body)


def time_parts(rows: Sequence[Row]) -> str:
    """Milliseconds of a step."""
    names = ("linears", "attention", "head", "traffic", "optimizer", "collectives", "step")
    body = _parts(rows, [f"{name}_s" for name in names], 1e3)
    body = [[*line, row["binds"]] for *line, row in body]
    return _markdown(["ms of a step", *names, "largest"], body)


def measured_heads() -> dict[str, Row]:
    """Counted products and measured bytes of the peers, by name: the rows of the loss benchmark in
    which products are whole ones (float32, one shape, half of the pairs active)."""
    with (RESULTS / "loss_cpu.csv").open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["dtype"], row["active"], row["vocab"]) == ("float32", "0.5", "49152")
        ]
    return {row["impl"]: row for row in rows}


def heads(work: Workload, shapes: Sequence[Shape] = (LLAMA_8B, LLAMA_70B)) -> str:
    """Products and their time on one GPU, by implementation, all on the same rows."""
    rate = H100.flops * Assumptions().product_share
    unit = {s.name: 2 * work.rows * s.head_parameters / rate * 1e3 for s in shapes}
    logits = work.rows * shapes[0].vocab / GIB
    measured = measured_heads()
    body = []

    def scratch(plan: Plan) -> str:
        return f"{plan.head_chunk.bytes / GIB:.1f} GiB of scratch"

    def line(name: str, products: float, memory: str) -> None:
        times = [f"{products * unit[shape.name]:.0f}" for shape in shapes]
        body.append([name, f"{products:.3g}", *times, memory])

    for key, name in PEERS.items():
        row = measured[key]
        extra = float(row["over_gradients_mib"])
        memory = f"{extra:.0f} MiB measured at 1024 x 49152, float32"
        if key == "naive":
            per_logit = extra * MIB / (1024 * 49152)
            memory = f"{per_logit:.1f} bytes a logit measured: {per_logit * logits:.1f} GiB"
            every = dataclasses.replace(work, shared=False).tokens / work.rows
            all_of_it = f"the same: {every * per_logit * logits:.1f} GiB"
            line("whole logits of all positions", every * float(row["products"]), all_of_it)
        line(name, float(row["products"]), memory)
    for active in (1.0, 0.5, 0.25, 0.0):
        part = dataclasses.replace(work, active=active)
        plan = Plan(shapes[0], part, FSDP, 8)
        line(f"plad_fast, {active:.0%} active", plan.products, scratch(plan))
    lora = Plan(shapes[0], work, dataclasses.replace(DDP, lora_rank=16), 8)
    line("plad_fast, frozen head", lora.products, scratch(lora))
    header = ["head", "products", *(f"{s.name}, ms" for s in shapes), "beside gradients"]
    return _markdown(header, body)


def sharing(work: Workload, shape: Shape = LLAMA_8B) -> str:
    """What shared prompts spare: tokens, products and activations of the 8B on 8 GPUs."""
    body = []
    for prompt, response in ((64, 256), (256, 256), (512, 256), (1024, 256), (2048, 128)):
        once = dataclasses.replace(work, prompt=prompt, response=response, shared=True)
        twice = dataclasses.replace(once, shared=False)
        pair = [Plan(shape, w, FSDP, 8) for w in (once, twice)]
        flops = [
            step_flops(shape, p.work, products=p.products, checkpointing=True).total for p in pair
        ]
        memory = [p.memory.activations for p in pair]
        step = [p.seconds.total for p in pair]
        body.append(
            [
                f"{prompt} + {response}",
                f"{once.tokens} / {twice.tokens}",
                *(f"{a / b:.2f}" for a, b in (flops, memory, step)),
            ]
        )
    return _markdown(
        ["prompt + response", "tokens shared / twice", "flop", "activations", "step time"], body
    )
