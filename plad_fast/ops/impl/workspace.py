"""Scratch memory for logits, one buffer that every chunk of rows reuses, and accumulators of the
head's gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from plad_fast.losses.terms import segment_sums
from plad_fast.ops.backend import Head, HeadGradient, HeadOptions, Needs, sent
from plad_fast.ops.impl.products import Operand, Products, products_for
from plad_fast.ops.impl.softmax_rows import SoftmaxStatistics, logits_gradient_, softmax_rows_

BLOCK_SHARE = 16
"""The share of the budget that goes to blocks of the weight; the rest holds logits."""


class TokenStatistics(Protocol):
    """What `Workspace.forward` hands to `Workspace.gradient`."""

    @property
    def token_logprobs(self) -> Tensor: ...  # (n,)


class Workspace:
    """Logits of `rows` tokens at a time, and what is done with them.

    Args:
        head: hidden (N, D), of which dtype and device are used, weight (V, D) and bias (V,).
        options: their budget is what all temporaries together may take; at least one row of logits
            is used.
        num_rows: how many rows there are to compute, at most.
        for_gradient: whether `gradient` will be called, which softcapped logits pay extra for.
    """

    grad_hidden_dtype: torch.dtype | None = None
    """In which the gradient of the hidden states is kept; None for their own."""

    grad_weight_dtype: torch.dtype | None = None
    """In which the gradient of the weight is kept; None for float32 (float64)."""

    keeps_wide = False
    """Whether gradients of weight and bias leave a one-pass loss as they were accumulated: on a GPU
    the kernel that scales them also rounds them, which saves a pass over a gradient."""

    balances = False
    """Whether chunks of groups shall have nearly the same length."""

    reading_waits = False
    """Whether the host should not ask for values that it can do without."""

    def __init__(
        self, head: Head, options: HeadOptions, num_rows: int, *, for_gradient: bool
    ) -> None:
        hidden, weight, self.bias = head
        self.options = options
        scratch_bytes = options.scratch_on(hidden.device)
        block_bytes = scratch_bytes // BLOCK_SHARE
        self.products: Products = products_for(weight, block_bytes)
        vocab = weight.shape[0]
        dtype = self.products.dtype
        # Softcapped logits keep the derivative of the cap in a second buffer.
        keep_slope = for_gradient and options.softcap is not None
        bytes_per_logit = dtype.itemsize * (2 if keep_slope else 1)
        bytes_per_logit += self.products.extra_bytes_per_logit
        # Beside its logits a row has its hidden state, its gradient, and a copy in another dtype.
        bytes_per_row = vocab * bytes_per_logit + 3 * weight.shape[1] * dtype.itemsize
        budget = (scratch_bytes - block_bytes) // max(bytes_per_row, 1)
        self.rows = max(1, min(budget, num_rows))
        # Rows handled together where another copy of their logits is unavoidable.
        self.block_rows = max(1, block_bytes // max(3 * vocab * dtype.itemsize, 1))
        self._buffer = hidden.new_empty(self.rows, vocab, dtype=dtype)
        self._slope = torch.empty_like(self._buffer) if keep_slope else None

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Slices of [0, num_rows) that fit, all of nearly the same length."""
        count = -(-num_rows // self.rows)
        for i in range(count):
            yield slice(i * num_rows // count, (i + 1) * num_rows // count)

    def forward(
        self,
        hidden: Tensor,  # (n, D)
        targets: Tensor,  # (n,)
        entropy_order: int = 0,
    ) -> SoftmaxStatistics:
        """Statistics of n <= rows tokens; what the gradient is made of stays in the buffer."""
        buffer, slope = self._buffers(len(hidden))
        self.products.logits(hidden, out=buffer)
        return softmax_rows_(
            buffer, targets, self.options, self.bias, slope, entropy_order, self.block_rows
        )

    def gradient(
        self,
        targets: Tensor,  # (n,)
        statistics: TokenStatistics,  # of the same n rows, as `forward` gave it
        grad_logprobs: Tensor,  # (n,)
        grad_lse: Tensor | None = None,  # (n,)
        order: Tensor | None = None,  # (m,) on the CPU, from `compacting_order`
    ) -> Tensor | Operand:  # (m, V), or (n, V) without an order
        """The gradient of the raw product of the rows order[0], order[1], ..., or of all.

        It is made in the buffer and takes the place of what `forward` has left there.
        """
        assert isinstance(statistics, SoftmaxStatistics)
        if order is not None:
            self._keep_rows_(order)
            order = sent(order, targets.device)
            targets, grad_logprobs = targets[order], grad_logprobs[order]
            statistics = statistics.take(order)
            grad_lse = None if grad_lse is None else grad_lse[order]
        buffer, slope = self._buffers(len(targets))
        if buffer.shape[1]:
            columns, owned = self._columns(targets)
            logits_gradient_(
                buffer, columns, self.options, statistics, grad_logprobs, grad_lse, slope, owned
            )
        return buffer

    def _columns(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where in the buffer the targets are, and which of them; None for all."""
        return targets, None

    def _buffers(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The first rows of the buffer, and of the one for the derivative of the cap."""
        return self._buffer[:count], None if self._slope is None else self._slope[:count]

    def segment_sums(
        self,
        values: Tensor,  # (n,)
        cu_seqlens: Tensor,  # (S + 1,), of which the first is `origin`
        origin: int,
    ) -> Tensor:  # (S,)
        """Sums of consecutive values, in a fixed order."""
        return segment_sums(values, cu_seqlens - origin if origin else cu_seqlens)

    def expand_segments(
        self,
        values: Tensor,  # (S,)
        cu_seqlens: Tensor,  # (S + 1,), from `origin` to origin + num_tokens
        origin: int,
        num_tokens: int,
    ) -> Tensor:  # (num_tokens,)
        """A number of each sequence to one of each of its tokens."""
        return values.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)

    @staticmethod
    def scale_rows(
        factors: tuple[Tensor, Tensor],  # (n,) each
        rows: Tensor | slice,  # n of N
        product: tuple[Tensor, Tensor] | None,  # (n, D) and (N, D)
        hidden: tuple[Tensor, Tensor] | None,  # (n, D) each, which may be the same
    ) -> None:
        """Rows of the first of each pair times both factors, rounded into the second: into `rows`
        of the product's. Static, so that a reference to it does not keep the buffer alive.
        """
        scale = torch.mul(*factors).unsqueeze(1)
        if product is not None:
            _write(*product, rows, scale)
        if hidden is not None:
            torch.mul(hidden[0], scale, out=hidden[1])

    def _keep_rows_(self, order: Tensor) -> None:
        """Bring the buffer's rows order[0], order[1], ... to its front."""
        sources, places = sent(torch.stack(moves(order)), self._buffer.device)
        for buffer in (self._buffer, self._slope):
            if buffer is not None:
                for some in range(0, len(places), self.block_rows):
                    block = slice(some, some + self.block_rows)
                    buffer.index_copy_(0, places[block], buffer.index_select(0, sources[block]))


def compacting_order(active: Tensor) -> Tensor:  # (n,) bool -> (number of active,) int64
    """Active rows in the order in which they fill the front with the fewest moves.

    An active row inside the front stays where it is; the others fill the gaps in ascending order.
    Sources and gaps never overlap, so the rows can be moved in place.
    """
    rows = active.nonzero().squeeze(1)
    front = len(rows)
    order = torch.arange(front, device=active.device)
    gaps = (~active[:front]).nonzero().squeeze(1)
    order[gaps] = rows[rows >= front]
    return order


def moves(order: Tensor) -> tuple[Tensor, Tensor]:
    """Of an order on the CPU: rows that leave their place, and the places that they take."""
    places = (order != torch.arange(len(order), device="cpu")).nonzero().squeeze(1)
    return order[places], places


class HeadGradients:
    """Accumulators for the gradients of an LM head; None where a gradient is not wanted.

    Sums over tokens are kept in float32 (float64), each chunk added in turn: no atomics, so the
    same inputs give the same bits, on the CPU for one number of threads.

    Args:
        hidden_dtype: None for the hidden states' own.
        weight_dtype: None for float32 (float64); where a single chunk will be added, also the
            weight's own, to which the sum is rounded once.
    """

    def __init__(
        self,
        head: Head,
        needs: Needs,
        workspace: Workspace,
        *,
        hidden_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        hidden, weight, bias = (
            leaf if need else None for leaf, need in zip(head, needs, strict=True)
        )
        self.products = products = workspace.products
        self._scale_rows = workspace.scale_rows
        self.hidden = None if hidden is None else torch.zeros_like(hidden, dtype=hidden_dtype)
        weight_dtype = weight_dtype or products.dtype
        self.weight = None if weight is None else torch.empty_like(weight, dtype=weight_dtype)
        self._weight_is_empty = True
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=products.dtype)

    @property
    def wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(
        self,
        d_logits: Tensor | Operand,  # (n, V), may be overwritten
        hidden: Tensor,  # (n, D); a copy that may be overwritten unless `rows` is a slice
        rows: Tensor | slice,  # which of the N rows these are
    ) -> None:
        if self.bias is not None:
            assert not (isinstance(d_logits, Operand) and d_logits.of_rows is not None)
            self.bias += _column_sums(d_logits, self.products.dtype)
        operand = d_logits if isinstance(d_logits, Operand) else self.products.operand(d_logits)
        product = None
        if self.hidden is not None:
            product = self.products.grad_hidden(operand), self.hidden
        if operand.of_rows is not None:
            scaled = None
            if self.weight is not None:
                # Rows that were gathered belong to nobody else.
                own = torch.empty_like(hidden) if isinstance(rows, slice) else hidden
                scaled = hidden, own
                hidden = own
            self._scale_rows(operand.of_rows, rows, product, scaled)
        elif product is not None:
            _write(*product, rows)
        if self.weight is not None:
            overwrite, self._weight_is_empty = self._weight_is_empty, False
            if self.weight.dtype == self.products.dtype:
                self.products.add_grad_weight(operand, hidden, self.weight, overwrite=overwrite)
            else:
                assert overwrite
                self.products.write_grad_weight(operand, hidden, self.weight)

    def finish(self, dtype: torch.dtype | None) -> HeadGradient:
        """To be called after the last chunk. Gradients of weight and bias are cast to `dtype`, or
        left as they are.
        """
        weight, bias = self.weight, self.bias
        self.weight = None  # a float32 accumulator is freed as soon as its copy is made
        if weight is not None and self._weight_is_empty:
            weight.zero_()
        if dtype is None:
            return HeadGradient(self.hidden, weight, bias)
        return HeadGradient(
            self.hidden,
            None if weight is None else weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )


def _write(
    values: Tensor, matrix: Tensor, rows: Tensor | slice, scale: Tensor | None = None
) -> None:
    """matrix[rows] = values * scale, rounded."""
    out = matrix[rows] if isinstance(rows, slice) else matrix.new_empty(values.shape)
    out.copy_(values) if scale is None else torch.mul(values, scale, out=out)
    if not isinstance(rows, slice):
        matrix[rows] = out


def _column_sums(d_logits: Tensor | Operand, dtype: torch.dtype) -> Tensor:  # (V,)
    if isinstance(d_logits, Operand):
        sums = d_logits.values.sum(dim=0, dtype=dtype)
        return sums if d_logits.scale is None else sums * d_logits.scale
    return d_logits.sum(dim=0)
