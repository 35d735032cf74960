"""One pass from hidden states to a preference loss and its gradients: three products, not four.

A preference loss sees a token only through its sequence's sum, so the gradient of the logits is
one number per sequence times (onehot - p). As soon as the groups of a chunk are summed, their
loss and that number are known, while their logits, or exponentials of these, still lie in the
scratch buffer: the gradient is made in place and multiplied on. Groups with a zero gradient cost
their forward only.

Of a group that is longer than the buffer the last rows are treated so; the logits of the others
are computed a second time once the gradient of the group is known.

N tokens, V vocabulary, D hidden, S sequences, B groups of K sequences.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plad_fast.losses.objective import Objective, refuse_outside_gradients
from plad_fast.ops.backend import Denominators, HeadGradient, LinearProblem, Needs, sent
from plad_fast.ops.impl.workspace import HeadGradients, TokenStatistics, Workspace, compacting_order


def linear_preference_loss(
    problem: LinearProblem,
    scores: Tensor | None,  # (S,)
    reference_logps: Tensor | None,  # (S,)
    objective: Objective,
    denominators: Denominators,
    needs: Needs,
    counts: Tensor | None,  # (S,)
    bounds: Sequence[int] | None,  # (S + 1,)
    make_workspace: Callable[..., Workspace],
) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadGradient]:
    """Loss (), sums (S,), group losses (B,), whether a group is active (B,), and the gradients of
    the loss, in float32 for float16 inputs; those of weight and bias may be wider than these.

    Args:
        counts: targets of each sequence that are not ignored, which `make_workspace` then has to
            know; None for all.
        bounds: cu_seqlens as the host knows them, for which a GPU may be waited for without.
        make_workspace: what computes rows of logits and their gradients; without `counts` none of
            the targets is ignored.
    """
    problem = problem.on_one_device()
    workspace = make_workspace(
        problem.head, problem.options, len(problem.hidden), for_gradient=any(needs)
    )
    # Where reading a value waits for a GPU, what always is need not be asked for.
    asks = not (objective.always_active and workspace.reading_waits)
    if bounds is None and (asks or workspace.rows < len(problem.hidden)):
        bounds = problem.cu_seqlens.tolist()
    call = _OnePass(
        problem, (scores, reference_logps), objective, denominators, needs, counts, workspace
    )
    for group in _ranges(problem, objective.group_size, bounds, workspace):
        lengths = None
        if asks:
            assert bounds is not None
            size = objective.group_size
            own = bounds[group.first * size : group.last * size + 1]
            lengths = torch.tensor(own, device="cpu").diff()
        call.run(*group, lengths)
    results = call.results()
    dtype = None if call.half or workspace.keeps_wide else problem.weight.dtype
    del workspace, call.workspace  # the scratch is free before the gradient is copied
    return *results, call.grads.finish(dtype)


_ALIGNED_ROWS = 128
"""The steps in which the length of chunks is tried."""


class _Range(NamedTuple):
    """Consecutive groups that are run together, and their rows."""

    first: int
    last: int
    start: int
    stop: int


class _Found(NamedTuple):
    """Of some groups, detached."""

    sums: Tensor  # (groups, K)
    losses: Tensor  # (groups,)
    grad: Tensor  # (groups, K), of the value without its regulariser


class _OnePass:
    """A call in progress."""

    def __init__(
        self,
        problem: LinearProblem,
        constants: tuple[Tensor | None, Tensor | None],  # scores and reference_logps, (S,)
        objective: Objective,
        denominators: Denominators,
        needs: Needs,
        counts: Tensor | None,  # (S,)
        workspace: Workspace,
    ) -> None:
        self.problem = problem
        self.constants = constants
        self.objective = objective
        self.denominators = denominators
        self.workspace = workspace
        # float16 keeps float32 until backward: a loss scale comes only with the upstream.
        self.half = problem.hidden.dtype == torch.float16
        hidden_dtype = torch.float32 if self.half else workspace.grad_hidden_dtype
        self.grads = HeadGradients(
            problem.head,
            needs,
            workspace,
            hidden_dtype=hidden_dtype,
            weight_dtype=workspace.grad_weight_dtype,
        )
        counts = problem.cu_seqlens.diff() if counts is None else counts
        with torch.inference_mode(False):  # or autograd could not keep them
            self._counts = counts.clone() if counts.is_inference() else counts
            self._lengths = counts.clamp(min=1)
        # What the value is of each group's loss, and of the sums of a group.
        of_groups, of_tokens = denominators
        dtype = workspace.products.dtype
        one = torch.ones((), dtype=dtype, device=problem.hidden.device)
        self._of_losses = (one / of_groups).to(dtype)
        self._of_sums = None
        if objective.sft_weight:
            of_first = (one * (-objective.sft_weight / of_tokens)).to(dtype)
            self._of_sums = torch.nn.functional.pad(of_first[None], (0, objective.group_size - 1))
        self._found: list[_Found] = []

    def run(
        self,
        first: int,
        last: int,
        start: int,
        stop: int,
        host_lengths: Tensor | None,  # (sequences,) on the CPU; None if all have a gradient
    ) -> None:
        """Forward, loss and gradients of groups [first, last), whose rows are [start, stop)."""
        hidden, targets, workspace = self.problem.hidden, self.problem.targets, self.workspace
        size = self.objective.group_size
        chunks = _chunks_with_full_last(start, stop, workspace.rows)
        parts = [workspace.forward(hidden[rows], targets[rows]) for rows in chunks]
        offsets = self.problem.cu_seqlens[first * size : last * size + 1]
        found = [part.token_logprobs for part in parts]
        if len(found) != 1:
            found = [torch.cat([hidden.new_empty(0, dtype=workspace.products.dtype), *found])]
        sums = workspace.segment_sums(found[0], offsets, start)
        grad_sums = self._differentiate(slice(first * size, last * size), sums)
        if not (chunks and self.grads.wanted):
            return
        grad = workspace.expand_segments(grad_sums, offsets, start, stop - start)
        active = None
        if host_lengths is not None:
            active = (grad_sums.cpu() != 0).repeat_interleave(host_lengths)
        kept = chunks[-1].start - start
        self._backward_in_place(
            parts[-1], grad[kept:], None if active is None else active[kept:], start + kept
        )
        self._backward_anew(grad[:kept], None if active is None else active[:kept], start)

    def _differentiate(
        self,
        span: slice,  # of the S sequences
        sums: Tensor,  # (sequences,)
    ) -> Tensor:  # (sequences,)
        """Evaluate the loss of some groups and differentiate it by their sums."""
        shape = (-1, self.objective.group_size)
        # Also under inference mode: which groups are active is told by their gradients.
        with torch.inference_mode(False), torch.enable_grad():
            sums = sums.clone() if sums.is_inference() else sums
            leaf = sums.reshape(shape).detach().requires_grad_()
            counts, lengths = (x[span].reshape(shape) for x in (self._counts, self._lengths))
            scores, reference_logps = (
                None if c is None else c[span].reshape(shape).to(sums.dtype, copy=True)
                for c in self.constants
            )
            losses = self.objective.group_losses(leaf, counts, scores, reference_logps, lengths)
            refuse_outside_gradients(losses, leaf)
            grad = _gradient(losses, leaf, self._of_losses)
        self._found.append(_Found(leaf.detach(), losses.detach(), grad))
        # The value is linear in the group losses and in the first sums.
        return (grad if self._of_sums is None else grad + self._of_sums).reshape(-1)

    def _backward_in_place(
        self,
        statistics: TokenStatistics,
        grad: Tensor,  # (n,)
        active: Tensor | None,  # (n,) bool, on the CPU; None for all
        start: int,
    ) -> None:
        """What `Workspace.forward` left of all n rows is still in the buffer."""
        rows: Tensor | slice = slice(start, start + len(grad))
        targets = self.problem.targets[rows]
        order = None
        if active is not None and not active.all():
            if not active.any():
                return
            order = compacting_order(active)
            rows = sent(start + order, grad.device)
        d_logits = self.workspace.gradient(targets, statistics, grad, order=order)
        self.grads.add(d_logits, self.problem.hidden[rows], rows)

    def _backward_anew(
        self,
        grad: Tensor,  # (n,)
        active: Tensor | None,  # (n,) bool, on the CPU; None for all
        start: int,
    ) -> None:
        """The buffer has moved on: of these n rows the active ones are computed a second time."""
        if not len(grad):
            return
        if active is None:
            places = torch.arange(len(grad), device=grad.device)
        else:
            places = sent(active.nonzero().squeeze(1), grad.device)
        for chunk in self.workspace.chunks(len(places)):
            local = places[chunk]
            rows = start + local
            hidden, targets = self.problem.hidden[rows], self.problem.targets[rows]
            statistics = self.workspace.forward(hidden, targets)
            d_logits = self.workspace.gradient(targets, statistics, grad[local])
            self.grads.add(d_logits, hidden, rows)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss (), sums (S,), group losses (B,), active (B,) of all groups, in order."""
        if len(self._found) == 1:
            sums, losses, grad = self._found[0]
        else:
            empty = self._of_losses.new_empty(0)
            none = _Found(empty.reshape(0, self.objective.group_size), empty, empty.reshape(0, 1))
            sums, losses, grad = map(torch.cat, zip(*(self._found or [none]), strict=True))
        value = self.objective.value(losses, sums, self.denominators)
        return value, sums.reshape(-1), losses, (grad != 0).any(dim=1)


