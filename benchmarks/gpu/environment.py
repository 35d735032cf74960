"""Facts of the machine, and the rates that everything else is held against."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.common import environment, time_runs
from benchmarks.gpu.worker import Section

DRIVER_FACTS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "memory.total", "memory.used",
)  # fmt: skip


def main() -> int:
    section = Section("environment")
    for what, value in environment(section.device).items():
        with section.row(what=what) as row:
            row["value"] = value
    if section.device.type == "cuda":
        properties = torch.cuda.get_device_properties(section.device)
        with section.row(what="capability") as row:
            row["value"] = f"{properties.major}.{properties.minor}"
        with section.row(what="multiprocessors") as row:
            row["value"] = properties.multi_processor_count
    with section.row(what="nvidia-smi") as row:
        row["value"] = driver_facts()
    for what, measured in rates(section).items():
        with section.row(what=what) as row:
            row["value"] = f"{measured():.4g}"
    return section.finish()


def driver_facts() -> str:
    command = ["nvidia-smi", f"--query-gpu={','.join(DRIVER_FACTS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return "there is no nvidia-smi"
    values = done.stdout.splitlines()[0].split(", ") if done.stdout else [done.stderr.strip()]
    return "; ".join(map(" ".join, zip(DRIVER_FACTS, values, strict=False)))


def rates(section: Section) -> dict[str, Callable[[], float]]:
    """By name with unit. A launch and a call are those of which only host work takes time."""
    device = section.device
    side = 256 if section.tiny else 8192
    launches = 1000

    def seconds(run: Callable[[], object]) -> float:
        run()
        return statistics.median(time_runs(run, device, repeats=10, seconds=0.5))

    def copy() -> float:
        source = torch.zeros(side * side, device=device)
        target = torch.empty_like(source)
        return 8 * source.numel() / seconds(lambda: target.copy_(source)) / 1e9

    def product(**options: torch.dtype) -> float:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / seconds(lambda: torch.mm(a, b, **options)) / 1e12

    def launch() -> float:
        x = torch.zeros(1, device=device)

        def run() -> None:
            for _ in range(launches):
                x.add_(1.0)

        return seconds(run) / launches * 1e6

    def call(name: str) -> float:
        import plad_fast

        hidden, weight = (torch.randn(n, 64, device=device) for n in (8, 256))
        bounds = torch.tensor([0, 4, 8], device=device)
        inputs = hidden.requires_grad_(), weight.requires_grad_(), bounds.new_zeros(8), bounds

        def run() -> None:
            if name == "op":
                found = plad_fast.linear_sequence_logprobs(*inputs, impl="triton").sums.sum()
            else:
                found = plad_fast.fused_linear_preference_loss(*inputs, impl="triton").loss
            found.backward()

        run()
        return seconds(run) * 1e6

    wide = {} if device.type == "cpu" else {"out_dtype": torch.float32}
    return {
        "copy, GB/s read and written": copy,
        "library product, TFLOP/s": product,
        "library product with float32 output, TFLOP/s": lambda: product(**wide),
        "launch of a small kernel, us": launch,
        "op on 8 tokens, forward and backward, us": lambda: call("op"),
        "one pass on 8 tokens, forward and backward, us": lambda: call("one pass"),
    }


if __name__ == "__main__":
    sys.exit(main())
