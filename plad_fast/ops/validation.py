"""Checks at the public boundary of the ops: what was expected, what came, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from plad_fast.checks import check_group_size, check_number, is_whole, shown
from plad_fast.errors import UsageError
from plad_fast.ops.backend import HeadOptions, LinearProblem

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)


def checked_problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor,
    options: HeadOptions,
    *,
    may_lack_rows: bool = False,
) -> LinearProblem:
    """The inputs of an op, as autocast wants them; all but values that `check_sequences` sees."""
    check_are_tensors(hidden=hidden, weight=weight, bias=bias)
    refuse_transforms(hidden, weight, bias)
    hidden, weight, bias = autocast_head(hidden, weight, bias)
    _check_head(hidden, weight, bias, may_lack_rows)
    check_targets(targets, len(hidden), hidden.device)
    check_cu_seqlens(cu_seqlens, len(targets), hidden.device)
    return LinearProblem(hidden, weight, bias, targets.long(), cu_seqlens.long(), options)


def refuse_group(group: Any, instead: str) -> None:
    """A head of which this rank has some rows would give a loss of a smaller vocabulary."""
    if group is not None:
        raise UsageError(
            "group: the rows of this LM head lie on several ranks (tensor parallelism), and this "
            f"op wants all of them here; pass the same arguments to {instead} on every rank"
        )


def autocast_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's inputs in the dtype in which autocast would multiply them; else unchanged."""
    device = hidden.device.type
    # No autocast on "meta"; torch 2.8 cannot trace the question whether a device has it.
    if hidden.is_meta or not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def checked_options(
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    impl: str,
    scratch_bytes: int | None,
) -> HeadOptions:
    """The options of every op, each in its range."""
    for name, number in (
        ("softcap", 1.0 if softcap is None else softcap),
        ("logit_scale", logit_scale),
        ("temperature", temperature),
    ):
        check_number(name, number)
        if not -math.inf < number < math.inf or (number <= 0 and name != "logit_scale"):
            range_ = "finite" if name == "logit_scale" else "positive and finite"
            raise UsageError(f"{name} must be {range_}, got {number}")
    if not is_whole(ignore_index) or not -(2**63) <= ignore_index < 2**63:
        raise UsageError(
            f"ignore_index must be a whole number that int64 holds, got {shown(ignore_index)}"
        )
    check_impl(impl)
    if scratch_bytes is not None and (not is_whole(scratch_bytes) or not 0 < scratch_bytes < 2**63):
        raise UsageError(
            f"scratch_bytes must be a positive whole number of bytes, got {shown(scratch_bytes)}"
        )
    return HeadOptions(
        None if softcap is None else float(softcap),
        float(logit_scale),
        float(temperature),
        int(ignore_index),
        impl,
        0 if scratch_bytes is None else int(scratch_bytes),
    )


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise a UsageError inside of `torch.func` transforms, or for tensors with a tangent."""
    if torch.compiler.is_compiling():
        return
    # torch's own answer, which is no part of its public interface; no where it gives none.
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    if ask is not None and ask():
        raise UsageError(
            "the op does not work inside of torch.func transforms (grad, vmap, jvp, ...); call it "
            "outside, and take gradients with torch.autograd or backward()"
        )
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise UsageError(
                "the op has no forward-mode derivative; take gradients with torch.autograd or "
                "backward()"
            )


def check_impl(impl: str) -> None:
    """What backends there are is known where one is taken."""
    if not isinstance(impl, str):
        raise UsageError(f"impl must be the name of a backend, got {shown(impl)}")


def check_are_tensors(**tensors: Tensor | None) -> None:
    """Before anything is asked of them; None where there may be none."""
    for name, tensor in tensors.items():
        if tensor is not None or name != "bias":
            _require_tensor(name, tensor)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, may_lack_rows: bool) -> None:
    """hidden (N, D), weight (V, D), bias (V,): shapes, one floating dtype, one device."""
    for name, tensor, shape in (("hidden", hidden, "(N, D)"), ("weight", weight, "(V, D)")):
        if tensor.ndim != 2:
            raise UsageError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        _check_tensor(name, tensor, _FLOATING)
    if hidden.shape[1] != weight.shape[1]:
        raise UsageError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must agree in their "
            "last dimension: (N, D) and (V, D)"
        )
    if weight.shape[0] == 0 and not may_lack_rows:
        raise UsageError(
            "weight has no rows: is it a sharded parameter that was not gathered (FSDP, ZeRO-3)?"
        )
    _check_same(hidden, "weight", weight)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise UsageError(
                f"bias must have an entry for each of {len(weight)} rows of weight, got shape "
                f"{tuple(bias.shape)}"
            )
        _check_same(hidden, "bias", bias)


def check_targets(targets: Tensor, num_tokens: int, device: torch.device) -> None:
    """targets (N,) integers on the device of the logits."""
    _check_tensor("targets", targets, _INTEGERS, (num_tokens,), device)


def check_logits(logits: Tensor, targets: Tensor, has_seqlens: bool) -> None:
    """logits (N, V) with cu_seqlens, or (S, T, V) without; targets of the same leading shape."""
    if logits.ndim != (2 if has_seqlens else 3):
        raise UsageError(
            "logits must have shape (N, V) with cu_seqlens, or (S, T, V) without; got "
            f"{tuple(logits.shape)}"
        )
    _check_tensor("logits", logits, _FLOATING)
    _check_tensor("targets", targets, _INTEGERS, logits.shape[:-1], logits.device)
    if logits.shape[-1] == 0:
        raise UsageError("logits have a vocabulary of 0 entries")


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> None:
    """cu_seqlens (S + 1,) integers on the CPU, or on the device of the logits.

    Values that would be sent to another device are looked at before.
    """
    _check_tensor("cu_seqlens", cu_seqlens, _INTEGERS)
    if cu_seqlens.device.type != "cpu":
        _check_tensor("cu_seqlens", cu_seqlens, _INTEGERS, None, device)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise UsageError(
            f"cu_seqlens must be a vector of S + 1 integers, got shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device and not torch.compiler.is_compiling():
        _check_offsets(cu_seqlens, num_tokens)


def _check_offsets(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Values that the host has: they start at 0, never fall and end at N."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise UsageError(
            f"cu_seqlens must start at 0, never fall and end at the number of tokens "
            f"({num_tokens}); got "
            f"{bounds if len(bounds) < 12 else f'{bounds[:5]}...{bounds[-3:]}'}"
        )


def check_sequences(
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    vocab: int,
    ignore_index: int,
) -> None:
    """Values: cu_seqlens starts at 0, never falls and ends at N; targets lie in the vocabulary.

    Of CUDA tensors this is a device-side assertion, as in PyTorch's own losses: nothing waits for
    the device.
    """
    ignored = targets == ignore_index
    in_range = ignored | ((targets >= 0) & (targets < vocab))
    if cu_seqlens.is_cuda:
        ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == len(targets))
        torch._assert_async(
            ends & (cu_seqlens.diff() >= 0).all(),
            "cu_seqlens must start at 0, never fall and end at N",
        )
    else:
        _check_offsets(cu_seqlens, len(targets))
    if targets.is_cuda:
        torch._assert_async(in_range.all(), f"targets must lie in [0, {vocab}) or be ignored")
    elif not in_range.all():
        low, high = (int(x) for x in torch.aminmax(targets[~ignored]))
        raise UsageError(
            f"targets must lie in [0, {vocab}) or equal ignore_index; they span {low} to {high}"
        )


def check_constants(shape: Sequence[int], device: torch.device, **constants: Tensor | None) -> None:
    """A number of every sequence, such as (S,). Finite is not asked for: a score may be -inf."""
    for name, values in constants.items():
        if values is not None:
            _check_tensor(name, values, None, shape, device)


def check_are_detached(**constants: Tensor | None) -> None:
    for name, values in constants.items():
        if values is not None and values.requires_grad:
            raise UsageError(f"{name} are constants of the loss; detach them")


def check_denominators(**counts: float | Tensor | None) -> None:
    for name, count in counts.items():
        _check_denominator(name, count)


def _check_denominator(name: str, count: float | Tensor | None) -> None:
    """None, or a number that is not negative; the value of a scalar on a GPU is not read."""
    if count is None:
        return
    if isinstance(count, Tensor):
        _check_tensor(name, count, None, ())
        if torch.compiler.is_compiling() or count.device.type != "cpu":
            return
        count = count.item()
    check_number(name, count)
    if not 0 <= count < math.inf:
        raise UsageError(f"{name} must not be negative or infinite, got {count}")


def check_groups(num_sequences: int, group_size: int) -> None:
    """Whole groups; to be asked before anything is as large as a group."""
    check_group_size(group_size)
    if num_sequences % group_size:
        raise UsageError(
            f"{num_sequences} sequences do not form groups of {group_size}; sequences of a group "
            "lie next to each other, best first"
        )


def check_sums(sums: Tensor, counts: Tensor) -> None:
    """sums (S,) or (B, K), floating; counts of the same shape."""
    _check_tensor("sums", sums, _FLOATING)
    if sums.ndim not in (1, 2):
        raise UsageError(f"sums must have shape (S,) or (B, K), got {tuple(sums.shape)}")
    _check_tensor("counts", counts, None, sums.shape, sums.device)


def _require_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{name} must be a tensor, got {shown(tensor)}")
    if tensor.layout != torch.strided:
        raise UsageError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype] | None,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> None:
    """A tensor of one of these dtypes, of any real one for None, and of that shape and device."""
    _require_tensor(name, tensor)
    if shape is not None and tensor.shape != tuple(shape):
        raise UsageError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if dtypes is None and (tensor.is_complex() or tensor.dtype == torch.bool):
        raise UsageError(f"{name} must hold real numbers, got {tensor.dtype}")
    if dtypes is not None and tensor.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UsageError(f"{name} must be one of {known}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise UsageError(f"{name} must be on {device} as the others are, got {tensor.device}")


def _check_same(hidden: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
        raise UsageError(
            f"hidden is {hidden.dtype} on {hidden.device}, {name} is {tensor.dtype} on "
            f"{tensor.device}; they must be alike (run under torch.autocast to have them cast)"
        )
