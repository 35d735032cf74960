"""Counts of the op and of the one-pass loss on a GPU, forward and backward, without the GPU.

`cuda_recorder` says what is counted. N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cuda_recorder import H100, Device, Launch, Recorder, counting
from benchmarks.cuda_rules import RULES, Rule, target_for
from plad_fast.losses.registry import get_loss
from plad_fast.ops.logprobs import linear_sequence_logprobs
from plad_fast.ops.preference_losses import fused_linear_preference_loss


class Shape(NamedTuple):
    """Of a call: pairs of responses of `length` tokens each, under a head (V, D)."""

    tokens: int
    width: int
    vocab: int
    length: int = 256


A = Shape(8192, 4096, 128_256)
B = Shape(2048, 896, 151_936)
C = Shape(16_384, 2048, 248_320)


@dataclass(frozen=True)
class Counts:
    launches: tuple[Launch, ...] = field(repr=False)
    waits: tuple[str, ...]
    """Operation, file and line."""
    peak_bytes: int
    """Above hidden states, weight, targets and offsets: results, gradients and scratch."""
    weight_entries: int
    """V D."""

    def by_name(self, kind: str | None = None) -> Counter[str]:
        return Counter(x.name for x in self.launches if kind in (None, x.kind))

    def of_kind(self, *kinds: str) -> list[Launch]:
        return [x for x in self.launches if x.kind in kinds]

    @property
    def chunks(self) -> int:
        """Times that a gradient of logits was made, of some rows or of a part of the vocabulary."""
        return sum(x.makes_gradient for x in self.launches)

    @property
    def launches_per_chunk(self) -> float:
        """Beside library products, from one gradient of logits to the next; 0 if there is one."""
        places = [place for place, x in enumerate(self.launches) if x.makes_gradient]
        if len(places) < 2:
            return 0.0
        between = self.launches[places[0] : places[-1]]
        return sum(x.kind != "product" for x in between) / (len(places) - 1)

    @property
    def weight_grad_read(self) -> float:
        """Passes over the gradient of the weight, in whatever dtype it is kept meanwhile."""
        return sum(x.grad_read for x in self.launches) / self.weight_entries

    @property
    def weight_grad_written(self) -> float:
        return sum(x.grad_written for x in self.launches) / self.weight_entries

    @property
    def read(self) -> float:
        """Bytes."""
        return sum(x.read for x in self.launches)

    @property
    def written(self) -> float:
        """Bytes."""
        return sum(x.written for x in self.launches)

    @property
    def flops(self) -> float:
        return sum(x.flops for x in self.launches)


Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Of hidden (N, D), weight (V, D), targets (N,), cu_seqlens (S + 1,), and a gradient of the
sequence sums (S,), 0 for those of a pair that is not active."""


def count(
    run: Run,
    shape: Shape,
    *,
    active: float = 1.0,
    device: Device = H100,
    rules: Mapping[str, Rule] = RULES,
) -> Counts:
    """Of the second call of a function, with a share of the pairs active."""
    with counting(device, rules) as recorder:
        small = Shape(2 * shape.length, 64, 256, shape.length)
        for case in (small, shape):  # a first call may probe its loss, which waits
            hidden, weight, targets, bounds = _arguments(recorder, case, active)
            upstream = active_pairs(case, active).repeat_interleave(2).float()
            given = recorder.tensor(upstream)
            recorder.start(weight)
            run(hidden, weight, targets, bounds, given)
        launches, waits = tuple(recorder.launches), tuple(recorder.waits)
        return Counts(launches, waits, recorder.peak_bytes, shape.vocab * shape.width)


def count_op(shape: Shape, *, active: float = 1.0, device: Device = H100, **options: Any) -> Counts:
    """Of `linear_sequence_logprobs`, forward and backward."""

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, bounds: Tensor, upstream: Tensor
    ) -> None:
        sums = linear_sequence_logprobs(hidden, weight, targets, bounds, **options).sums
        torch.autograd.grad(sums, (hidden, weight), upstream)

    return count(run, shape, active=active, device=device)


def count_one_pass(
    shape: Shape,
    *,
    active: float = 1.0,
    loss: str = "plad_ranking",
    lengths_on_host: bool = True,
    device: Device = H100,
    **options: Any,
) -> Counts:
    """Of `fused_linear_preference_loss`, forward and backward, without a regulariser unless
    `sft_weight` is given.

    In a pair that is not active y+ is likelier than y- by 2 nats a token, which satisfies PLaD's
    hinge with its margin of 1. Log-probabilities under a reference are 0.

    Args:
        lengths_on_host: cu_seqlens is on the CPU, as the trainer passes it.
    """
    options = {"sft_weight": 0.0, **options}
    with_reference = get_loss(loss).needs_reference_for(options)

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, bounds: Tensor, upstream: Tensor
    ) -> None:
        reference = torch.zeros_like(upstream) if with_reference else None
        if lengths_on_host:
            bounds = torch.arange(len(bounds)) * shape.length
        result = fused_linear_preference_loss(
            hidden, weight, targets, bounds, loss=loss, reference_logps=reference, **options
        )
        torch.autograd.grad(result.loss, (hidden, weight))

    return count(run, shape, active=active, device=device)


def active_pairs(shape: Shape, active: float) -> Tensor:  # (B,) bool
    """Spread evenly over the others."""
    pairs = shape.tokens // (2 * shape.length)
    return (torch.arange(pairs + 1) * active).floor().diff() > 0


def _arguments(
    recorder: Recorder, shape: Shape, active: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D), targets (N,) and cu_seqlens (S + 1,) on the device."""
    satisfied = ~active_pairs(shape, active)
    unlikely = torch.stack([torch.zeros_like(satisfied), satisfied], dim=1).reshape(-1)
    targets = torch.where(unlikely, target_for(likely=False), target_for(likely=True))
    hidden = recorder.empty(shape.tokens, shape.width).requires_grad_()
    weight = recorder.empty(shape.vocab, shape.width).requires_grad_()
    return (
        hidden,
        weight,
        recorder.tensor(targets.repeat_interleave(shape.length)),
        recorder.tensor(torch.arange(len(unlikely) + 1) * shape.length),
    )
