"""Runs the CUDA path of the ops without a GPU, and counts what a GPU would be asked to do.

Tensors "on the GPU" are meta tensors that say they are on `cuda:0`: real shapes, no memory. A
dispatch mode sees every operation of torch, the launchers of Triton's kernels call recorders, and
nothing large is computed. Small tensors (lengths, masks, indices, numbers a token) have their
values beside them on the CPU, so that the host reads what it would have read: every read that a
GPU would be waited for is counted. What kernels find is invented where the host needs it: the
log-probability of a token follows from its target, see `target_for`.

Counted are:

launches   kernels of Triton, library products, and operations of torch that are not views. Each
           counts as one, although torch's `nonzero` and a few others take several.
waits      reads of device values by the host, and copies between both that are not asynchronous.
bytes      every operand once, every result once; a gather or scatter what it moves. Products have
           their operands read once; kernels as their rule in `RULES` says.
peak       of the bytes of live storages, above those of the arguments.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import contextlib
import math
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

_KNOWN_BYTES = 2**22  # the largest storage whose values are kept
_GPU = torch.device("cuda", 0)
_REAL = {name: getattr(torch._C.TensorBase, name) for name in ("device", "is_cuda", "is_meta")}
_LIKELY, _UNLIKELY = -1.0, -3.0


@dataclass(frozen=True)
class Device:
    """What of a GPU the code asks for."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    memory: int
    """Bytes."""
    free: int
    """Bytes, at any time."""

    @property
    def properties(self) -> Any:
        """As `torch.cuda.get_device_properties` has them."""
        major, minor = self.capability
        return mock.Mock(
            **{"major": major, "minor": minor, "total_memory": self.memory},
            multi_processor_count=self.num_sms,
        )


H100 = Device("H100 SXM 80 GB", (9, 0), 132, 80 * 10**9, 60 * 10**9)


