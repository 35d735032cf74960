"""Messages between the ranks of a vocabulary-parallel op: four small conversations.

W ranks; rank r holds rows [bounds[r], bounds[r + 1]) of the LM head, in the order of the ranks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FACTS = 8  # that the ranks compare, at most: the message must have one length on all of them
_ODD = 0x1E3779B97F4A7C15  # spreads small integers over 64 bits


@dataclass(frozen=True)
class Shards:
    """Who holds which rows of the vocabulary."""

    group: ProcessGroup
    rank: int
    bounds: tuple[int, ...]
    """W + 1 of them, from 0 to the size of the vocabulary."""

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def rows(self) -> int:
        """Of this rank."""
        return self.bounds[self.rank + 1] - self.start

    @property
    def vocab(self) -> int:
        return self.bounds[-1]

    def gather(self, values: Tensor) -> Tensor:  # (...) -> (W, ...)
        """Everybody's values, in the order of the ranks."""
        return gathered(values, self.group)

    def sum_(self, values: Tensor) -> None:
        """Replace the values by their sum over the ranks."""
        dist.all_reduce(values, group=self.group)

    def smallest(self, number: int, device: torch.device) -> int:
        """Everybody's least number."""
        value = torch.tensor(number, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self.group)
        return int(value)


def agreed_shards(
    group: ProcessGroup,
    devices: Sequence[torch.device],
    rows: int,
    facts: Mapping[str, int | Tensor],
    refusal: Exception | None,
) -> Shards:
    """Tell how many rows each rank holds, after all have found that they want the same thing.

    The message has one length whatever is in it, so ranks that disagree get an error, not a hang.

    Args:
        devices: of this rank's tensors.
        facts: name of an argument to what must be the same number on every rank, () int64.
        refusal: what this rank found wrong with its own arguments.

    Raises:
        Exception: `refusal`.
        UsageError: the other ranks' refusal, or a fact that differs, by name.
    """
    message = torch.zeros(2 + _FACTS, dtype=torch.int64, device=_meeting_place(group, devices))
    try:
        for place, fact in enumerate(facts.values(), start=2):
            message[place] = fact
    except Exception as error:  # a fact too many, or one that cannot be read: the others wait
        refusal = refusal or error
    message[0], message[1] = refusal is not None, rows
    messages = gathered(message, group).tolist()
    if refusal is not None:
        raise refusal
    if refused := [rank for rank, theirs in enumerate(messages) if theirs[0]]:
        raise UsageError(
            f"rank {', '.join(map(str, refused))} of the process group refused its arguments; its "
            "own error says why"
        )
    for place, name in enumerate(facts, start=2):
        for rank, theirs in enumerate(messages):
            if theirs[place] != messages[0][place]:
                raise UsageError(
                    f"{name} differ between ranks 0 and {rank} of the process group; the ranks "
                    "of a vocabulary-parallel op must be given the same, except for their rows of "
                    "weight and bias (is the group one of data parallelism?)"
                )
    bounds = [0]
    for theirs in messages:
        bounds.append(bounds[-1] + theirs[1])
    if not bounds[-1]:
        raise UsageError("weight has no rows on any rank of the process group")
    return Shards(group, dist.get_rank(group), tuple(bounds))


def check_group(group: ProcessGroup) -> None:
    """Raise a UsageError unless this process can talk to a group it is a rank of."""
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError("torch.distributed is not initialised; call init_process_group first")
    if group is None:
        raise UsageError(
            "group must be a process group; for all ranks, torch.distributed.group.WORLD"
        )
    if dist.get_rank(group) < 0:
        raise UsageError("this process is not a rank of the process group")


def _meeting_place(group: ProcessGroup, devices: Sequence[torch.device]) -> torch.device:
    """A device that the group talks over: of one kind on all ranks, also on one whose arguments
    lie elsewhere by mistake."""
    if dist.get_backend(group) in ("gloo", "mpi", "ucc") or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    own = (device for device in devices if device.type == kind.type)
    return next(own, torch.device(kind.type))


def gathered(values: Tensor, group: ProcessGroup) -> Tensor:  # (...) -> (W, ...)
    ranks = dist.get_world_size(group)
    # End to end: gloo takes no further dimension.
    result = values.new_empty(ranks * len(values), *values.shape[1:])
    _all_gather()(result, values.contiguous(), group=group)
    return result.reshape(ranks, *values.shape)


def _all_gather() -> Callable[..., object]:
    """By its newer name where there is one."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def digest(tensor: Tensor | None) -> Tensor | int:
    """A number that unlike tensors hardly share, made on the tensor's device; 0 for None."""
    if tensor is None:
        return 0
    flat = tensor.detach().flatten()
    bits = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    spread = (bits + 1) * _ODD
    return ((spread ^ (spread >> 31)) * places).sum() + len(bits)


def digest_of(*values: object) -> int:
    """The same for plain values, by how they are written."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:7], "big")


def digest_of_options(options: object, device: torch.device) -> int | Tensor:
    """The same for options: numbers, names, tensors, and what holds them (lists, tuples, mappings,
    partial functions).

    Of a function the name counts, and of every other object the type.
    """
    tensors: list[Tensor] = []
    result: int | Tensor = digest_of(_plain(options, tensors))
    for place, tensor in enumerate(tensors):
        result = (2 * place + 3) * digest(tensor.to(device)) + result
    return result


def _plain(value: Any, tensors: list[Tensor]) -> object:
    """An option as it can be written down; tensors in it are added to the list."""
    if isinstance(value, Tensor):
        tensors.append(torch.view_as_real(value) if value.is_complex() else value)
        return "tensor", str(value.dtype), tuple(value.shape)
    if isinstance(value, Mapping):
        names = sorted(value, key=repr)
        return [(_plain(name, tensors), _plain(value[name], tensors)) for name in names]
    if isinstance(value, (list, tuple)):
        return [_plain(each, tensors) for each in value]
    if isinstance(value, functools.partial):
        return "partial", _plain((value.func, value.args, value.keywords), tensors)
    if value is None or isinstance(value, (Number, str, bytes, torch.dtype)):
        return value
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # of numpy
        return str(value.dtype), _plain(value.tolist(), tensors)
    return type(value).__name__, getattr(value, "__qualname__", "")
