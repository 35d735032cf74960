"""Calls of users, as kernels to compile: the launchers run on tensors without memory, and their
launches are recorded. `aot` therefore compiles what runs, with the same constants and the same
knowledge of what is divisible by 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from plad_fast.kernels import launch
from plad_fast.kernels.exponential_rows import exponential_rows, move_rows_, scale_rows
from plad_fast.kernels.launch import (
    AotEntry,
    Device,
    LinearConfig,
    RowsConfig,
    SegmentsConfig,
)
from plad_fast.kernels.linear_backward import logits_gradient
from plad_fast.kernels.linear_forward import launch_linear_forward
from plad_fast.kernels.logits_rows import logits_rows_backward, logits_rows_forward
from plad_fast.kernels.segments import expand_segments, segment_sums
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_TOKENS = (16, 32, 64, 2048)
"""One number of each size that `launch.linear_config` tells apart."""
_HEADS = ((2048, 128_256), (768, 50_257), (1001, 4099))
"""D and V: Llama-3.2-1B; GPT-2, whose vocabulary is odd; and rows that are not aligned."""
_HEAD_WITH_A_TAIL = (896, 151_936)
"""Qwen2.5-0.5B, whose vocabulary is no multiple of the widest tile."""


@dataclass(frozen=True)
class Case:
    """Options of a call; `rest` stands for entropy and row orders."""

    bias: bool = False
    softcap: bool = False
    rest: bool = False


_EVERY_CASE = tuple(Case(*x) for x in itertools.product((False, True), repeat=3))
_REACHED_CASES = (Case(), Case(softcap=True), Case(bias=True, softcap=True, rest=True))
"""Most heads, Gemma 2's, and all that there is."""


class Call(NamedTuple):
    dtype: torch.dtype
    head: tuple[int, int]
    case: Case
    tokens: tuple[int, ...]
    entropy_orders: tuple[int, ...] = (1,)
    """Of a case with the rest; order 2 takes about what order 1 does."""


def _calls(everything: bool) -> Iterator[Call]:
    """A sample: bfloat16 operands and an even head with all sizes of tile and all options; other
    heads and dtypes with many tokens. Options take registers: where they do not choose another
    tile, as they do for 64 tokens and for many, all of them are the case to try. float16 compiles
    to what bfloat16 does but for its scale and the type in the instructions.
    """
    dtypes = [dtype for dtype in _TYPES if dtype.is_floating_point]
    plain, _, full = _REACHED_CASES
    if everything:
        for dtype, head in itertools.product(dtypes, (*_HEADS, _HEAD_WITH_A_TAIL)):
            for case in _EVERY_CASE if head in _HEADS else _REACHED_CASES:
                yield Call(dtype, head, case, _TOKENS, (1, 2) if head == _HEADS[0] else (1,))
        return
    most = _TOKENS[-1:]
    for case, tokens in ((plain, _TOKENS[-2:]), (full, _TOKENS)):
        yield Call(torch.bfloat16, _HEADS[0], case, tokens)
    for dtype, head in zip((torch.bfloat16, torch.float32), _HEADS[1:], strict=True):
        yield Call(dtype, head, full, most, (2,))
    yield Call(torch.bfloat16, _HEAD_WITH_A_TAIL, plain, most)
    for dtype in (torch.float32, torch.float16):
        yield Call(dtype, _HEADS[0], full, most)


def entries(capability: tuple[int, int], *, everything: bool = False) -> list[AotEntry]:
    """Every kernel that these calls launch on a GPU, once each."""
    device, found = Device(capability, 100), {}

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        entry = _entry(self, {**dict(zip(self.arg_names, args, strict=False)), **named})
        found[str(entry)] = entry

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launch, "device_of", return_value=device),
    ):
        for call in _calls(everything):
            _call(call)
        before = torch.get_float32_matmul_precision()
        tokens = _TOKENS if everything else _TOKENS[-1:]
        try:
            # Of the two "high", which is three products of "medium", takes more.
            for precision in ("high", "medium") if everything else ("high",):
                torch.set_float32_matmul_precision(precision)
                _call_linear(Call(torch.float32, _HEADS[0], Case(), tokens))
        finally:
            torch.set_float32_matmul_precision(before)
    return list(found.values())


