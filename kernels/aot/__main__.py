"""Compiles every kernel for GPUs that this machine need not have, and looks at what came out.

    python -m plad_fast.kernels.aot --arch 80 90 100 [--all] [--json PATH] [--markdown PATH]

Every kernel that the calls of `calls` launch. --all compiles each dtype and each size of tile,
heads of even, odd and unaligned sizes, and every combination of options; without it a sample.
Exit status 1 on any spilled register, any block that does not fit a multiprocessor, and any linear
kernel of 16-bit operands without its architecture's tensor core instruction in the inner loop.
--spills BYTES lets a kernel spill that much outside of its inner loop. Nothing is timed; see
`predict`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from plad_fast.kernels.aot import calls as aot_calls
from plad_fast.kernels.aot.resources import (
    GPUS,
    Resources,
    ptxas_log,
    resources_of,
)
from plad_fast.kernels.aot.tables import (
    Report,
    prediction_table,
    predictions,
    resource_table,
    tile_name,
)
from plad_fast.kernels.launch import AotEntry, LinearConfig
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TRITON_LOGS = not triton.__version__.startswith("3.4.")
"""What ptxas says, on demand; in 3.4 the knob for it is not read."""
_TENSOR_CORE = {90: "wgmma", 100: "tcgen05"}  # mma elsewhere


@functools.cache
def entries(arch: int, everything: bool = False, module: str | None = None) -> list[AotEntry]:
    """What is to be compiled for an architecture such as 90 (compute capability 9.0)."""
    capability = (arch // 10, arch % 10)
    if module:
        return list(importlib.import_module(module).aot_entries(capability))
    return aot_calls.entries(capability, everything=everything)


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


def inspect(entry: AotEntry, arch: int, spills: int = 0) -> Report:
    """Compiles an entry and lists what is wrong with it; see `problems_of`."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        # What is in the cache already is not assembled, and then ptxas says nothing.
        triton.knobs.cache.dir = cache
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = compile_entry(entry, GPUTarget("cuda", arch, 32))
    warps = compiled.metadata.num_warps  # with those that only load
    resources = resources_of(
        arch,
        log.getvalue() if _TRITON_LOGS else ptxas_log(compiled.asm["ptx"]),
        compiled.asm["cubin"],
        compiled.metadata.shared,
        compiled.metadata.tmem_size or 0,
        warps,
    )
    return Report(
        arch,
        entry.kernel.fn.__name__,
        entry.dtype,
        tile_name(entry.tile),
        entry.flags,
        warps,
        entry.tile.num_stages,
        resources,
        tuple(problems_of(entry, arch, resources, spills)),
    )


def problems_of(entry: AotEntry, arch: int, resources: Resources, spills: int = 0) -> Iterator[str]:
    """What must not be: each in a sentence.

    Args:
        spills: bytes of registers that may be spilled outside of the inner loop.
    """
    limit = GPUS[arch].shared_per_block
    if resources.code.inner_spills:
        yield f"spills {resources.spill_bytes} bytes of registers, also in its inner loop"
    elif resources.spill_bytes > spills:
        yield f"spills {resources.spill_bytes} bytes of registers"
    if resources.shared_bytes > limit:
        yield f"takes {resources.shared_bytes} bytes of shared memory; a block has {limit}"
    elif not resources.blocks_per_sm:
        yield "does not fit a multiprocessor"
    if isinstance(entry.tile, LinearConfig) and entry.dtype in ("bf16", "fp16"):
        # Tiles of fewer rows take the older instruction.
        wanted = _TENSOR_CORE.get(arch, "mma") if entry.tile.BLOCK_N >= 64 else "mma"
        found = resources.code.tensor_core or "scalar instructions"
        if found != wanted:
            yield f"multiplies 16-bit operands by {found} instead of {wanted}"


def _work(job: tuple[int, bool, str | None, int, int]) -> Report:
    *which, index, spills = job
    return inspect(entries(*which)[index], job[0], spills)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    jobs = [
        (arch, args.all, args.module, index, args.spills)
        for arch in dict.fromkeys(args.arch)
        for index in range(len(entries(arch, args.all, args.module)))
    ]
    reports: list[Report] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for report in pool.map(_work, jobs, chunksize=4):
            reports.append(report)
            if len(reports) % 25 == 0 or len(reports) == len(jobs):
                print(f"compiled {len(reports)} of {len(jobs)}", file=sys.stderr, flush=True)
    predicted = predictions(reports)
    parts = [resource_table(reports)]
    if predicted:
        parts.append(prediction_table(predicted))
    print("\n\n".join(parts))
    command = f"python -m plad_fast.kernels.aot --arch {' '.join(map(str, args.arch))}"
    command += " --all" if args.all else ""
    if args.json:
        found = {
            "command": command,
            "triton": triton.__version__,
            "kernels": [asdict(r) for r in reports],
            "predicted": predicted,
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.markdown:
        text = "\n\n".join(f"```\n{part}\n```" for part in parts)
        args.markdown.write_text(
            f"# GPU resources of the kernels\n\nMade by `{command}` with Triton "
            f"{triton.__version__} on a machine without a GPU. Nothing here was timed.\n\n{text}\n"
        )
    wrong = [(report, problem) for report in reports for problem in report.problems]
    for r, problem in wrong:
        where = f"{r.kernel} {r.dtype} {r.tile} [{r.flags}] on sm_{r.arch}"
        print(f"error: {where} {problem}", file=sys.stderr)
    return 1 if wrong else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m plad_fast.kernels.aot",
        description=(__doc__ or "").partition("\n\n")[0],
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=GPUS, default=[80, 90, 100])
    parser.add_argument("--all", action="store_true", help="every size and combination of options")
    parser.add_argument("--json", type=Path, help="write all of it there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    parser.add_argument(
        "--spills",
        type=int,
        default=0,
        metavar="BYTES",
        help="of registers, which a kernel may spill outside of its inner loop (0)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--module", help="compile what aot_entries of this module gives instead")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET replaces the compiler; unset it")
    return args


if __name__ == "__main__":
    sys.exit(main())
