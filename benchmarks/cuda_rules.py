"""What each kernel of Triton touches, and what a run without a GPU takes it to find.

A kernel that is launched under `benchmarks.cuda_recorder` needs a rule in `RULES`. Where the host
reads what depends on a kernel's results, `invented` has to know them, too: it goes by the names of
the kernel's arguments, and the log-probability of a token follows from its target.

N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = Mapping[str, Any]
"""Of a launch, by the names in the kernel's signature; a tensor descriptor is its tensor."""

_LIKELY, _UNLIKELY = -1.0, -3.0  # nats


class Touched(NamedTuple):
    """What a launch does to memory, each part as (tensor, bytes)."""

    read: list[tuple[Tensor, float]]
    written: list[tuple[Tensor, float]]
    flops: float = 0.0


class Rule(NamedTuple):
    touched: Callable[[Arguments], Touched]
    makes_gradient: bool = False
    """Whether a launch makes the gradient of a chunk of logits."""


def size_of(tensor: Tensor) -> float:
    """Bytes of what a tensor shows; what is repeated lies in memory once."""
    shown = (n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s != 0)
    return float(math.prod(shown) * tensor.element_size())


def sized(tensors: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
    return [(tensor, size_of(tensor)) for tensor in tensors]


def once(arguments: Arguments, written: Sequence[str]) -> Touched:
    """Every tensor once: written where it is named, else read. One given twice counts once."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    out = [tensors[name] for name in written if name in tensors]
    places = {id(tensor) for tensor in out}
    read = {id(t): t for k, t in tensors.items() if k not in written and id(t) not in places}
    return Touched(sized(list(read.values())), sized(out))


_STATISTICS = ("logprobs_ptr", "lse_ptr", "tail_ptr", "miss_ptr", "entropy_ptr")


def _linear_forward(arguments: Arguments) -> Touched:
    """The weight once: tiles of tokens that run together share it in the L2."""
    written = ["max_ptr", "rest_ptr", "z_target_ptr"]
    others = dict(arguments)
    if arguments["ENTROPY_ORDER"]:
        written.append("moment_ptr")
    else:
        del others["moment_ptr"]
    return once(others, written)._replace(flops=_flops(arguments))


def _flops(arguments: Arguments) -> float:
    return 2.0 * arguments["num_tokens"] * arguments["vocab"] * arguments["width"]


def _rows_forward(arguments: Arguments) -> Touched:
    return once(arguments, _STATISTICS if arguments["ENTROPY_ORDER"] else _STATISTICS[:-1])


def _rows_backward(arguments: Arguments) -> Touched:
    """Every row that is written is read once, also in place."""
    logits, out = arguments["logits_ptr"], arguments["out_ptr"]
    others = once({k: v for k, v in arguments.items() if v is not logits and v is not out}, ())
    read = (logits, float(out.numel() * logits.element_size()))
    return Touched([read, *others.read], sized([out]))


def _move_rows(arguments: Arguments) -> Touched:
    values, sources, places = (arguments[f"{x}_ptr"] for x in ("values", "sources", "places"))
    moved = (values, float(len(sources) * values.shape[1] * values.element_size()))
    return Touched([moved, *sized([sources, places])], [moved])


def _scale_rows(arguments: Arguments) -> Touched:
    """As many rows as are read are written, wherever they go."""
    written, read = [], sized([arguments["grads_ptr"], arguments["factors_ptr"]])
    if arguments["HAS_ROWS"]:
        read += sized([arguments["rows_ptr"]])
    for name in ("first", "second")[: 1 + arguments["HAS_SECOND"]]:
        values, out = arguments[f"{name}_ptr"], arguments[f"{name}_out_ptr"]
        read += sized([values])
        written.append((out, float(values.numel() * out.element_size())))
    return Touched(read, written)


RULES: dict[str, Rule] = {
    "_linear_forward_kernel": Rule(_linear_forward),
    "_combine_kernel": Rule(_rows_forward),
    "_logits_gradient_kernel": Rule(
        lambda a: once(a, ("out_ptr",))._replace(flops=_flops(a)), makes_gradient=True
    ),
    "_logits_rows_forward_kernel": Rule(_rows_forward),
    "_logits_rows_backward_kernel": Rule(_rows_backward, makes_gradient=True),
    "_exponential_rows_kernel": Rule(
        lambda a: once(a, ("logprobs_ptr", "factor_ptr", "out_ptr")), makes_gradient=True
    ),
    "_move_rows_kernel": Rule(_move_rows),
    "_scale_rows_kernel": Rule(_scale_rows),
    "_segment_sums_kernel": Rule(lambda a: once(a, ("sums_ptr",))),
    "_expand_segments_kernel": Rule(lambda a: once(a, ("out_ptr",))),
}
"""By the name of the kernel."""


def target_for(likely: bool) -> int:
    """The target of a token whose log-probability is taken to be -1 (likely) or -3 nats."""
    return 0 if likely else 1


def invented(arguments: Arguments, known: Callable[[Any], Tensor | None]) -> dict[str, Tensor]:
    """Values of a launch's small results, by the names of its arguments.

    known: the values of an argument, if it is a tensor whose values are known.
    """
    found: dict[str, Tensor] = {}
    targets = known(arguments.get("targets_ptr"))
    if targets is not None and "ignore_index" in arguments:
        counted = targets != arguments["ignore_index"]
        values = torch.where(targets % 2 == 0, _LIKELY, _UNLIKELY).where(counted, 0.0)
        found["logprobs_ptr"] = values
        found["lse_ptr"] = -values
        found["tail_ptr"] = torch.zeros_like(values)
        found["miss_ptr"] = 1 - values.exp()
    values, bounds = known(arguments.get("values_ptr")), known(arguments.get("cu_seqlens_ptr"))
    if values is not None and bounds is not None:
        if "sums_ptr" in arguments:
            bounds = bounds - arguments["origin"]
            before = torch.cat([values.new_zeros(1), values.reshape(-1).cumsum(0)])
            found["sums_ptr"] = before[bounds[1:]] - before[bounds[:-1]]
        else:
            found["out_ptr"] = values.repeat_interleave(bounds.diff())
    return found
