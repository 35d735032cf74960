"""Tables of the findings of `aot` and the predictions made from them."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from plad_fast.kernels import launch
from plad_fast.kernels.aot.predict import MODELS, TOKENS, predict_linear, predict_rows
from plad_fast.kernels.aot.resources import GPUS, Resources
from plad_fast.kernels.launch import LinearConfig, RowsConfig


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture."""

    arch: int
    kernel: str
    dtype: str
    tile: str
    flags: str
    warps: int
    stages: int
    resources: Resources
    problems: tuple[str, ...]


def resource_table(reports: Sequence[Report]) -> str:
    """A line for each kernel, dtype and tile: the span of its combinations of flags."""
    groups: dict[tuple[Any, ...], list[Report]] = collections.defaultdict(list)
    for r in reports:
        key = r.arch, r.kernel.strip("_"), r.dtype, r.tile, r.warps, r.stages
        groups[key].append(r)
    header = (
        "arch", "kernel", "dtype", "tile", "warps", "stages", "variants", "registers",
        "spilled", "shared KiB", "blocks/SM", "multiplies by", "loads, bits",
    )  # fmt: skip
    rows: list[Sequence[str]] = [header]
    for key, group in groups.items():
        found = [r.resources for r in group]
        linear = key[1].startswith("linear") or "gradient" in key[1]
        units = sorted({x.code.tensor_core or "fma" for x in found}) if linear else ["-"]
        rows.append(
            (
                *(str(part) for part in key),
                str(len(group)),
                _span([x.registers for x in found]),
                str(max(x.spill_bytes for x in found)),
                f"{max(x.shared_bytes for x in found) / 1024:.1f}",
                _span([x.blocks_per_sm for x in found]),
                " ".join(units),
                " ".join(sorted({"+".join(x.code.loads) for x in found}, key=lambda s: s.zfill(9))),
            )
        )
    return _table(rows)


def predictions(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """What `predict` makes of the compiled kernels, for models that people have."""
    found = []
    for arch in dict.fromkeys(r.arch for r in reports):
        gpu = GPUS[arch]
        device = launch.Device((arch // 10, arch % 10), gpu.sms)
        for name, (width, vocab, capped) in MODELS.items():
            loads = "tma" if arch in (90, 100) else "vector"
            tile = launch.linear_config(
                torch.bfloat16, TOKENS, device, loads=loads, lean=not capped
            )
            rows = launch.rows_config(vocab)
            for kernel, config, dtype in (
                ("_linear_forward_kernel", tile, "bf16"),
                ("_logits_gradient_kernel", tile, "bf16"),
                ("_logits_rows_forward_kernel", rows, "fp32"),
                ("_logits_rows_backward_kernel", rows, "fp32"),
                ("_exponential_rows_kernel", rows, "fp32"),
            ):
                resources = _plainest(reports, arch, kernel, dtype, config, capped)
                if resources is None:
                    continue
                if isinstance(config, LinearConfig):
                    backward = kernel == "_logits_gradient_kernel"
                    p = predict_linear(gpu, config, resources, width, vocab, backward=backward)
                else:
                    moved = 4 if kernel == "_logits_rows_forward_kernel" else 6
                    p = predict_rows(gpu, config, resources, vocab, bytes_per_logit=moved)
                found.append(
                    {
                        "gpu": gpu.name,
                        "model": name,
                        "width": width,
                        "vocab": vocab,
                        "kernel": kernel.strip("_").removesuffix("_kernel"),
                        "tile": tile_name(config),
                        **asdict(p),
                    }
                )
    return found


def prediction_table(predicted: Sequence[Mapping[str, Any]]) -> str:
    """A line for each kernel and model, a column for each GPU."""
    gpus = list(dict.fromkeys(p["gpu"] for p in predicted))
    cells: dict[tuple[str, ...], dict[str, str]] = collections.defaultdict(dict)
    for p in sorted(predicted, key=lambda p: p["kernel"]):
        line = p["kernel"], p["model"], str(p["width"]), str(p["vocab"])
        cells[line][p["gpu"]] = f"{p['milliseconds']:.2f} ms {p['share_of_peak']:.0%} {p['bound']}"
    header = ("kernel", "model", "D", "V", *gpus)
    rows = [header, *((*line, *(cell.get(g, "") for g in gpus)) for line, cell in cells.items())]
    return (
        f"Predicted by counting, not measured: {TOKENS} tokens, 16-bit operands. Time, share of\n"
        "the tensor cores' peak (rows: of HBM's bandwidth), and the unit that limits it.\n"
        + _table(rows)
    )


def _plainest(
    reports: Sequence[Report],
    arch: int,
    kernel: str,
    dtype: str,
    tile: LinearConfig | RowsConfig,
    capped: bool,
) -> Resources | None:
    """Of a kernel's variants with or without a softcap that with the fewest other options."""
    wanted = (arch, kernel, dtype, tile_name(tile))
    fitting = [
        r
        for r in reports
        if (r.arch, r.kernel, r.dtype, r.tile) == wanted
        and ("HAS_SOFTCAP" in r.flags) == capped
        and ("USE_TMA" in r.flags) == (dtype == "bf16" and arch in (90, 100))
    ]

    def options(report: Report) -> tuple[int, int]:
        flags = report.flags.split()
        return sum(f.startswith(("HAS", "WITH", "ENTROPY")) for f in flags), -len(flags)

    return min(fitting, key=options).resources if fitting else None


def _span(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def tile_name(tile: Any) -> str:
    return "x".join(str(v) for k, v in vars(tile).items() if k.startswith("BLOCK"))
