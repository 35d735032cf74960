"""Compiles every kernel for GPUs that this machine need not have, and looks at what came out.

    python -m plad_fast.kernels.aot --arch 80 90 100 [--json PATH] [--markdown PATH]

Every configuration that `launch` can choose, with every combination of options that users reach.
Exit status 1 on any spilled register, any configuration over a block's shared memory, and any
linear kernel of 16-bit operands without tensor cores. Nothing is timed; see `predict`.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from plad_fast.kernels import launch, linear_backward, linear_forward, logits_rows, segments
from plad_fast.kernels.launch import AotEntry, LinearConfig
from plad_fast.kernels.predict import MODELS, TOKENS, predict_forward
from plad_fast.kernels.resources import GPUS, Resources, resources_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (linear_forward, linear_backward, logits_rows, segments)
_AMD = "gfx942"
_AMD_SAMPLE = 8  # every eighth entry


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture."""

    arch: int
    kernel: str
    dtype: str
    tile: str
    flags: str
    num_warps: int
    num_stages: int
    resources: Resources
    problems: tuple[str, ...]


def entries(arch: int) -> list[AotEntry]:
    """What is to be compiled for an architecture such as 90 (compute capability 9.0)."""
    capability = (arch // 10, arch % 10)
    return [entry for module in MODULES for entry in module.aot_entries(capability)]


def amd_entries() -> list[AotEntry]:
    """A sample of the kernels of capability 8.0; AMD's cards have no tf32."""
    ieee = [e for e in entries(80) if e.constants.get("PRECISION", "ieee") == "ieee"]
    return ieee[::_AMD_SAMPLE]


def compile_entry(entry: AotEntry, target: GPUTarget) -> Any:
    """Triton's compiled kernel."""
    names = entry.kernel.arg_names
    source = ASTSource(
        fn=entry.kernel,
        signature={n: "constexpr" if n in entry.constants else entry.types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in entry.constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n in entry.aligned
            if not entry.types[n].startswith("tensordesc")
        },
    )
    options = {"num_warps": entry.tile.num_warps, "num_stages": entry.tile.num_stages}
    return triton.compile(source, target=target, options=options)


def inspect(entry: AotEntry, arch: int) -> Report:
    """Compiles an entry and lists what is wrong with it."""
    compiled = compile_entry(entry, GPUTarget("cuda", arch, 32))
    resources = resources_of(
        arch,
        compiled.asm["ptx"],
        compiled.asm["cubin"],
        compiled.metadata.shared,
        entry.tile.num_warps,
    )
    return Report(
        arch,
        entry.kernel.fn.__name__,
        entry.dtype,
        "x".join(str(v) for k, v in vars(entry.tile).items() if k.startswith("BLOCK")),
        entry.flags,
        entry.tile.num_warps,
        entry.tile.num_stages,
        resources,
        tuple(problems_of(entry, arch, resources)),
    )


def problems_of(entry: AotEntry, arch: int, resources: Resources) -> Iterator[str]:
    """What must not be: each in a sentence."""
    limit = GPUS[arch].shared_per_block
    if resources.spill_bytes:
        yield f"spills {resources.spill_bytes} bytes of registers"
    if resources.shared_bytes > limit:
        yield f"takes {resources.shared_bytes} bytes of shared memory; a block has {limit}"
    if entry.linear and entry.dtype in ("bf16", "fp16") and not resources.tensor_instruction:
        yield "multiplies 16-bit operands without tensor cores"


def _work(job: tuple[int, int]) -> Report:
    arch, index = job
    return inspect(entries(arch)[index], arch)


def _work_amd(index: int) -> str:
    """Compile only: what the linear kernels multiply with there."""
    assembly = compile_entry(amd_entries()[index], GPUTarget("hip", _AMD, 64)).asm["amdgcn"]
    return "mfma" if "mfma" in assembly else ""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    jobs = [(arch, index) for arch in args.arch for index in range(len(entries(arch)))]
    reports: list[Report] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for report in pool.map(_work, jobs, chunksize=4):
            reports.append(report)
            if len(reports) % 25 == 0 or len(reports) == len(jobs):
                print(f"compiled {len(reports)} of {len(jobs)}", file=sys.stderr, flush=True)
        amd = list(pool.map(_work_amd, range(len(amd_entries())))) if args.amd else []
    text = "\n\n".join([summary(reports), predictions(reports)])
    if amd:
        text += f"\n\n{_AMD}: {len(amd)} kernels compile, {amd.count('mfma')} of them with mfma"
    print(text)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    if args.markdown:
        command = f"python -m plad_fast.kernels.aot --arch {' '.join(map(str, args.arch))}"
        args.markdown.write_text(
            f"# GPU resources of the kernels\n\nMade by `{command}` with Triton "
            f"{triton.__version__}; no GPU was involved.\n\n```\n{text}\n```\n"
        )
    wrong = [(report, problem) for report in reports for problem in report.problems]
    for report, problem in wrong:
        where = f"{report.kernel} {report.dtype} {report.tile} [{report.flags}] on sm_{report.arch}"
        print(f"error: {where} {problem}", file=sys.stderr)
    return 1 if wrong else 0


def summary(reports: Sequence[Report]) -> str:
    """A line for each kernel, dtype and tile: the worst of its combinations of flags."""
    groups: dict[tuple[Any, ...], list[Report]] = collections.defaultdict(list)
    for r in reports:
        key = r.arch, r.kernel.strip("_"), r.dtype, r.tile, r.num_warps, r.num_stages
        groups[key].append(r)
    header = (
        "arch", "kernel", "dtype", "tile", "warps", "stages",
        "flags", "registers", "spills", "shared KiB", "blocks/SM", "multiplies", "loads bits",
    )  # fmt: skip
    rows = [header]
    for key, group in groups.items():
        found = [r.resources for r in group]
        bits = sorted({b for x in found for b in x.load_bits[-1:]})
        rows.append(
            (
                *(str(part) for part in key),
                str(len(group)),
                _span([x.registers for x in found]),
                str(max(x.spill_bytes for x in found)),
                f"{max(x.shared_bytes for x in found) / 1024:.0f}",
                _span([x.blocks_per_sm for x in found]),
                " ".join(sorted({x.tensor_instruction or "fma" for x in found})),
                " ".join("TMA" if b == 0 else str(b) for b in bits),
            )
        )
    return _table(rows)


def predictions(reports: Sequence[Report]) -> str:
    """The forward's predicted time, bound and share of the tensor cores' peak."""
    rows = [("GPU", "model", "D", "V", "tile", "bound", "ms", "share of peak")]
    for arch in dict.fromkeys(r.arch for r in reports):
        gpu = GPUS[arch]
        for name, (width, vocab, capped) in MODELS.items():
            device = launch.Device((arch // 10, arch % 10), gpu.sms)
            loads = "tma" if arch in (90, 100) else "vector"
            tile = launch.linear_config(
                torch.bfloat16, TOKENS, device, loads=loads, lean=not capped
            )
            blocks = _blocks_of(reports, arch, tile, capped)
            p = predict_forward(gpu, tile, blocks, width, vocab, capped)
            rows.append(
                (
                    gpu.name,
                    name,
                    str(width),
                    str(vocab),
                    f"{tile.BLOCK_N}x{tile.BLOCK_V}x{tile.BLOCK_D}",
                    p.bound,
                    f"{p.milliseconds:.2f}",
                    f"{p.share_of_peak:.0%}",
                )
            )
    return f"Predicted, not measured: forward of {TOKENS} tokens, bf16\n" + _table(rows)


def _blocks_of(reports: Sequence[Report], arch: int, tile: LinearConfig, capped: bool) -> int:
    name = f"{tile.BLOCK_N}x{tile.BLOCK_V}x{tile.BLOCK_D}"
    return min(
        (
            r.resources.blocks_per_sm
            for r in reports
            if (r.arch, r.kernel, r.tile) == (arch, "_linear_forward_kernel", name)
            and ("HAS_SOFTCAP" in r.flags) == capped
        ),
        default=1,
    )


def _span(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m plad_fast.kernels.aot", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=GPUS, default=[80, 90, 100])
    parser.add_argument("--json", type=Path, help="write all of it there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--no-amd", dest="amd", action="store_false", help=f"leave out {_AMD}")
    args = parser.parse_args(argv)
    if launch.interpreted():
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    return args


if __name__ == "__main__":
    sys.exit(main())