def _gradient(losses: Tensor, leaf: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weighted losses by the sums; 0 for losses that are constant in them."""
    if not losses.requires_grad:
        return torch.zeros_like(leaf)
    weights = weight.to(losses.dtype).expand_as(losses)
    (grad,) = torch.autograd.grad(losses, leaf, weights, allow_unused=True, materialize_grads=True)
    return grad


def _ranges(
    problem: LinearProblem, size: int, bounds: Sequence[int] | None, workspace: Workspace
) -> list[_Range]:
    """What is run together, of groups of `size` sequences."""
    num_groups, num_rows = (len(problem.cu_seqlens) - 1) // size, len(problem.hidden)
    if workspace.rows >= num_rows:
        return [_Range(0, num_groups, 0, num_rows)] if num_groups else []
    if bounds is None:
        bounds = problem.cu_seqlens.tolist()
    of_groups = bounds[::size]
    ranges = _packed_groups(of_groups, workspace.rows)
    if workspace.balances:
        ranges = _balanced_groups(of_groups, workspace.rows, ranges)
    return [_Range(a, b, of_groups[a], of_groups[b]) for a, b in ranges]


def _balanced_groups(
    bounds: Sequence[int], rows: int, ranges: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """As few ranges as these, but of nearly the same length: a GPU is idle in a short last one."""
    lengths = range(-(-bounds[-1] // len(ranges)), rows, _ALIGNED_ROWS)
    suffices = bisect.bisect_left(
        lengths, True, key=lambda length: len(_packed_groups(bounds, length)) <= len(ranges)
    )
    return _packed_groups(bounds, lengths[suffices]) if suffices < len(lengths) else ranges


def _packed_groups(bounds: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Consecutive ranges [first, last) of groups that fit `rows` together, or of one group.

    bounds: first row of every group, and the number of rows at the end.
    """
    ranges: list[tuple[int, int]] = []
    first = 0
    while first < len(bounds) - 1:
        last = max(first + 1, bisect.bisect_right(bounds, bounds[first] + rows) - 1)
        ranges.append((first, last))
        first = last
    return ranges


def _chunks_with_full_last(start: int, stop: int, rows: int) -> list[slice]:
    """Slices of `rows`, the first one shorter: the rows of the last need no second product."""
    bounds = [*range(stop, start, -rows), start]
    return [slice(a, b) for b, a in itertools.pairwise(bounds)][::-1] if stop > start else []
