"""Measured launch configurations, for those who ask for them with PLAD_FAST_AUTOTUNE=1.

`tuned` times the candidates once for each kernel, device and size, and keeps the winner in a file
of its own under $PLAD_FAST_CACHE, or ~/.cache/plad_fast. A file is written whole and then renamed,
and concerns one key: processes that tune at the same time disturb one another in nothing.

A configuration decides the order of a sum, so two machines that measure differently may differ in
the last bits; from then on each of them repeats itself. Processes that must agree to the bit share
a cache that is filled before they start. Launchers ask `wanted` first: without the variable they
call nothing else here, and take what `kernels.launch` chooses.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from plad_fast.kernels import launch
from plad_fast.kernels.launch import LinearConfig, RowsConfig, SegmentsConfig
from torch import Tensor

Config = TypeVar("Config", bound=LinearConfig | RowsConfig | SegmentsConfig)

# What has been looked up or measured in this process.
_chosen: dict[tuple[Path, str, str], Any] = {}


def wanted(tensor: Tensor) -> bool:
    """Whether launches on this tensor's device are to be tuned: not while a graph is captured."""
    if os.environ.get("PLAD_FAST_AUTOTUNE") != "1" or not tensor.is_cuda:
        return False
    return not torch.cuda.is_current_stream_capturing()


def key_of(tensor: Tensor, **sizes: int) -> str:
    """What a measurement holds for: device, dtype, Triton, and sizes up to the next power of two.

    A name such as D16=1 may also say what a launcher tells apart, like rows of whole vectors.
    """
    device = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else str(tensor.device)
    parts = [device, str(tensor.dtype).removeprefix("torch."), f"triton {triton.__version__}"]
    parts += [f"{name}<={_bucket(size)}" for name, size in sorted(sizes.items())]
    return ", ".join(parts)


def _bucket(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length() if size else 0


def tuned(
    kernel_name: str,
    key: str,  # of `key_of`
    candidates: Sequence[Config],
    bench: Callable[[Config], float],
) -> Config:
    """The fastest candidate: as found earlier, in this process or another, or as measured now.

    `bench` returns a time in any unit. A candidate that cannot be built or launched is out of the
    race, whatever part of Triton, LLVM, ptxas or the driver refuses it; of equals the first one
    wins. Raises what the last of them raised where none can, or the device's own error where a
    candidate has left it unusable.
    """
    assert candidates
    if len(candidates) == 1:
        return candidates[0]
    folder = cache_folder()
    place = folder, kernel_name, key
    known: Config | None = _chosen.get(place)
    if known is not None and known in candidates:
        return known
    path = folder / _file_name(kernel_name, key)
    config = _read(path, kernel_name, key, candidates)
    if config is None:
        config, time = _fastest(candidates, bench)
        _write(path, {"kernel": kernel_name, "key": key, "config": asdict(config), "time": time})
    _chosen[place] = config
    return config


def linear_config(
    launcher: Callable[..., Any],
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    *arguments: Any,
    **options: Any,
) -> LinearConfig:
    """For these arguments of a launcher on `logits_tile`, of one token or more: the fastest of
    `launch.linear_candidates`.
    """
    (num_tokens, width), vocab = hidden.shape, len(weight)
    device = launch.device_of(hidden)
    loads = launch.load_kind(device, hidden, weight)
    lean = launch.is_lean(bias, options["softcap"], vocab)
    candidates = launch.linear_candidates(hidden.dtype, num_tokens, device, loads=loads, lean=lean)
    # What the launcher tells apart has the heuristic's choice in common: the first candidate.
    order = options.get("entropy_order", 0)
    flags = f"{launch.dot_precision(hidden.dtype)} entropy_order={order}"
    key = f"{key_of(hidden, N=num_tokens, D=width, V=vocab)}, {candidates[0]}, {flags}"

    def bench(config: LinearConfig) -> float:
        return triton.testing.do_bench(
            lambda: launcher(hidden, weight, bias, *arguments, **options, config=config)
        )

    return tuned(launcher.__name__, key, candidates, bench)


def cache_folder() -> Path:
    root = os.environ.get("PLAD_FAST_CACHE") or os.path.expanduser("~/.cache/plad_fast")
    return Path(root) / "autotune"


def _file_name(kernel_name: str, key: str) -> str:
    digest = hashlib.sha256(f"{kernel_name}\n{key}".encode()).hexdigest()[:16]
    return f"{kernel_name.strip('_')}-{digest}.json"


def _fastest(
    candidates: Sequence[Config], bench: Callable[[Config], float]
) -> tuple[Config, float]:
    best: Config | None = None
    best_time = math.inf
    failure: Exception | None = None
    for candidate in candidates:
        try:
            time = bench(candidate)
        except Exception as error:  # they have no class in common
            failure = error
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            continue
        if time < best_time:
            best, best_time = candidate, time
    if best is None:
        raise failure or ValueError(f"none of {len(candidates)} candidates has a finite time")
    return best, best_time


def _read(path: Path, kernel_name: str, key: str, candidates: Sequence[Config]) -> Config | None:
    """What the file says, if it is one of the candidates; None where there is no such file."""
    try:
        record = json.loads(path.read_bytes())
        if (record["kernel"], record["key"]) != (kernel_name, key):
            return None
        config = record["config"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        warnings.warn(f"cannot use {path}, measuring anew: {error!r}", stacklevel=3)
        return None
    # A file of an earlier version may hold a configuration that is offered no more.
    return next((c for c in candidates if asdict(c) == config), None)


def _write(path: Path, record: dict[str, Any]) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=path.stem, dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(f"the choice for {path.name} is not kept: {error}", stacklevel=3)
