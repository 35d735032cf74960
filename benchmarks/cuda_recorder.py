"""Runs code for a GPU without one, and records what the GPU would be asked to do.

Tensors of the device are meta tensors that say they are on `cuda:0`: real shapes, no memory. A
dispatch mode sees every operation of torch, launches of Triton's kernels arrive here instead, and
nothing large is computed. Small tensors (lengths, masks, indices, numbers of a token) have their
values on the CPU beside them, so that the host reads what it would have read.

Recorded are:

launches   kernels of Triton, products of a library, and operations of torch that are not views.
           Each is one, although torch's `nonzero` and some others take several.
waits      reads of device values by the host, and copies between both that are not asynchronous.
bytes      each operand read once and each result written once; of a gather or scatter what it
           moves. For kernels of Triton the rules of `cuda_rules` say it.
memory     bytes of the storages that live at a time.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import plad_fast
from benchmarks.cuda_memory import REAL, DeviceMemory, on_device
from benchmarks.cuda_rules import RULES, Rule, Touched, invented, size_of, sized

aten = torch.ops.aten


@dataclass(frozen=True)
class Device:
    """What code asks a GPU for."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    memory: int
    """Bytes."""


H100 = Device("H100 SXM 80 GB", (9, 0), 132, 80 * 10**9)