@dataclass(frozen=True)
class Launch:
    """A kernel on the device."""

    name: str
    kind: str
    """"triton", "product" (of a library) or "torch"."""
    flops: float = 0.0
    read: float = 0.0  # bytes
    written: float = 0.0  # bytes
    grid: tuple[int, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    grad_read: int = 0
    """Entries of the gradient of the weight."""
    grad_written: int = 0


@dataclass(frozen=True)
class Counts:
    """Of a call, forward and backward."""

    launches: tuple[Launch, ...] = field(repr=False)
    waits: tuple[str, ...]
    """Where the host waited: operation, file and line."""
    peak_bytes: int
    """Above the arguments, with the gradients."""
    weight_entries: int

    def by_name(self, kind: str | None = None) -> Counter[str]:
        return Counter(x.name for x in self.launches if kind in (None, x.kind))

    def of_kind(self, kind: str) -> list[Launch]:
        return [x for x in self.launches if x.kind == kind]

    @property
    def chunks(self) -> int:
        """Times that a gradient of logits was made, by rows or by slices of the vocabulary."""
        return sum(RULES[x.name].makes_gradient for x in self.of_kind("triton"))

    @property
    def launches_per_chunk(self) -> float:
        """Beside library products."""
        return (len(self.launches) - len(self.of_kind("product"))) / max(self.chunks, 1)

    @property
    def weight_grad_read(self) -> float:
        """Passes over the gradient of the weight, in whatever dtype it is kept meanwhile."""
        return sum(x.grad_read for x in self.launches) / self.weight_entries

    @property
    def weight_grad_written(self) -> float:
        return sum(x.grad_written for x in self.launches) / self.weight_entries

    @property
    def read(self) -> float:
        return sum(x.read for x in self.launches)

    @property
    def written(self) -> float:
        return sum(x.written for x in self.launches)

    @property
    def flops(self) -> float:
        return sum(x.flops for x in self.launches)


# Rules of the kernels -----------------------------------------------------------------------------

Arguments = Mapping[str, Any]


class Touched(NamedTuple):
    """What a launch does to memory, as (tensor, bytes)."""

    read: list[tuple[Tensor, float]]
    written: list[tuple[Tensor, float]]
    flops: float = 0.0


class Rule(NamedTuple):
    touched: Callable[[Arguments], Touched]
    makes_gradient: bool = False
    """Whether a launch makes the gradient of a chunk of logits."""


def _size(tensor: Tensor) -> float:
    """Bytes of what a tensor shows; what is repeated lies in memory once."""
    shown = (n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s != 0)
    return float(math.prod(shown) * tensor.element_size())


def _once(arguments: Arguments, written: Sequence[str]) -> Touched:
    """Every tensor once: written where it is named, else read. One given twice counts once."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    out = [tensors[name] for name in written if name in tensors]
    places = {id(tensor) for tensor in out}
    read = {id(t): t for k, t in tensors.items() if k not in written and id(t) not in places}
    return Touched([(t, _size(t)) for t in read.values()], [(t, _size(t)) for t in out])


_STATISTICS = ("logprobs_ptr", "lse_ptr", "tail_ptr", "miss_ptr", "entropy_ptr")


def _linear_forward(arguments: Arguments) -> Touched:
    """hidden and weight once: the tiles of tokens that run together share the weight in the L2."""
    touched = _once(arguments, ("max_ptr", "rest_ptr", "moment_ptr", "z_target_ptr"))
    if not arguments["WITH_ENTROPY"]:
        touched = touched._replace(written=touched.written[:2] + touched.written[3:])
    return touched._replace(flops=_flops(arguments))


def _logits_gradient(arguments: Arguments) -> Touched:
    return _once(arguments, ("out_ptr",))._replace(flops=_flops(arguments))


def _flops(arguments: Arguments) -> float:
    return 2.0 * arguments["num_tokens"] * arguments["vocab"] * arguments["width"]


def _rows_forward(arguments: Arguments) -> Touched:
    written = _STATISTICS if arguments["WITH_ENTROPY"] else _STATISTICS[:-1]
    return _once(arguments, written)


def _rows_backward(arguments: Arguments) -> Touched:
    """Every row that is written is read once, also in place."""
    logits, out = arguments["logits_ptr"], arguments["out_ptr"]
    others = {k: v for k, v in arguments.items() if k not in ("logits_ptr", "out_ptr")}
    touched = _once(others, ())
    read = (logits, out.numel() * logits.element_size())
    return Touched([read, *touched.read], [(out, _size(out))])


RULES: dict[str, Rule] = {
    "_linear_forward_kernel": Rule(_linear_forward),
    "_combine_kernel": Rule(
        lambda arguments: _once(arguments, ("sums_ptr", "counts_ptr", *_STATISTICS))
    ),
    "_logits_gradient_kernel": Rule(_logits_gradient, makes_gradient=True),
    "_logits_rows_forward_kernel": Rule(_rows_forward),
    "_logits_rows_backward_kernel": Rule(_rows_backward, makes_gradient=True),
    "_segment_sums_kernel": Rule(lambda arguments: _once(arguments, ("sums_ptr",))),
}
"""By the name of the kernel. A new kernel needs a rule here before it can be counted."""


# What kernels find --------------------------------------------------------------------------------


def target_for(likely: bool) -> int:
    """The target of a token whose log-probability is invented as -1 (likely) or as -3 nats."""
    return 0 if likely else 1


def _invented(arguments: Arguments, known: Callable[[Any], Tensor | None]) -> dict[str, Tensor]:
    """Values of a launch's small results, by the names of its arguments."""
    found: dict[str, Tensor] = {}
    targets, bounds = known(arguments.get("targets_ptr")), known(arguments.get("cu_seqlens_ptr"))
    values = known(arguments.get("values_ptr"))
    if targets is not None:
        counted = targets != arguments["ignore_index"]
        likely = (targets % 2 == 0).where(counted, False)
        values = likely.float() * (_LIKELY - _UNLIKELY) + _UNLIKELY
        values = values.where(counted, 0.0)
        found["logprobs_ptr"] = values
        found["lse_ptr"] = -values
        found["tail_ptr"] = torch.zeros_like(values)
        found["miss_ptr"] = 1 - values.exp()
        if bounds is not None:
            found["counts_ptr"] = _sums(counted.long(), bounds)
    if values is not None and bounds is not None:
        found["sums_ptr"] = _sums(values, bounds)
    return found


def _sums(values: Tensor, bounds: Tensor) -> Tensor:
    before = torch.cat([values.new_zeros(1), values.reshape(-1).cumsum(0)])
    return before[bounds[1:]] - before[bounds[:-1]]


# The recorder -------------------------------------------------------------------------------------


@dataclass
class _Memory:
    """A storage on the device."""

    shape: tuple[int, ...]
    """Of the tensor that it was made for."""
    values: torch.UntypedStorage | None


# Operations whose results are as large as their values say; reading them waits for the device.
_WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.allclose.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
_OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_")
_GATHERING = ("index", "index_select", "gather", "embedding", "take")
_SCATTERING = ("index_put_", "index_copy_", "scatter_", "index_fill_", "_index_put_impl_")
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "addmv", "mv", "dot", "_scaled_mm")


