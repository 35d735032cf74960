"""Where the device time of whole calls goes, and parts of the loss one by one: both passes of the
op by linear kernels and by library products with row kernels, the products, row kernels, the cast.

What takes how long here decides the length of a chunk, and from which size on the library's
products are to be preferred.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from plad_fast.kernels import launch
from plad_fast.kernels.exponential_rows import exponential_rows
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import plad_fast
from benchmarks import peers
from benchmarks.common import time_runs
from benchmarks.data import PairBatch
from benchmarks.gpu.worker import Section, Shape
from plad_fast.ops.backend import HeadOptions

CHUNKS = (1024, 2048, 4096, 8192)
MOST_KERNELS = 12  # of a profile


class Part(NamedTuple):
    what: str
    run: Callable[[], object]
    flop: float = 0.0
    moved: float = 0.0  # bytes


def products(batch: PairBatch, rows: int) -> Iterator[Part]:
    """Of a chunk of rows, into buffers that are there."""
    hidden, weight = batch.hidden[:rows], batch.weight
    flop = 2.0 * rows * weight.numel()
    logits = torch.empty(rows, len(weight), device=weight.device, dtype=weight.dtype)
    logits.normal_(std=1e-3)
    yield Part("logits, own dtype", lambda: torch.mm(hidden, weight.T, out=logits), flop)
    yield Part("d_hidden, own dtype", lambda: torch.mm(logits, weight), flop)
    yield Part("d_weight, own dtype", lambda: torch.mm(logits.T, hidden), flop)
    if weight.dtype == torch.float32:
        return
    wide = {"out_dtype": torch.float32}
    total = torch.zeros(weight.shape, device=weight.device)
    yield Part("logits, float32", lambda: torch.mm(hidden, weight.T, **wide), flop)
    yield Part("d_hidden, float32", lambda: torch.mm(logits, weight, **wide), flop)
    yield Part(
        "d_weight, added to float32",
        lambda: torch.addmm(total, logits.T, hidden, **wide, out=total),
        flop,
        8.0 * total.numel(),
    )


def row_kernels(batch: PairBatch, rows: int) -> Iterator[Part]:
    """On stored float32 logits of a chunk."""
    logits = torch.randn(rows, len(batch.weight), device=batch.weight.device).requires_grad_()
    bounds = torch.tensor([0, rows], device=logits.device)

    def forward() -> Tensor:
        return plad_fast.sequence_logprobs(
            logits, batch.targets[:rows], bounds, impl="triton"
        ).sums.sum()

    def without_gradient() -> None:
        with torch.no_grad():
            forward()

    yield Part("row kernel, forward", without_gradient, moved=4.0 * logits.numel())
    total = forward()
    yield Part(
        "row kernel, backward to float32",
        lambda: torch.autograd.grad(total, logits, retain_graph=True),
        moved=8.0 * logits.numel(),
    )
    values = torch.empty_like(logits, dtype=torch.bfloat16)
    yield Part(
        "row kernel, exponentials in bfloat16",
        lambda: exponential_rows(
            logits.detach(),
            batch.targets[:rows],
            bias=None,
            **HeadOptions().of_logits,
            out=values,
            row_width=len(batch.weight),
        ),
        moved=6.0 * logits.numel(),
    )


def _forward(hidden: Tensor, weight: Tensor, batch: PairBatch, *, by_library: bool) -> Tensor:
    with mock.patch.object(launch, "uses_library", return_value=by_library):
        return plad_fast.linear_sequence_logprobs(
            hidden, weight, batch.targets, batch.cu_seqlens, impl="triton"
        ).sums


def _backward(
    sums: Tensor, leaves: tuple[Tensor, Tensor], upstream: Tensor, *, by_library: bool
) -> None:
    with mock.patch.object(launch, "uses_library", return_value=by_library):
        torch.autograd.grad(sums, leaves, upstream, retain_graph=True)


def whole(batch: PairBatch, shape: Shape) -> Iterator[Part]:
    """What concerns all tokens, or the head; the op with logits in registers and, behind a library
    product, in memory (`launch.LIBRARY_FROM`).
    """
    hidden, weight = (x.detach().requires_grad_() for x in (batch.hidden, batch.weight))
    sums = _forward(hidden, weight, batch, by_library=False)
    upstream = torch.ones_like(sums)
    for place, by_library in (("registers", False), ("memory", True)):
        forward = partial(_forward, batch.hidden, batch.weight, batch, by_library=by_library)
        backward = partial(_backward, sums, (hidden, weight), upstream, by_library=by_library)
        yield Part(f"op, logits in {place}, forward", forward, shape.product)
        yield Part(f"op, logits in {place}, backward", backward, 3 * shape.product)
    total = torch.zeros(batch.weight.shape, device=batch.weight.device)
    size = 4.0 + batch.weight.element_size()
    yield Part(
        "cast of a float32 d_weight",
        lambda: total.to(batch.weight.dtype),
        0.0,
        size * total.numel(),
    )


def measure(section: Section, shape: Shape, rows: int, parts: Iterator[Part]) -> None:
    for part in parts:
        with section.row(shape=shape.name, rows=rows, what=part.what, calls=1) as row:
            part.run()
            ms = statistics.median(time_runs(part.run, section.device, repeats=10, seconds=0.3))
            ms *= 1e3
            row["ms"] = ms
            row["tflops"] = part.flop / ms / 1e9 if part.flop else ""
            row["gb_per_s"] = part.moved / ms / 1e6 if part.moved else ""


def kernels(section: Section, shape: Shape, name: str) -> None:
    """The longest kernels of a call with half of the pairs active; on a CPU operators of torch."""
    batch = shape.case(0.5, section.device).batch()
    step = (peers.one_pass if name == "one pass" else peers.op)(batch, impl="triton")
    step.run()
    on_gpu = section.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        step.clear()
        step.run()
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in found.key_averages() if event.device_type == kind]

    def ms(event: object) -> float:
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return float(getattr(event, name)) / 1e3

    for event in sorted(events, key=ms, reverse=True)[:MOST_KERNELS]:
        what = f"{name}: {event.key[:80]}"
        with section.row(shape=shape.name, rows=shape.tokens, what=what, calls=event.count) as row:
            row["ms"] = ms(event)


def main() -> int:
    section = Section("parts")
    for shape in section.shapes:
        for name in ("one pass", "op"):
            kernels(section, shape, name)
    for shape in section.shapes:
        batch = shape.case(1.0, section.device).batch()
        measure(section, shape, shape.tokens, whole(batch, shape))
        for rows in sorted({min(rows, shape.tokens) for rows in CHUNKS}):
            measure(section, shape, rows, products(batch, rows))
            measure(section, shape, rows, row_kernels(batch, rows))
        del batch
    return section.finish()


if __name__ == "__main__":
    sys.exit(main())