@dataclass(frozen=True)
class Launch:
    name: str
    kind: str
    """"triton", "product" (of a library) or "torch"."""
    flops: float
    read: float
    """Bytes."""
    written: float
    """Bytes."""
    grad_read: int = 0
    """Entries of the gradient of the weight, in whatever dtype it is kept meanwhile."""
    grad_written: int = 0
    accumulated: float = 0.0
    """Bytes of what a product adds to, read and written."""
    makes_gradient: bool = False
    """Of a chunk of logits."""
    grid: tuple[int, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a kernel that are numbers or texts."""


_CUDA = torch.device("cuda", 0)
_META, _CPU = torch.device("meta"), torch.device("cpu")
# The host reads their result, or waits for its size.
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
_OPAQUE = ("plad_fast", "torch_nn")
"""Namespaces of ops made of operations in Python, which are recorded instead of them."""
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_")
_GATHERING = ("index", "index_select", "gather", "embedding", "take")
_SCATTERING = ("index_put_", "_index_put_impl_", "index_copy_", "index_add_", "scatter_")
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


class Recorder(TorchDispatchMode):
    """What happens while it is the mode; made by `counting`."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.rules = rules
        self.memory = DeviceMemory()
        self.launches: list[Launch] = []
        self.waits: list[str] = []
        self._held = 0
        self._weight: Tensor | None = None

    def tensor(self, values: Tensor) -> Tensor:
        """On the device, with these values."""
        return self.memory.place(values)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """On the device; nobody knows its values."""
        with self.memory.shapes_only():
            return self.memory.register(torch.empty(*shape, dtype=dtype, device=_META))

    def start(self, weight: Tensor) -> None:
        """Forget what was recorded. What lives now is given; `weight` is the head's (V, D)."""
        self.launches, self.waits = [], []
        self._weight = weight
        self._held = self.memory.peak = self.memory.live

    @property
    def peak_bytes(self) -> int:
        """Above what was given."""
        return self.memory.peak - self._held

    # What is recorded

    def wait(self, what: str) -> None:
        frames = traceback.extract_stack()
        place = next((f for f in reversed(frames) if _is_ours(f.filename)), frames[0])
        self.waits.append(f"{what} at {Path(place.filename).name}:{place.lineno}")

    def record(self, name: str, kind: str, touched: Touched, **more: Any) -> None:
        read, written, flops = touched
        self.launches.append(
            Launch(
                name,
                kind,
                flops,
                sum(size for _, size in read),
                sum(size for _, size in written),
                sum(self._of_gradient(*part) for part in read),
                sum(self._of_gradient(*part) for part in written),
                **more,
            )
        )

    def _of_gradient(self, tensor: Tensor, size: float) -> int:
        """Entries of a tensor that has or shares the shape of the weight, and is not the weight."""
        if self._weight is None or not on_device(tensor):
            return 0
        if tensor.untyped_storage() is self._weight.untyped_storage():
            return 0
        if self.memory.made_for(tensor) != tuple(self._weight.shape):
            return 0
        return round(size / tensor.element_size())

    def triton(self, kernel: Any, grid: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """In place of `kernel[grid](*args, **kwargs)`."""
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        # A tensor descriptor stands for its tensor.
        arguments = {k: getattr(v, "base", v) for k, v in arguments.items()}
        name = kernel.fn.__name__
        if name not in self.rules:
            raise KeyError(f"no rule of cuda_rules.RULES says what the kernel {name} touches")
        rule = self.rules[name]
        touched = rule.touched(arguments)
        grid = tuple(grid(arguments) if callable(grid) else grid)
        constants = {k: v for k, v in arguments.items() if isinstance(v, bool | int | float | str)}
        self.record(
            name,
            "triton",
            touched,
            makes_gradient=rule.makes_gradient,
            grid=grid,
            constants=constants,
        )
        with torch._C._DisableTorchDispatch():
            found = invented(arguments, self.memory.known)
        for tensor, _ in touched.written:
            values = next((v for k, v in found.items() if arguments.get(k) is tensor), None)
            if values is None:
                self.memory.forget(tensor)
            else:
                self.memory.write(tensor, values)

    # Operations of torch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors((args, kwargs))
        from_device = any(map(on_device, tensors))
        to = kwargs.get("device")
        to_device = to is not None and torch.device(to).type != "cpu"
        if func.namespace in _OPAQUE:
            with self:
                return func._op_dk(_implementation(func), *args, **kwargs)
        if not from_device and not to_device:
            return func(*args, **kwargs)
        if func not in _WAITING:  # what torch makes of simpler operations
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func.overloadpacket.__name__
        if func in _WAITING or _size_is_asked_for(name, args, kwargs):
            return self._wait_for_result(func, args, kwargs)
        if name == "_to_copy" and to is not None and to_device != from_device:
            return self._copy_across(func, args, kwargs, to_device)
        if name == "copy_" and not all(map(on_device, tensors)):
            return self._copy_into(*args, **kwargs)
        if any(tensor.ndim and not on_device(tensor) for tensor in tensors):
            self.wait(f"{name} of a tensor of the host")
        if name in (*_GATHERING, *_SCATTERING):
            args = self._rows_of_masks(args)
        return self._run(func, name, args, kwargs)

    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _META
        with self.memory.shapes_only():
            result = _shape_of_product(func, name, args, kwargs)
            if result is None:
                result = func(*args, **kwargs)
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        new = [t for t in _tensors(result) if id(t.untyped_storage()) not in given]
        changed = _changed(func, args, kwargs)
        if not new and not changed:
            return result  # a view
        for tensor in new:
            self.memory.register(tensor)
        self._compute(func, name, args, kwargs, result, new, changed)
        if name not in _EMPTY and any(tensor.numel() for tensor in [*new, *changed]):
            if name in _PRODUCTS:
                touched, accumulated = _of_product(name, args, kwargs, result)
                self.record(name, "product", touched, accumulated=accumulated)
            else:
                self.record(name, "torch", _of_operation(name, args, kwargs, new, changed))
        return result

    def _compute(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        result: Any,
        new: list[Tensor],
        changed: list[Tensor],
    ) -> None:
        """The same on the values, where they are known and the results are small."""
        if name in _EMPTY:
            for tensor in new:
                self.memory.clear(tensor)
            return
        known = all(self.memory.known(t) is not None for t in _tensors((args, kwargs)))
        if name in _PRODUCTS or not known or not all(map(self.memory.is_small, new)):
            for tensor in changed:
                self.memory.forget(tensor)
            return
        values = self._on_values(func, args, kwargs)
        for tensor, value in zip(tree_leaves(result), tree_leaves(values), strict=True):
            if any(tensor is t for t in new):
                self.memory.write(tensor, value)

    def _on_values(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def value(leaf: Any) -> Any:
            return self.memory.known(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = tree_map(value, args), tree_map(value, kwargs)
        if "device" in kwargs:
            kwargs["device"] = _CPU
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)

    # What the host waits for

    def _wait_for_result(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        self.wait(name)
        given = [tensor for tensor in _tensors((args, kwargs)) if on_device(tensor)]
        self.require_known(*given)
        result = self._on_values(func, args, kwargs)
        if not isinstance(result, Tensor | tuple):  # a number of the host
            return result
        placed = tree_map(lambda x: self.tensor(x) if isinstance(x, Tensor) else x, result)
        self.record(name, "torch", Touched(sized(given), sized(_tensors(placed))))
        return placed

    def require_known(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if self.memory.known(tensor) is None:
                raise RuntimeError(
                    f"{self.waits[-1]} reads a tensor of shape {tuple(tensor.shape)} whose values "
                    "are not known: cuda_rules.invented has to know what the kernel finds"
                )

    def _copy_across(self, func: Any, args: Any, kwargs: dict[str, Any], to_device: bool) -> Tensor:
        if not kwargs.get("non_blocking"):
            self.wait("copy to the device" if to_device else "copy to the host")
        self.require_known(args[0])
        values = self._on_values(func, args, kwargs)
        return self.tensor(values) if to_device else values.clone()

    def _copy_into(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking:
            self.wait("copy between host and device")
        self.require_known(source)
        values, known = self.memory.known(source), self.memory.known(target)
        if values is not None and known is not None:
            with torch._C._DisableTorchDispatch():
                known.copy_(values)
        return target

    def _rows_of_masks(self, args: Any) -> Any:
        """Indexing by a mask finds its rows first."""

        def rows(index: Any) -> list[Any]:
            if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
                return [index]
            found = self._wait_for_result(aten.nonzero.default, (index,), {})
            with self.memory.shapes_only():
                return [column.squeeze(1) for column in found.split(1, dim=1)]

        def with_rows(argument: Any) -> Any:
            if not isinstance(argument, list | tuple):
                return argument
            return [row for index in argument for row in rows(index)]

        return tuple(map(with_rows, args))


def _is_ours(filename: str) -> bool:
    from plad_fast import kernels

    folders = [*plad_fast.__path__, *kernels.__path__]
    return any(Path(filename).is_relative_to(folder) for folder in folders)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _implementation(func: Any) -> torch._C.DispatchKey:
    """Of a registered op, below autograd."""
    keys = torch._C.DispatchKey
    for key in (keys.CUDA, keys.CompositeExplicitAutograd, keys.CPU):
        if func.has_kernel_for_dispatch_key(key):
            return key
    raise AssertionError(f"{func} has no implementation")


def _size_is_asked_for(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    return name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3


def _changed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that an operation writes to, by its schema."""
    changed: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    return changed


def _operands(name: str, args: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    """What a product adds to, if it may; and its two factors."""
    return args[:3] if name.startswith(("add", "badd")) else (None, *args[:2])


def _shape_of_product(func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """A product's result where torch has no shape function for it: of wider dtype, or given."""
    if name not in _PRODUCTS or not func._overloadname.startswith(("dtype", "out")):
        return None
    _, left, right = _operands(name, args)
    shape = (*left.shape[:-1], right.shape[-1])
    out = kwargs.get("out")
    if out is not None:
        assert out.shape == shape, (name, out.shape, shape)
        return out
    dtype = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype))
    return left.new_empty(shape, dtype=dtype)


def _of_product(
    name: str, args: Any, kwargs: Mapping[str, Any], result: Tensor
) -> tuple[Touched, float]:
    """What it touches, and bytes of what it adds to."""
    base, left, right = _operands(name, args)
    flops = 2.0 * result.numel() * left.shape[-1]
    read = sized([left, right])
    adds = base is not None and kwargs.get("beta", 1) != 0
    if adds:
        assert base is not None
        read.append((base, size_of(base)))
    written = sized([result])
    return Touched(read, written, flops), read[-1][1] + written[0][1] if adds else 0.0


def _of_operation(
    name: str, args: Any, kwargs: Mapping[str, Any], new: list[Tensor], changed: list[Tensor]
) -> Touched:
    is_changed = {id(tensor) for tensor in changed}
    read = {id(t): t for t in _tensors((args, kwargs)) if id(t) not in is_changed}
    others = list(read.values())
    results = sized([*new, *changed])
    if name in _GATHERING:
        return Touched([(args[0], results[0][1]), *sized(others[1:])], results)
    if name in _SCATTERING:
        moved = size_of(others[-1])
        again = [(args[0], moved)] if name == "index_add_" or kwargs.get("accumulate") else []
        return Touched([*sized(others), *again], [(args[0], moved)])
    if name not in _OVERWRITING and kwargs.get("out") is None:
        others += changed
    return Touched(sized(others), results)


@contextlib.contextmanager
def counting(device: Device = H100, rules: Mapping[str, Rule] = RULES) -> Iterator[Recorder]:
    """A process that believes in one GPU. Not for several threads.

    Args:
        rules: of every kernel that will be launched.
    """
    from plad_fast.kernels import launch
    from triton.runtime import interpreter, jit

    recorder = Recorder(rules)
    memory = recorder.memory
    real = {name: getattr(torch.Tensor, name) for name in ("tolist", "data_ptr", "__getitem__")}

    def seen(name: str, value: Any) -> property:
        def get(tensor: Tensor) -> Any:
            return value if on_device(tensor) and not memory.as_meta else REAL[name].__get__(tensor)

        return property(get)

    def to_list(tensor: Tensor) -> Any:
        if on_device(tensor):
            recorder.wait("tolist")
            recorder.require_known(tensor)
        return real["tolist"](memory.known(tensor))

    def address(tensor: Tensor) -> int:
        """Storages are aligned as torch's allocator has them."""
        if not on_device(tensor):
            return real["data_ptr"](tensor)
        return tensor.storage_offset() * tensor.element_size()

    def item(tensor: Tensor, index: Any) -> Any:
        # torch makes a tensor of a list where no mode sees it.
        return real["__getitem__"](tensor, torch.tensor(index) if type(index) is list else index)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        recorder.triton(kernel, grid, args, kwargs)

    major, minor = device.capability
    properties = SimpleNamespace(
        name=device.name,
        major=major,
        minor=minor,
        multi_processor_count=device.num_sms,
        total_memory=device.memory,
    )
    replacements: list[tuple[Any, str, Callable[..., Any] | property]] = [
        (torch.Tensor, "device", seen("device", _CUDA)),
        (torch.Tensor, "is_cuda", seen("is_cuda", True)),
        (torch.Tensor, "is_meta", seen("is_meta", False)),
        (torch.Tensor, "tolist", to_list),
        (torch.Tensor, "data_ptr", address),
        (torch.Tensor, "__getitem__", item),
        (torch.Tensor, "pin_memory", lambda tensor: tensor),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device", lambda _: contextlib.nullcontext()),
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "get_device_capability", lambda *_: device.capability),
        (launch, "_cuda_device", lambda _: launch.Device(device.capability, device.num_sms)),
        (jit.JITFunction, "run", run),
        (interpreter.InterpretedFunction, "run", run),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # torch.tensor(..., device="cuda") makes a tensor of the host, and then tells of its copy.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(recorder)
        yield recorder
