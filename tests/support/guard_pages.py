"""Tensors beside memory that nobody may touch, and every kernel run on them.

Triton's interpreter dereferences the very addresses that a kernel computes. `guarded` puts the last
byte of a tensor, or its first, next to a page without permissions, so that an access past it ends
the process with SIGSEGV instead of reading a neighbour's numbers.

As a program (`python guard_pages.py`, with TRITON_INTERPRET=1) it runs each kernel's cases in a
process of their own, and each kernel once more for every mask and every clamped index in its
source, with that one left out: those must die. Standard output has a line of JSON for each process.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib
import importlib.util
import itertools
import json
import mmap
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

EDGES = ("end", "start")
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(tensor: Tensor, edge: str) -> Tensor:
    """The same numbers at the same strides, on pages between two that are forbidden.

    The tensor's last byte ("end") or first byte ("start") touches one of the two; what is left of
    its own pages, and what its strides leave out, is full of NaN. Of no entries, its address is
    the forbidden page's.
    """
    extent = tensor.numel() and 1 + sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )
    held = max(extent, 1)
    size = held * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    region = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    region.write(b"\xff" * len(region))
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for page in (0, pages + 1):
        if _libc.mprotect(address + page * mmap.PAGESIZE, mmap.PAGESIZE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    first = mmap.PAGESIZE
    if edge == "end" or not extent:
        first += pages * mmap.PAGESIZE - size
    storage = torch.frombuffer(region, dtype=tensor.dtype, count=held, offset=first)
    offset = 0 if extent else 1
    view = storage.as_strided(tensor.shape, tensor.stride(), offset)
    return view.copy_(tensor)


class Guard:
    """Makes the tensors of a case; all of them, and all that a launcher allocates, are guarded."""

    def __init__(self, edge: str) -> None:
        self.edge = edge
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, flip: bool = False) -> Tensor:
        """flip: the last two dimensions lie in memory the other way round."""
        values = torch.randn(*shape, generator=self._generator).to(dtype)
        return self.keep(values.mT.contiguous().mT if flip else values)

    def targets(self, *shape: int, vocab: int) -> Tensor:
        """The last one is the vocabulary's last entry, and every fifth is ignored."""
        values = torch.randint(vocab, shape, generator=self._generator)
        values.view(-1)[::5] = -100
        values.view(-1)[-1:] = vocab - 1
        return self.keep(values)

    def keep(self, tensor: Tensor) -> Tensor:
        return guarded(tensor, self.edge)

    @contextlib.contextmanager
    def allocations(self) -> Iterator[None]:
        empty = torch.empty
        with mock.patch.object(torch, "empty", lambda *a, **k: self.keep(empty(*a, **k))):
            yield


def kernels(name: str) -> ModuleType:
    """A module of kernels; a planted one, where there is one."""
    return importlib.import_module(f"plad_fast.kernels.{name}")


Case = tuple[str, Callable[[], None]]
_LAYOUTS = ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
"""A dtype, and whether the last two dimensions lie in memory the other way round."""
_NO_SCALING = {"logit_scale": 1.0, "temperature": 1.0, "ignore_index": -100}


def linear_cases(guard: Guard) -> Iterator[Case]:
    """Sizes about the blocks of 16, and rows that tensor descriptors and vectors can read."""
    shapes = [(17, 37, 7), (1, 1, 1), (33, 17, 33), (16, 15, 16), (5, 48, 24), (31, 33, 16)]
    for (n, v, d), (dtype, flip) in itertools.product(shapes, _LAYOUTS):
        label = f"N={n} V={v} D={d} {dtype} {'transposed' if flip else ''}"
        yield label, partial(_linear, guard, n, v, d, dtype, flip)
    yield "N=0", partial(_linear, guard, 0, 5, 3, torch.float32, False)