class Recorder(TorchDispatchMode):
    """See `counting`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.waits: list[str] = []
        self.weight_shape: tuple[int, ...] | None = None
        self._memory: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._live = self._peak = self._base = 0
        self.in_meta = False
        """Whether torch computes a shape: its tensors say "meta" then."""

    # Tensors

    def tensor(self, values: Tensor) -> Tensor:
        """On the device, with these values, of which the caller keeps the right to read them."""
        return self._keep(torch.empty_like(values, device="meta"), values)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """On the device, with values that nobody knows."""
        with self._as_meta():
            return self._register(torch.empty(*shape, dtype=dtype, device="meta"))

    def start(self, weight: Tensor) -> None:
        """Forget what was counted; what lives now is an argument."""
        self.launches, self.waits = [], []
        self.weight_shape = tuple(weight.shape)
        self._weight = weight.untyped_storage()
        self._base = self._peak = self._live

    def counts(self) -> Counts:
        peak = self._peak - self._base
        return Counts(
            tuple(self.launches), tuple(self.waits), peak, math.prod(self.weight_shape or ())
        )

    @contextlib.contextmanager
    def _as_meta(self) -> Iterator[None]:
        before, self.in_meta = self.in_meta, True
        try:
            with torch._C._DisableTorchDispatch():
                yield
        finally:
            self.in_meta = before

    def _register(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._memory:
            size = storage.nbytes()
            self._memory[storage] = _Memory(tuple(tensor.shape), None)
            self._live += size
            self._peak = max(self._peak, self._live)
            weakref.finalize(storage, self._free, size)
        return tensor

    def _free(self, size: int) -> None:
        self._live -= size

    def _keep(self, tensor: Tensor, values: Tensor) -> Tensor:
        """A new tensor of the device gets its values."""
        self._register(tensor)
        self._allot(tensor)
        known = self.known(tensor)
        if known is not None:
            with torch._C._DisableTorchDispatch():
                known.copy_(values.detach())
        return tensor

    def _allot(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() <= _KNOWN_BYTES:
            self._memory[storage].values = torch.zeros(
                storage.nbytes(), dtype=torch.uint8
            ).untyped_storage()

    def known(self, tensor: Any) -> Tensor | None:
        """The values of a tensor of the device; of one on the host it is itself."""
        if not isinstance(tensor, Tensor) or not _REAL["is_meta"].__get__(tensor):
            return tensor if isinstance(tensor, Tensor) else None
        memory = self._memory.get(tensor.untyped_storage())
        if memory is None or memory.values is None:
            return None
        with torch._C._DisableTorchDispatch():
            view = torch.empty(0, dtype=tensor.dtype)
            return view.set_(memory.values, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _forget(self, tensor: Tensor) -> None:
        if _REAL["is_meta"].__get__(tensor):
            self._memory[tensor.untyped_storage()].values = None

    # Counting

    def wait(self, what: str) -> None:
        frames = traceback.extract_stack()
        ours = [f for f in frames if "plad_fast" in f.filename or "kernels" in f.filename]
        place = ours[-1] if ours else frames[-3]
        self.waits.append(f"{what} at {place.filename.rsplit('/', 1)[-1]}:{place.lineno}")

    def launch(
        self, name: str, kind: str, touched: Touched, grid: tuple[int, ...] = (), **constants: Any
    ) -> None:
        entries = [sum(map(self._of_gradient, side)) for side in touched[:2]]
        read, written = (sum(size for _, size in side) for side in touched[:2])
        self.launches.append(
            Launch(name, kind, touched.flops, read, written, grid, constants, *entries)
        )

    def _of_gradient(self, part: tuple[Tensor, float]) -> int:
        """Entries, if the tensor is a part of the gradient of the weight."""
        tensor, size = part
        storage = tensor.untyped_storage()
        memory = self._memory.get(storage)
        if memory is None or memory.shape != self.weight_shape or storage is self._weight:
            return 0
        return round(size / tensor.element_size())

    def triton(self, kernel: Any, grid: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """In place of `kernel[grid](*args, **kwargs)`."""
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        # A tensor descriptor stands for its tensor.
        arguments = {
            k: v.base if hasattr(v, "base") and hasattr(v, "block_shape") else v
            for k, v in arguments.items()
        }
        name = kernel.fn.__name__
        if name not in RULES:
            raise KeyError(f"no rule in {__name__}.RULES says what the kernel {name} touches")
        if callable(grid):
            grid = grid(arguments)
        constants = {k: v for k, v in arguments.items() if isinstance(v, bool | int | str)}
        touched = RULES[name].touched(arguments)
        self.launch(name, "triton", touched, tuple(grid), **constants)
        with torch._C._DisableTorchDispatch():
            found = _invented(arguments, self.known)
        for tensor, _ in touched.written:
            self._forget(tensor)
        for key, values in found.items():
            out = arguments.get(key)
            if isinstance(out, Tensor) and any(out is t for t, _ in touched.written):
                self._allot_if_whole(out)
                known = self.known(out)
                if known is not None:
                    with torch._C._DisableTorchDispatch():
                        known.copy_(values.reshape(known.shape))

    def _allot_if_whole(self, tensor: Tensor) -> None:
        if self._memory[tensor.untyped_storage()].values is None:
            self._allot(tensor)

    # Operations of torch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "plad_fast":
            with self:
                return func._op_dk(_key_of(func), *args, **kwargs)
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        on_device = [t for t in given if _REAL["is_meta"].__get__(t)]
        to = kwargs.get("device")
        goes = to is not None and torch.device(to).type in ("cuda", "meta")
        if not on_device and not goes:
            return func(*args, **kwargs)
        if func not in _WAITING:  # an operation made of others, as they reach the device
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func.overloadpacket.__name__
        if func in _WAITING or (func is aten.repeat_interleave.Tensor and _sizeless(args, kwargs)):
            return self._read(func, args, kwargs, on_device)
        if name == "_to_copy" and to is not None and goes != bool(on_device):
            return self._transfer(func, args, kwargs, goes)
        if name == "copy_" and len({_REAL["is_meta"].__get__(t) for t in given}) == 2:
            return self._copy(args, kwargs)
        if any(not _REAL["is_meta"].__get__(t) and t.ndim for t in given):
            self.wait(f"{name} of a host tensor")
        if name in (*_GATHERING, *_SCATTERING):
            args, kwargs = self._masks_to_rows(args, kwargs)
        if goes:
            kwargs["device"] = torch.device("meta")
        return self._compute(func, name, args, kwargs)

    def _compute(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if name in _PRODUCTS and kwargs.get("out") is not None:
            result = kwargs["out"]
        elif name in _PRODUCTS and func._overloadname == "dtype":
            rows, columns = _product_shape(name, args)
            with self._as_meta():
                result = args[0].new_empty(rows, columns, dtype=args[-1])
        else:
            with self._as_meta():
                result = func(*args, **kwargs)
        results = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        before = {id(t.untyped_storage()) for t in given}
        new = [t for t in results if id(t.untyped_storage()) not in before]
        for tensor in new:
            self._register(tensor)
        changed = _changed(func, args, kwargs)
        self._values(func, name, args, kwargs, result, new, changed)
        if (new or changed) and not name.startswith(("empty", "new_empty")):
            touched = _touched(name, args, kwargs, given, new, changed)
            kind = "product" if name in _PRODUCTS else "torch"
            self.launch(name, kind, touched)
        return result

    def _values(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        result: Any,
        new: list[Tensor],
        changed: list[Tensor],
    ) -> None:
        """The same operation on what is known, or nothing is known of what it wrote."""
        if not new and not changed:
            return  # a view: its storage has the values
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        small = all(t.untyped_storage().nbytes() <= _KNOWN_BYTES for t in new)
        if name.startswith(("empty", "new_empty")):
            for tensor in new:
                self._allot(tensor)
            return
        if not small or any(self.known(t) is None for t in tensors) or name in _PRODUCTS:
            for tensor in changed:
                self._forget(tensor)
            return
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with torch._C._DisableTorchDispatch():
            mapped = tree_map(lambda x: self.known(x) if isinstance(x, Tensor) else x, args)
            options = tree_map(lambda x: self.known(x) if isinstance(x, Tensor) else x, kwargs)
            values = func(*mapped, **options)
        pairs = zip(tree_flatten(result)[0], tree_flatten(values)[0], strict=True)
        for tensor, value in pairs:
            if isinstance(tensor, Tensor) and any(tensor is t for t in new):
                self._keep(tensor, value)

    def _read(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """The host reads a value: it waits until the device has it."""
        self.wait(func.overloadpacket.__name__)
        unknown = [t for t in given if self.known(t) is None]
        if unknown:
            raise RuntimeError(
                f"{self.waits[-1]} reads a value that is not known here, of shape "
                f"{tuple(unknown[0].shape)}; a kernel that finds it needs an invented result"
            )
        with torch._C._DisableTorchDispatch():
            mapped = tree_map(lambda x: self.known(x) if isinstance(x, Tensor) else x, args)
            options = tree_map(lambda x: self.known(x) if isinstance(x, Tensor) else x, kwargs)
            result = func(*mapped, **options)
        if not isinstance(result, Tensor | tuple):
            return result
        name = func.overloadpacket.__name__
        placed = tree_map(lambda x: self._place(x) if isinstance(x, Tensor) else x, result)
        new = [t for t in tree_flatten(placed)[0] if isinstance(t, Tensor)]
        self.launch(
            name, "torch", Touched([(t, _size(t)) for t in given], [(t, _size(t)) for t in new])
        )
        return placed

    def _place(self, values: Tensor) -> Tensor:
        with self._as_meta():
            tensor = torch.empty_like(values, device="meta")
        return self._keep(tensor, values)

    def _transfer(self, func: Any, args: Any, kwargs: dict[str, Any], goes: bool) -> Tensor:
        """Between host and device."""
        if not kwargs.get("non_blocking"):
            self.wait("copy to the device" if goes else "copy to the host")
        known = self.known(args[0])
        if known is None:
            raise RuntimeError(f"{self.waits[-1]} of a value that is not known here")
        with torch._C._DisableTorchDispatch():
            values = func(known, **{**kwargs, "device": torch.device("cpu")})
        if not goes:
            return values.clone()
        return self._place(values)

    def _copy(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        target, source, *rest = args
        if not (kwargs.get("non_blocking") or any(rest)):
            self.wait("copy between host and device")
        values, known = self.known(source), self.known(target)
        if values is None:
            raise RuntimeError(f"{self.waits[-1]} of a value that is not known here")
        if known is not None:
            with torch._C._DisableTorchDispatch():
                known.copy_(values)
        return target

    def _masks_to_rows(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Indexing by a mask asks for its rows first, for which the host waits."""

        def rows(indices: Any) -> Any:
            if not isinstance(indices, list | tuple):
                return indices
            found: list[Any] = []
            for index in indices:
                is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
                if not is_mask:
                    found.append(index)
                    continue
                places = self._read(aten.nonzero.default, (index,), {}, [index])
                with self:
                    found += [p.squeeze(1) for p in places.split(1, dim=1)]
            return found

        return tuple(rows(a) for a in args), kwargs