def _call(call: Call) -> None:
    dtype, head, case, *_ = call
    _call_linear(call)
    # One pass: float32 logits in wider rows, which take the operand of the next product as well.
    row_width = -(-head[1] // 64) * 64
    _call_rows(call, torch.float32, row_width)
    if dtype == torch.bfloat16 and (head == _HEADS[0] or not case.rest):
        _call_exponentials(head, case, row_width)
    if not case.bias:
        # Logits that the user holds.
        _call_rows(call, dtype)
    bounds = _empty(3, dtype=torch.int64)
    segment_sums(_empty(5), bounds)
    expand_segments(_empty(2), bounds, 0, 5)


def _call_linear(call: Call) -> None:
    """As the heuristic chooses, and with specialised warps where `kernels.autotune` offers them."""
    dtype, (width, vocab), case, sizes, _ = call
    for n in sizes:
        hidden, weight = _empty(n, width, dtype=dtype), _empty(vocab, width, dtype=dtype)
        bias = _empty(vocab, dtype=dtype) if case.bias else None
        targets, tokens = _empty(n, dtype=torch.int64), _empty(n)
        device, options = launch.device_of(hidden), _options(case)
        candidates = launch.linear_candidates(
            dtype,
            n,
            device,
            loads=launch.load_kind(device, hidden, weight),
            lean=launch.is_lean(bias, options["softcap"], vocab),
        )
        for config in (None, *(c for c in candidates if c.WARP_SPECIALIZE)):
            for entropy_order in _orders(call):
                launch_linear_forward(
                    *(hidden, weight, bias, targets),
                    **options,
                    entropy_order=entropy_order,
                    config=config,
                )
            logits_gradient(
                *(hidden, weight, bias, targets, tokens, tokens, tokens, tokens),
                tokens if case.rest else None,
                **options,
                out=_empty(n, vocab, dtype=dtype),
                scale=_scale(dtype),
                config=config,
            )


def _orders(call: Call) -> tuple[int, ...]:
    return call.entropy_orders if call.case.rest else (0,)


def _call_rows(call: Call, dtype: torch.dtype, row_width: int | None = None) -> None:
    """On logits in `dtype`, with a gradient in the call's."""
    out_dtype, (_, vocab), case, *_ = call
    n = _TOKENS[-1]
    memory, targets, tokens = (
        _empty(n, row_width or vocab, dtype=dtype),
        _empty(n, dtype=torch.int64),
        _empty(n),
    )
    logits = memory[:, :vocab]
    bias = _empty(vocab, dtype=out_dtype) if case.bias else None
    options: dict[str, Any] = {"bias": bias, "row_width": row_width, **_options(case)}
    for entropy_order in _orders(call):
        logits_rows_forward(logits, targets, **options, entropy_order=entropy_order)
    logits_rows_backward(
        logits,
        targets,
        *(tokens, tokens, tokens, tokens),
        tokens if case.rest else None,
        **options,
        out=memory.view(out_dtype)[:, :vocab],
        rows=_empty(n, dtype=torch.int64) if case.rest else None,
        scale=_scale(out_dtype) if dtype == torch.float32 else None,
    )


def _call_exponentials(head: tuple[int, int], case: Case, row_width: int) -> None:
    n, (width, vocab) = _TOKENS[-1], head
    memory, targets = _empty(n, row_width), _empty(n, dtype=torch.int64)
    values = memory.view(torch.bfloat16)[:, :vocab]
    bias = _empty(vocab, dtype=torch.bfloat16) if case.bias else None
    exponential_rows(
        memory[:, :vocab], targets, bias=bias, out=values, row_width=row_width, **_options(case)
    )
    move_rows_(values, targets, targets)
    hidden = _empty(n, width, dtype=torch.bfloat16)
    of_hidden, of_weight = (_empty(n, width), hidden), (hidden, hidden)
    for rows in (None, targets):
        scale_rows(_empty(n), _empty(n), of_hidden, of_weight, rows=rows)
        scale_rows(_empty(n), _empty(n), of_hidden, rows=rows)
    scale_rows(_empty(n), _empty(n), of_weight)


def _options(case: Case) -> dict[str, Any]:
    softcap = 30.0 if case.softcap else None
    return {"softcap": softcap, "logit_scale": 1.0, "temperature": 0.7, "ignore_index": -100}


def _scale(dtype: torch.dtype) -> Tensor | None:
    return _empty(1)[0] if dtype == torch.float16 else None


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _entry(kernel: JITFunction, values: dict[str, Any]) -> AotEntry:
    """A launch as a compiler sees it: Triton's own rules for what of an argument matters."""
    constants, types, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        plain = parameter.do_not_specialize
        one = isinstance(value, int) and value == 1 and not plain
        if parameter.is_constexpr or value is None or one:
            constants[name] = value
        elif isinstance(value, TensorDescriptor):
            blocks = ", ".join(map(str, value.block_shape))
            types[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{blocks}]>"
        elif isinstance(value, Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                aligned.append(name)
        else:
            types[name] = "fp32"
    operand = next(iter(types.values()))
    dtype = next(x for x in _TYPES.values() if x in operand)
    return AotEntry(kernel, dtype, _tile(values), constants, types, tuple(aligned))


def _tile(values: dict[str, Any]) -> LinearConfig | RowsConfig | SegmentsConfig:
    blocks = [values[k] for k in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if k in values]
    rest = values["num_warps"], values["num_stages"]
    if len(blocks) == 3:
        return LinearConfig(*blocks, *rest, values["WARP_SPECIALIZE"])
    return (RowsConfig if "BLOCK_V" in values else SegmentsConfig)(*blocks, *rest)
