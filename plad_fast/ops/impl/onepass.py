"""One pass from hidden states to a preference loss and its gradients: three products, not four.

A preference loss sees a token only through its sequence's sum, so the gradient of the logits is
one number per sequence times (onehot - p). As soon as the groups of a chunk are summed, their
loss and that number are known, while their exponentials still lie in the scratch buffer: the
gradient is made in place and multiplied on. Groups with a zero gradient cost their forward only.

Of a group that is longer than the buffer the last rows are treated so; the logits of the others
are computed a second time once the gradient of the group is known.

N tokens, V vocabulary, D hidden, S sequences, B groups of K sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plad_fast.losses.objective import Objective, refuse_outside_gradients
from plad_fast.ops.backend import Denominators, HeadGradient, LinearProblem, Needs
from plad_fast.ops.impl.workspace import HeadGradients, TokenStatistics, Workspace, compacting_order


def linear_preference_loss(
    problem: LinearProblem,  # none of its targets is ignored
    scores: Tensor | None,  # (S,)
    reference_logps: Tensor | None,  # (S,)
    objective: Objective,
    denominators: Denominators,
    needs: Needs,
    make_workspace: Callable[..., Workspace] = Workspace,
) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadGradient]:
    """Loss (), sums (S,), group losses (B,), whether a group is active (B,), and gradients.

    See `plad_fast.ops.backend.Backend`.

    Args:
        make_workspace: what computes rows of logits and their gradients.
    """
    hidden, weight, *_ = problem.head
    workspace = make_workspace(problem.head, problem.options, len(hidden), for_gradient=any(needs))
    wide = workspace.products.dtype
    # float16 keeps float32 until backward: a loss scale comes only with the upstream.
    half = hidden.dtype == torch.float16
    grads = HeadGradients(
        problem.head,
        needs,
        workspace.products,
        hidden_dtype=torch.float32 if half else workspace.grad_hidden_dtype or hidden.dtype,
    )
    losses = _GroupLosses(problem.cu_seqlens, scores, reference_logps, objective, denominators)
    for first, last in _packed_groups(losses.group_bounds, workspace.rows):
        _run_groups(workspace, grads, losses, problem, first, last)
    results = losses.results(hidden, wide)
    del workspace  # the scratch is free before a second copy of the gradient is made
    return *results, grads.finish(wide if half else weight.dtype)


class _Step(NamedTuple):
    """Upstream gradients of the sequences of some groups."""

    grad_sums: Tensor  # (sequences,)
    any_active: bool


class _GroupLosses:
    """The loss side: takes sums of whole groups, gives their gradients, collects the results."""

    def __init__(
        self,
        cu_seqlens: Tensor,  # (S + 1,)
        scores: Tensor | None,  # (S,)
        reference_logps: Tensor | None,  # (S,)
        objective: Objective,
        denominators: Denominators,
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.constants = scores, reference_logps
        self.objective = objective
        self.denominators = denominators
        self.group_bounds: list[int] = cu_seqlens[:: objective.group_size].tolist()
        self._sums: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._active: list[Tensor] = []
        self._value: list[Tensor] = []

    def offsets(self, first: int, last: int) -> Tensor:
        """cu_seqlens of groups [first, last), counted from their first row."""
        size = self.objective.group_size
        offsets = self.cu_seqlens[first * size : last * size + 1]
        return offsets - offsets[0]

    def step(self, first: int, last: int, sums: Tensor) -> _Step:
        """Evaluate the loss of groups [first, last) and differentiate it by their sums."""
        size = self.objective.group_size
        shape = (-1, size)
        span = slice(first * size, last * size)
        # Also under inference mode: which groups are active is told by their gradients.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = sums.clone().reshape(shape).requires_grad_()
            counts = self.offsets(first, last).diff().reshape(shape)
            constants = (
                None if c is None else c[span].reshape(shape).to(sums.dtype, copy=True)
                for c in self.constants
            )
            losses = self.objective.group_losses(leaf, counts, *constants)
            refuse_outside_gradients(losses, leaf)
            of_losses = _gradient(losses, leaf)
        # The value is linear in the group losses and in the first sums: the rest is arithmetic.
        of_groups, of_tokens = self.denominators
        grad = of_losses / of_groups
        if self.objective.sft_weight:
            grad[:, 0] -= self.objective.sft_weight / of_tokens
        value = self.objective.value(losses.detach(), leaf.detach(), self.denominators)
        self._sums.append(sums)
        self._losses.append(losses.detach())
        self._active.append((of_losses != 0).any(dim=1))
        self._value.append(value)
        return _Step(grad.reshape(-1), bool((grad != 0).any()))

    def results(self, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss (), sums (S,), group losses (B,), active (B,) of all groups seen, in order."""
        empty = hidden.new_empty(0, dtype=dtype)
        return (
            torch.stack(self._value).sum() if self._value else hidden.new_zeros((), dtype=dtype),
            torch.cat([empty, *self._sums]),
            torch.cat([empty, *self._losses]),
            torch.cat([empty.bool(), *self._active]),
        )


