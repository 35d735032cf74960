"""Predicted time of the loss on an H100: counted launches and bytes, assumed rates.

    python -m benchmarks.counted            # prints; results/counted.csv and counted.md
    python -m benchmarks.counted --no-save

The op and the one-pass loss, beside three bare products, TRL's chunked function and PyTorch's
`linear_cross_entropy`: their code runs on `benchmarks.cuda_recorder`, without a GPU, in bfloat16.
Nothing here was timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import RESULTS, Record, format_table, git_commit, version_of, write_csv
from benchmarks.cuda_counts import A, B, C, Counts, Shape, count, count_one_pass, count_op
from benchmarks.cuda_recorder import H100, Launch
from benchmarks.cuda_rules import Arguments, Rule, Touched, once, sized

CSV = RESULTS / "counted.csv"
CASES = {
    "A": A,
    "B": B,
    "C": C,
    "SmolLM2-135M": Shape(2048, 576, 49_152),
    "Llama-3.2-1B": Shape(4096, 2048, 128_256),
}
"""A: Llama-3.1-8B, B: Qwen2.5-0.5B, C: a head of 2048 with a large vocabulary."""


@dataclass(frozen=True)
class Rates:
    """Assumed, of an H100 SXM: what kernels reached where others published it, and for ours what
    `plad_fast.kernels.aot` predicts (results/kernels.md)."""

    product: float = 720e12
    """Flop a second of a library product, 16-bit operands, whatever the dtype of its result."""
    triton: tuple[tuple[int, float], ...] = ((896, 450e12), (2048, 525e12), (4096, 560e12))
    """Flop a second of our own products, forward and backward, by D; between and beyond, the time
    of a flop is linear in 1 / D."""
    memory: float = 3.0e12
    """Bytes a second, of everything else and of what a product adds to."""
    launch: float = 5e-6
    """Seconds that a launch takes at least."""

    def of_triton(self, width: int) -> float:
        points = self.triton
        place = min(max(sum(width > d for d, _ in points), 1), len(points) - 1)
        (near, fast), (far, faster) = points[place - 1 : place + 1]
        share = (1 / near - 1 / width) / (1 / near - 1 / far)
        return 1 / ((1 - share) / fast + share / faster)

    def seconds(self, launch: Launch, width: int) -> float:
        if launch.kind == "product":
            busy = launch.flops / self.product + launch.accumulated / self.memory
        elif launch.flops:
            busy = launch.flops / self.of_triton(width)
        else:
            busy = (launch.read + launch.written) / self.memory
        return max(busy, self.launch)


RATES = Rates()


@dataclass(frozen=True)
class Row:
    case: str
    implementation: str
    active: float
    milliseconds: float
    counts: Counts | None
    """None for products without anything around them."""


def rows() -> Iterator[Row]:
    for case, shape in CASES.items():
        for active in (1.0, 0.5):
            flops = (1 + 2 * active) * _product(shape)
            name = "1 + 2a bare products"
            yield Row(case, name, active, flops / RATES.product * 1e3, None)
            for name, implementation in IMPLEMENTATIONS.items():
                counts = implementation(shape, active)
                if counts is not None:
                    seconds = sum(RATES.seconds(x, shape.width) for x in counts.launches)
                    yield Row(case, name, active, seconds * 1e3, counts)


def _product(shape: Shape) -> float:
    return 2.0 * shape.tokens * shape.width * shape.vocab


def _trl(shape: Shape, active: float) -> Counts | None:
    """With the tile its trainers use, and none of its optional outputs."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils
    except ImportError:
        return None

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, bounds: Tensor, upstream: Tensor
    ) -> None:
        tile = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        logprobs, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, tile, None, 1.0, ()
        )
        torch.autograd.grad(logprobs, (hidden, weight), _by_token(upstream, targets, bounds))

    return count(run, shape, active=active, rules=_TRLS_RULES)


def _torch(shape: Shape, active: float) -> Counts | None:
    """The one in chunks, whose gradients of tokens take a second forward."""
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        return None

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, bounds: Tensor, upstream: Tensor
    ) -> None:
        options = torch.nn.LinearCrossEntropyOptions()
        losses = function(hidden, weight, targets, reduction="none", options=options)
        torch.autograd.grad(losses, (hidden, weight), _by_token(upstream, targets, bounds))

    return count(run, shape, active=active)


def _by_token(upstream: Tensor, targets: Tensor, bounds: Tensor) -> Tensor:  # (N,)
    return upstream.repeat_interleave(bounds.diff(), output_size=len(targets))


def _fold(arguments: Arguments) -> Touched:
    """A tile of logits, and the running statistics without the optional ones."""
    tile, statistics = arguments["mm_ptr"], ("max_ptr", "sum_exp_ptr")
    held = [arguments[name] for name in statistics]
    written = [*held, arguments["target_logit_ptr"]]
    return Touched(sized([tile, arguments["targets_ptr"], *held]), sized(written))


def _unfold(arguments: Arguments) -> Touched:
    """A tile of logits in place."""
    numbers = ("targets_ptr", "log_z_ptr", "grad_logprobs_ptr")
    touched = once({name: arguments[name] for name in numbers}, ())
    tile = sized([arguments["mm_ptr"]])
    return Touched([*tile, *touched.read], tile)


_TRLS_RULES = {"_forward_kernel": Rule(_fold), "_backward_kernel": Rule(_unfold, True)}

