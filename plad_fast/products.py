"""The three matrix products of an LM head, with float32 results from 16-bit operands.

    logits    z  = h W^T      (n, V)
    d_hidden  dh = d W        (n, D)
    d_weight  dW += d^T h     (V, D)

for a chunk of n of the N rows. d is float32 (float64 for float64 input). What a library product
of 16-bit operands returns is rounded to 16 bits, which for a logit of 20 is 0.04 nat; each
strategy below avoids that in the cheapest way its device has. Temporary blocks stay within
`block_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def products_for(hidden: Tensor, weight: Tensor, block_bytes: int) -> Products:
    """The strategy for this dtype and device."""
    assert hidden.dtype == weight.dtype
    if weight.dtype in (torch.float32, torch.float64):
        return Products(weight, block_bytes)
    if weight.is_cuda:
        return CudaHalfProducts(weight, block_bytes)
    if weight.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        return CpuBfloat16Products(weight, block_bytes)
    return UpcastProducts(weight, block_bytes)


class Products:
    """float32 and float64: the library's products as they are."""

    row_bytes_per_logit = 0
    """Scratch this strategy needs for each logit of a chunk, beside the logits themselves."""

    def __init__(self, weight: Tensor, block_bytes: int) -> None:
        self.weight = weight  # (V, D)
        self.dtype = accumulation_dtype(weight.dtype)
        self.block_bytes = block_bytes

    def logits(self, hidden: Tensor, out: Tensor) -> None:  # (n, D) -> (n, V)
        torch.mm(hidden, self.weight.T, out=out)

    def grad_hidden(self, d_logits: Tensor) -> Tensor:  # (n, V) -> (n, D)
        return d_logits @ self.weight

    def add_grad_weight(self, d_logits: Tensor, hidden: Tensor, out: Tensor) -> None:  # (V, D)
        out.addmm_(d_logits.T, hidden)

    def _vocab_blocks(self, chunk_rows: int = 0) -> Iterator[slice]:
        """Slices of the vocabulary: a float32 block of them, D or n wide, fits `block_bytes`."""
        vocab, width = self.weight.shape
        step = max(1, self.block_bytes // (4 * max(width, chunk_rows, 1)))
        for start in range(0, vocab, step):
            yield slice(start, min(start + step, vocab))


class UpcastProducts(Products):
    """16-bit operands widened block by block: exact, at the speed of float32."""

    def __init__(self, weight: Tensor, block_bytes: int) -> None:
        super().__init__(weight, block_bytes)
        # One block for the life of the strategy: fresh pages cost more than the conversion.
        rows = max((b.stop - b.start for b in self._vocab_blocks()), default=0)
        self._block = weight.new_empty(rows, weight.shape[1], dtype=self.dtype)

    def _widened(self, rows: slice) -> Tensor:
        return self._block[: rows.stop - rows.start].copy_(self.weight[rows])

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        hidden = hidden.to(self.dtype)
        for rows in self._vocab_blocks():
            torch.mm(hidden, self._widened(rows).T, out=out[:, rows])

    def grad_hidden(self, d_logits: Tensor) -> Tensor:
        total = d_logits.new_zeros(d_logits.shape[0], self.weight.shape[1])
        for rows in self._vocab_blocks():
            total.addmm_(d_logits[:, rows], self._widened(rows))
        return total

    def add_grad_weight(self, d_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
        out.addmm_(d_logits.T, hidden.to(self.dtype))


class CpuBfloat16Products(Products):
    """bfloat16 on a CPU that multiplies it natively, three to five times faster than float32.

    A logit is made of two 16-bit halves: hi = round(h W^T), then lo = round(h W^T - hi), where
    the subtraction happens in the product's float32 accumulator. hi + lo is good to 2**-17, and
    both products together still cost half of a float32 one.
    """

    row_bytes_per_logit = 2

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        for rows in self._vocab_blocks(len(hidden)):
            block = self.weight[rows].T
            high = hidden @ block
            low = torch.addmm(high, hidden, block, beta=-1)
            out[:, rows].copy_(high).add_(low)

    def grad_hidden(self, d_logits: Tensor) -> Tensor:
        return d_logits.to(self.weight.dtype) @ self.weight

    def add_grad_weight(self, d_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
        for rows in self._vocab_blocks(len(hidden)):
            out[rows].add_(d_logits[:, rows].T.to(self.weight.dtype) @ hidden)


class CudaHalfProducts(Products):
    """16-bit operands on tensor cores that hand out their float32 accumulators."""

    row_bytes_per_logit = 2

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        for rows in self._vocab_blocks(len(hidden)):
            out[:, rows] = torch.mm(hidden, self.weight[rows].T, out_dtype=self.dtype)

    def grad_hidden(self, d_logits: Tensor) -> Tensor:
        half, scale = self._halved(d_logits)
        return torch.mm(half, self.weight, out_dtype=self.dtype).mul_(scale)

    def add_grad_weight(self, d_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
        half, scale = self._halved(d_logits)
        for rows in self._vocab_blocks(len(hidden)):
            block = torch.mm(half[:, rows].T, hidden, out_dtype=self.dtype)
            out[rows].add_(block.mul_(scale))

    def _halved(self, d_logits: Tensor) -> tuple[Tensor, Tensor]:
        """d_logits in 16 bits with its largest entry at 1: float16 would lose small gradients."""
        scale = torch.linalg.vector_norm(d_logits, ord=torch.inf)
        scale = torch.where(scale > 0, scale, 1)
        return (d_logits / scale).to(self.weight.dtype), scale


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())