def _gradient(losses: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of each group's loss by its sums; 0 for a loss that is constant in them."""
    if not losses.requires_grad:
        return torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True, materialize_grads=True)
    return grad


def _packed_groups(bounds: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Consecutive ranges [first, last) of groups that fit `rows` together, or of one group.

    bounds: first row of every group, and the number of rows at the end.
    """
    ranges: list[tuple[int, int]] = []
    first = 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= rows:
            last += 1
        ranges.append((first, last))
        first = last
    return ranges


def _run_groups(
    workspace: Workspace,
    grads: HeadGradients,
    losses: _GroupLosses,
    problem: LinearProblem,
    first: int,
    last: int,
) -> None:
    """Forward, loss and gradients of groups [first, last)."""
    hidden, targets = problem.hidden, problem.targets
    start, stop = losses.group_bounds[first], losses.group_bounds[last]
    chunks = _chunks_with_full_last(start, stop, workspace.rows)
    parts = [workspace.forward(hidden[rows], targets[rows]) for rows in chunks]
    offsets = losses.offsets(first, last)
    empty = hidden.new_empty(0, dtype=workspace.products.dtype)
    token_logprobs = torch.cat([empty, *(part.token_logprobs for part in parts)])
    step = losses.step(first, last, workspace.segment_sums(token_logprobs, offsets))
    if not (chunks and grads.wanted and step.any_active):
        return
    grad = step.grad_sums.repeat_interleave(offsets.diff(), output_size=stop - start)
    kept = chunks[-1].start - start
    _backward_in_place(workspace, grads, parts[-1], grad[kept:], problem, start + kept)
    _backward_anew(workspace, grads, grad[:kept], problem, start)


def _chunks_with_full_last(start: int, stop: int, rows: int) -> list[slice]:
    """Slices of `rows`, the first one shorter: the rows of the last need no second product."""
    bounds = [*range(stop, start, -rows), start]
    return [slice(a, b) for b, a in itertools.pairwise(bounds)][::-1] if stop > start else []


def _backward_in_place(
    workspace: Workspace,
    grads: HeadGradients,
    statistics: TokenStatistics,
    grad: Tensor,  # (n,)
    problem: LinearProblem,
    start: int,
) -> None:
    """The exponentials of all n rows are still in the buffer."""
    active = grad != 0
    rows: Tensor | slice = slice(start, start + len(grad))
    order = None
    if not active.all():
        order = compacting_order(active)
        if not len(order):
            return
        rows = start + order
    targets = problem.targets[start : start + len(grad)]
    d_logits = workspace.gradient(targets, statistics, grad, order=order)
    grads.add(d_logits, problem.hidden[rows], rows)


def _backward_anew(
    workspace: Workspace,
    grads: HeadGradients,
    grad: Tensor,  # (n,)
    problem: LinearProblem,
    start: int,
) -> None:
    """The buffer has moved on: of these n rows the active ones are computed a second time."""
    active = (grad != 0).nonzero().squeeze(1)
    for chunk in workspace.chunks(0, len(active)):
        local = active[chunk]
        rows = start + local
        hidden, targets = problem.hidden[rows], problem.targets[rows]
        statistics = workspace.forward(hidden, targets)
        grads.add(workspace.gradient(targets, statistics, grad[local]), hidden, rows)