IMPLEMENTATIONS: dict[str, Callable[[Shape, float], Counts | None]] = {
    "one pass": lambda shape, active: count_one_pass(shape, active=active),
    "op": lambda shape, active: count_op(shape, active=active),
    f"TRL {version_of('trl')}, chunked": _trl,
    f"PyTorch {version_of('torch').partition('+')[0]}, linear_cross_entropy": _torch,
}


def record(row: Row) -> Record:
    """A row of the CSV."""
    shape, counts = CASES[row.case], row.counts
    values: Record = {
        "case": row.case,
        "N": shape.tokens,
        "D": shape.width,
        "V": shape.vocab,
        "implementation": row.implementation,
        "active": row.active,
        "predicted_ms": f"{row.milliseconds:.4g}",
        "products": f"{1 + 2 * row.active:.4g}",
    }
    if counts is None:
        return values | dict.fromkeys(_COUNTED, "")
    found = (
        len(counts.launches),
        len(counts.of_kind("product")),
        len(counts.waits),
        counts.chunks or "",
        f"{counts.launches_per_chunk:.3g}" if counts.chunks > 1 else "",
        f"{counts.weight_grad_read:.4g}",
        f"{counts.weight_grad_written:.4g}",
        f"{(counts.read + counts.written) / 1e9:.4g}",
        f"{counts.peak_bytes / 2**30:.3g}",
    )
    values["products"] = f"{counts.flops / _product(shape):.4g}"
    return values | dict(zip(_COUNTED, found, strict=True))


_COUNTED = (
    "launches",
    "library_products",
    "waits",
    "chunks",
    "launches_per_chunk",
    "weight_grad_read",
    "weight_grad_written",
    "gigabytes",
    "peak_gib",
)


def page(records: Sequence[Record]) -> str:
    """results/counted.md"""
    names = list(dict.fromkeys((r["implementation"], r["active"]) for r in records))
    by_case = {(r["implementation"], r["active"], r["case"]): r["predicted_ms"] for r in records}
    times = [
        [f"{name}, a = {active:g}", *(by_case.get((name, active, case), "") for case in CASES)]
        for name, active in names
    ]
    sizes = [f"{case}: {s.tokens} x {s.width} x {s.vocab}" for case, s in CASES.items()]
    ours = [r for r in records if r["waits"] != ""]
    counts = [
        [f"{r['case']}, {r['implementation']}, a = {r['active']:g}", *(str(r[c]) for c in _COUNTED)]
        for r in ours
    ]
    versions = {name: version_of(name) for name in ("torch", "triton", "trl")}
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return _PAGE.format(
        made_with=made_with,
        commit=git_commit(),
        device=H100.name,
        length=A.length,
        logits=4 * A.tokens * A.vocab / RATES.memory * 1e3,
        product=RATES.product / 1e12,
        triton=", ".join(f"{rate / 1e12:g} at D = {width}" for width, rate in RATES.triton),
        memory=RATES.memory / 1e12,
        launch=RATES.launch * 1e6,
        times=_markdown(["ms", *sizes], times),
        counts=_markdown(["", *(name.replace("_", " ") for name in _COUNTED)], counts),
    )


_PAGE = """# The loss on an H100, by counting

Made by `python -m benchmarks.counted` with {made_with}, at {commit}, on a machine without a GPU.
**Nothing here was timed.** Launches, bytes, waits and flops are counted; rates are assumed.
Differences of less than about a fifth mean nothing, and libraries that rely on the L2 cache come
out too slow: use the tables for the counts, not to rank libraries.

Forward and backward to hidden states and weight, N x D x V, bfloat16, pairs of {length} + {length}
tokens of which a share a has a gradient. Every implementation runs its own code for an {device} on
tensors without memory (`benchmarks/cuda_recorder.py`); the bare products are a formula. A is the
head of Llama-3.1-8B, B of Qwen2.5-0.5B.

## Predicted time

{times}

A launch takes {launch:g} us at least, and

| | assumed |
|---|---|
| a library product of 16-bit operands | {product:g} TFLOP/s, whatever the dtype of its result |
| what such a product adds to, read and written | {memory:g} TB/s, in addition |
| a product in our own kernels ([predicted](kernels.md)) | {triton} TFLOP/s; else linear in 1 / D |
| all other bytes | {memory:g} TB/s; no cache is modelled |
| waits of the host | nothing |

So a library that works on small chunks, which the L2 may hold, comes out too slow, and a call with
many waits too fast. That a product writes its result while it multiplies is assumed, too: if it did
not, the float32 logits of one pass would take {logits:.1f} ms more at A.

## Counts

A launch is a kernel, a library product, or an operation of PyTorch that is not a view. Launches per
chunk are those from one gradient of a chunk's logits to the next, beside library products. Reads
and writes of the gradient of the weight are in passes over its V D entries, in whatever dtype it is
kept meanwhile. Gigabytes are those of every operand and result, once each launch. The peak is above
hidden states and weight, with the gradients in it.

{counts}
"""


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counted", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--no-save", action="store_true", help="write no files")
    args = parser.parse_args(argv)
    records = [record(row) for row in rows()]
    print(format_table(list(records[0]), [[str(x) for x in r.values()] for r in records]))
    print("\nrates are assumed, nothing was run on a GPU")
    if not args.no_save:
        text = page(records)  # before the files differ from the commit
        write_csv(CSV, records)
        CSV.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