def _linear(guard: Guard, n: int, v: int, d: int, dtype: torch.dtype, flip: bool) -> None:
    forward, backward = kernels("linear_forward"), kernels("linear_backward")
    launch = kernels("launch")
    config = launch.LinearConfig(16, 16, 16, num_warps=4, num_stages=2)
    hidden = guard.normal(n, d, dtype=dtype, flip=flip)
    weight = guard.normal(v, d, dtype=dtype, flip=flip)
    bias = guard.normal(v, dtype=dtype)
    targets = guard.targets(n, vocab=v)
    operands = hidden, weight, bias, targets
    for splits, entropy_order in ((1, 1), (-(-v // 16), 2)):
        with mock.patch.object(launch, "vocab_splits", lambda *_, splits=splits: splits):
            ours = forward.launch_linear_forward(
                *operands,
                softcap=3.0 if flip else None,
                **_NO_SCALING,
                entropy_order=entropy_order,
                config=config,
            )
    backward.logits_gradient(
        *operands,
        *(ours.lse, ours.tail, ours.miss, guard.normal(n), guard.normal(n)),
        softcap=3.0 if flip else None,
        **_NO_SCALING,
        out=guard.normal(n, v, dtype=dtype),
        scale=guard.keep(torch.tensor(2.0)),
        config=config,
    )


def rows_cases(guard: Guard) -> Iterator[Case]:
    """A block and one entry less or more, of two and three dimensions; in place and elsewhere."""
    shapes = [(3, 37), (1, 1), (2, 16), (5, 15), (2, 3, 17), (0, 9), (1, 4, 33)]
    for shape, (dtype, flip) in itertools.product(shapes, _LAYOUTS):
        label = f"{shape} {dtype} {'transposed' if flip else ''}"
        yield label, partial(_rows, guard, shape, dtype, flip)


def _rows(guard: Guard, shape: tuple[int, ...], dtype: torch.dtype, flip: bool) -> None:
    rows, launch = kernels("logits_rows"), kernels("launch")
    *lead, vocab = shape
    logits = guard.normal(*shape, dtype=dtype, flip=flip)
    targets = guard.targets(*lead, vocab=vocab)
    options = {
        "bias": guard.normal(vocab, dtype=dtype),
        "softcap": 3.0 if flip else None,
        **_NO_SCALING,
        "config": launch.RowsConfig(16, num_warps=4),
    }
    ours = rows.logits_rows_forward(logits, targets, entropy_order=1, **options)
    given = (targets, *ours[1:4], guard.normal(*lead), guard.normal(*lead))
    scale = guard.keep(torch.tensor(2.0))
    if len(shape) == 2:
        order = guard.keep(torch.arange(shape[0])[-1:])
        out = guard.normal(len(order), vocab, dtype=dtype)
        rows.logits_rows_backward(logits, *given, out=out, rows=order, scale=scale, **options)
    rows.logits_rows_backward(logits, *given, out=guard.normal(*shape), **options)
    rows.logits_rows_backward(logits, *given, out=logits, **options)
    if dtype == torch.float32 and not flip:
        for width in (vocab, -(-vocab // 8) * 8):
            memory = guard.normal(*lead, width)
            raw, out = memory[..., :vocab], memory.view(torch.bfloat16)[..., :vocab]
            rows.logits_rows_forward(raw, targets, entropy_order=1, row_width=width, **options)
            rows.logits_rows_backward(raw, *given, out=out, row_width=width, **options)


def exponentials_cases(guard: Guard) -> Iterator[Case]:
    """A block and one entry less or more, the last target ignored or not."""
    for (n, vocab), ignored in itertools.product(((3, 37), (1, 1), (2, 16), (0, 9)), (True, False)):
        yield f"{n} {vocab} {ignored}", partial(_exponentials, guard, n, vocab, ignored)


def _exponentials(guard: Guard, n: int, vocab: int, ignored: bool) -> None:
    rows, launch = kernels("exponential_rows"), kernels("launch")
    config = launch.RowsConfig(16, num_warps=4)
    targets = guard.targets(n, vocab=vocab)
    targets[-1:] = -100 if ignored else 0
    out = guard.normal(n, vocab, dtype=torch.bfloat16)
    bias = guard.normal(vocab, dtype=torch.bfloat16)
    options = {"softcap": 3.0, **_NO_SCALING, "row_width": vocab, "config": config}
    rows.exponential_rows(guard.normal(n, vocab), targets, bias=bias, out=out, **options)
    ends = guard.keep(torch.arange(n)[:1]), guard.keep(torch.arange(n)[-1:])
    for sources, places in (ends, ends[::-1]):
        rows.move_rows_(out, sources, places, config)
    factors = guard.normal(n), guard.normal(n)
    matrices = (guard.normal(n, vocab), out), (out, guard.normal(n, vocab, dtype=torch.bfloat16))
    rows.scale_rows(*factors, *matrices, config=config)
    order = guard.keep(torch.arange(n).flip(0))
    rows.scale_rows(*factors, matrices[0], rows=order, config=config)


def segments_cases(guard: Guard) -> Iterator[Case]:
    for lengths in ([17], [1], [16, 0, 5], [0, 0], []):
        yield str(lengths), partial(_segments, guard, lengths)


def _segments(guard: Guard, lengths: list[int]) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    config = kernels("launch").SegmentsConfig(16)
    segments, kept = kernels("segments"), guard.keep(bounds)
    segments.segment_sums(guard.normal(sum(lengths)), kept, config=config)
    origin, later = 2**40, guard.keep(bounds + 2**40)
    segments.segment_sums(guard.normal(sum(lengths)), later, origin, config)
    segments.expand_segments(guard.normal(len(lengths)), later, origin, sum(lengths), config)


CASES = {
    "linear": linear_cases,
    "rows": rows_cases,
    "exponentials": exponentials_cases,
    "segments": segments_cases,
}
FAMILIES = {
    "linear_forward": "linear",
    "linear_backward": "linear",
    "logits_rows": "rows",
    "exponential_rows": "exponentials",
    "segments": "segments",
}


# The parts of a split lie one after another in one allocation: what is written past the first two
# lands in the next, which the numbers in test_linear show.
_INSIDE_THEIR_ALLOCATION = ("tl.store(max_ptr + out,", "tl.store(rest_ptr + out,")


def safeguards(name: str) -> tuple[ast.Module, list[ast.Call]]:
    """A module of kernels, and in it what keeps addresses in bounds: loads and stores that have a
    mask, and indices clamped to the last, `tl.minimum(index, size - 1)`.
    """
    spec = importlib.util.find_spec(f"plad_fast.kernels.{name}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [c for c in calls if any(k.arg == "mask" for k in c.keywords) or _is_clamp(c)]
    return tree, [c for c in calls if not ast.unparse(c).startswith(_INSIDE_THEIR_ALLOCATION)]


def _is_clamp(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "tl.minimum" and ast.unparse(call.args[1]).endswith(" - 1")


def plant(name: str, index: int, folder: str) -> str:
    """Put in place of a module one that lacks its safeguard number `index`; returns that one."""
    tree, calls = safeguards(name)
    call = calls[index]
    was = f"{name}.py:{call.lineno} {ast.unparse(call)}"
    if _is_clamp(call):
        call.args[1] = call.args[0]
    call.keywords = [k for k in call.keywords if k.arg not in ("mask", "other")]
    path = Path(folder) / f"{name}.py"
    path.write_text(ast.unparse(tree))  # the interpreter reads a kernel's source from its file
    spec = importlib.util.spec_from_file_location(f"plad_fast.kernels.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return was


Tell = Callable[[str], None]


def run_apart(work: Callable[[Tell], None]) -> dict[str, Any]:
    """Run it in a forked process: its exit code, negative for a signal, and all that it told."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(partial(_tell, writer))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    return {"exit": os.waitstatus_to_exitcode(status), "told": told}


def _tell(pipe: int, text: str) -> None:
    os.write(pipe, f"{text}\n".encode())


def run_cases(family: str, edge: str, tell: Tell) -> None:
    guard = Guard(edge)
    with guard.allocations():
        for label, case in CASES[family](guard):
            tell(label)
            case()


def run_planted(name: str, index: int, tell: Tell) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tell(plant(name, index, folder))
        run_cases(FAMILIES[name], "end", tell)


def touch(edge: str, offset: int, tell: Tell) -> None:
    """Read the byte `offset` bytes from a tensor's edge, outwards if positive."""
    tensor = guarded(torch.ones(5, 3).mT, edge)
    address = tensor.data_ptr() + (60 + offset - 1 if edge == "end" else -offset)
    tell(repr(ctypes.string_at(address, 1)))


def main() -> None:
    torch.set_num_threads(1)  # a process that forks must have no other threads
    # Of the kernels only what nothing is planted in: the others are imported where they run.
    for shared in ("triton", "triton.language", "triton_34", "plad_fast.kernels.primitives"):
        importlib.import_module(shared)
    works: dict[str, Callable[[Tell], None]] = {}
    for edge in EDGES:
        works[f"touch inside {edge}"] = partial(touch, edge, 0)
        works[f"touch outside {edge}"] = partial(touch, edge, 1)
        works |= {f"{family} {edge}": partial(run_cases, family, edge) for family in CASES}
    for name in FAMILIES:
        for index in range(len(safeguards(name)[1])):
            works[f"planted {name} {index}"] = partial(run_planted, name, index)
    for name, work in works.items():
        print(json.dumps({"name": name, **run_apart(work)}), flush=True)


if __name__ == "__main__":
    main()