def _key_of(func: Any) -> torch._C.DispatchKey:
    """Where the implementation of a registered op lies."""
    keys = torch._C.DispatchKey
    for key in (keys.CUDA, keys.CompositeExplicitAutograd, keys.CPU):
        if func.has_kernel_for_dispatch_key(key):
            return key
    raise AssertionError(f"{func} has no implementation")


def _sizeless(args: Any, kwargs: Mapping[str, Any]) -> bool:
    return len(args) < 2 and kwargs.get("output_size") is None


def _product_shape(name: str, args: Any) -> tuple[int, int]:
    left, right = args[:2] if name == "mm" else args[1:3]
    return left.shape[0], right.shape[1]


def _changed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that an operation writes to."""
    changed: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            changed += [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
    return changed


def _touched(
    name: str,
    args: Any,
    kwargs: Mapping[str, Any],
    given: Sequence[Tensor],
    new: Sequence[Tensor],
    changed: Sequence[Tensor],
) -> Touched:
    out = [*new, *changed]
    ids = {id(t) for t in changed}
    read = list({id(t): t for t in given if id(t) not in ids}.values())
    if name in _GATHERING:
        moved = sum(map(_size, out))
        return Touched([(args[0], moved), *((t, _size(t)) for t in read[1:])], _sized(out))
    if name in _SCATTERING:
        moved = _size(read[-1]) if read else 0.0
        return Touched(_sized(read), [(args[0], moved)])
    if name in _PRODUCTS:
        accumulator, flops = _product(name, args, kwargs)
        if accumulator is None and name in ("addmm", "addmm_"):
            # What is multiplied by 0 is not read.
            read = [t for t in read if t is not args[0]]
        elif accumulator is not None and id(accumulator) in ids:
            read = [*read, accumulator]
        return Touched(_sized(read), _sized(out), flops)
    if name not in _OVERWRITING and kwargs.get("out") is None:
        read = [*read, *changed]
    return Touched(_sized(read), _sized(out))


def _sized(tensors: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
    return [(t, _size(t)) for t in tensors]


def _product(name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, float]:
    """What it adds to, if anything; and its flops."""
    adds = name.startswith(("add", "badd"))
    left, right = args[1:3] if adds else args[:2]
    batch = left.shape[0] if left.ndim == 3 else 1
    columns = right.shape[-1] if right.ndim > 1 else 1
    flops = 2.0 * batch * left.shape[-2 if left.ndim > 1 else 0] * left.shape[-1] * columns
    if left.ndim == 1:
        flops = 2.0 * left.shape[0]
    beta = kwargs.get("beta", 1)
    return (args[0] if adds and beta != 0 else None), flops


# The machine that is not there --------------------------------------------------------------------


@contextlib.contextmanager
def counting(device: Device = H100) -> Iterator[Recorder]:
    """A process that believes in one GPU; the recorder makes tensors on it and counts."""
    from plad_fast.kernels import launch
    from triton.runtime import jit

    recorder = Recorder()
    kinds: list[Any] = [jit.JITFunction]
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter

        kinds.append(interpreter.InterpretedFunction)

    def seen(name: str, value: Callable[[Tensor], Any]) -> Any:
        real = _REAL[name]

        def get(tensor: Tensor) -> Any:
            meta = _REAL["is_meta"].__get__(tensor) and not recorder.in_meta
            return value(tensor) if meta else real.__get__(tensor)

        return property(get)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        recorder.triton(kernel, grid, args, kwargs)

    def to_list(tensor: Tensor) -> Any:
        if not _REAL["is_meta"].__get__(tensor):
            return real_list(tensor)
        recorder.wait("tolist")
        known = recorder.known(tensor)
        if known is None:
            raise RuntimeError(f"{recorder.waits[-1]} reads a value that is not known here")
        return real_list(known)

    def address(tensor: Tensor) -> int:
        if not _REAL["is_meta"].__get__(tensor):
            return real_address(tensor)
        return tensor.storage_offset() * tensor.element_size()

    def item(tensor: Tensor, index: Any) -> Any:
        # torch makes an index of a list without telling a dispatch mode.
        return real_item(tensor, torch.tensor(index) if isinstance(index, list) else index)

    real_list, real_address = torch.Tensor.tolist, torch.Tensor.data_ptr
    real_item = torch.Tensor.__getitem__
    with contextlib.ExitStack() as stack:
        patch = lambda *a, **k: stack.enter_context(mock.patch.object(*a, **k))  # noqa: E731
        patch(torch.Tensor, "device", seen("device", lambda _: _GPU), create=True)
        patch(torch.Tensor, "is_cuda", seen("is_cuda", lambda _: True), create=True)
        patch(torch.Tensor, "is_meta", seen("is_meta", lambda _: False), create=True)
        patch(torch.Tensor, "tolist", to_list, create=True)
        patch(torch.Tensor, "data_ptr", address, create=True)
        patch(torch.Tensor, "__getitem__", item, create=True)
        patch(torch.cuda, "_lazy_init", lambda: None)
        patch(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch(torch.cuda, "get_device_properties", lambda *_: device.properties)
        patch(torch.cuda, "get_device_capability", lambda *_: device.capability)
        patch(torch.cuda, "get_device_name", lambda *_: device.name)
        patch(torch.cuda, "mem_get_info", lambda *_: (device.free, device.memory))
        patch(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch(launch, "_cuda_device", lambda _: launch.Device(device.capability, device.num_sms))
        for kind in kinds:
            patch(kind, "run", run)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(recorder)
        yield recorder


# Problems -----------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of a call: pairs of responses of `length` tokens each."""

    tokens: int
    width: int
    vocab: int
    length: int = 256


A = Shape(8192, 4096, 128_256)
B = Shape(2048, 896, 151_936)
C = Shape(16_384, 2048, 248_320)


def count_op(shape: Shape, *, active: float = 1.0, device: Device = H100, **options: Any) -> Counts:
    """Of `linear_sequence_logprobs`, forward and backward; a share of the pairs has a gradient."""
    from plad_fast.ops.logprobs import linear_sequence_logprobs

    with counting(device) as recorder:
        hidden, weight, targets, bounds = _arguments(recorder, shape, active)
        upstream = recorder.tensor(_pairs_active(shape, active).repeat_interleave(2).float())
        recorder.start(weight)
        result = linear_sequence_logprobs(hidden, weight, targets, bounds, **options)
        grads = torch.autograd.grad(result.sums, (hidden, weight), upstream)
        del grads, result
        return recorder.counts()


def count_one_pass(
    shape: Shape,
    *,
    active: float = 1.0,
    loss: str = "plad_ranking",
    device: Device = H100,
    **options: Any,
) -> Counts:
    """Of `fused_linear_preference_loss`, forward and backward.

    A pair that is not active ranks its responses by 2 nats a token, which satisfies a hinge with a
    margin of 1. Losses with a reference get one of 0 nats.
    """
    from plad_fast.losses.registry import get_loss
    from plad_fast.ops.preference_losses import fused_linear_preference_loss

    options = {"sft_weight": 0.0, **options}
    with counting(device) as recorder:
        for small in (True, False):  # the first call of a loss probes it
            case = Shape(2 * shape.length, 64, 256, shape.length) if small else shape
            hidden, weight, targets, bounds = _arguments(recorder, case, active)
            if get_loss(loss).needs_reference_for(options):
                options["reference_logps"] = recorder.tensor(torch.zeros(len(bounds) - 1))
            recorder.start(weight)
            result = fused_linear_preference_loss(
                hidden, weight, targets, bounds, loss=loss, **options
            )
            grads = torch.autograd.grad(result.loss, (hidden, weight))
            del grads, result
        return recorder.counts()


def _pairs_active(shape: Shape, active: float) -> Tensor:  # (B,) bool
    """The active pairs, spread evenly over the others."""
    pairs = shape.tokens // (2 * shape.length)
    before = (torch.arange(pairs + 1) * active).floor()
    return before.diff() > 0


def _arguments(
    recorder: Recorder, shape: Shape, active: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    satisfied = ~_pairs_active(shape, active)
    # y+ is likely; y- is as likely in a pair that is active.
    unlikely = torch.stack([torch.zeros_like(satisfied), satisfied], dim=1).reshape(-1)
    targets = torch.where(unlikely, target_for(False), target_for(True))
    targets = targets.repeat_interleave(shape.length)
    bounds = torch.arange(len(unlikely) + 1) * shape.length
    hidden = recorder.empty(shape.tokens, shape.width).requires_grad_()
    weight = recorder.empty(shape.vocab, shape.width).requires_grad_()
    return hidden, weight, recorder.tensor(targets), recorder.tensor(bounds)
