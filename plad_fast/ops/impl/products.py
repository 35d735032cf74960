"""The three matrix products of an LM head, with float32 results from 16-bit operands.

    logits    z  = h W^T      (n, V)
    d_hidden  dh = d W        (n, D)
    d_weight  dW += d^T h     (V, D)

for a chunk of n of the N rows; d is the gradient of z. What a library product of 16-bit operands
returns is rounded to 16 bits, which for a logit of 20 is 0.04 nat; each strategy below avoids
that in the cheapest way its device has. Temporary blocks stay within `block_bytes`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_FLOAT16_TOP = 2.0**14
_CACHED_BYTES = 3 * 2**19
"""Of a block that a CPU finds in its cache when it needs it again."""
_AMX_COLUMNS = 32  # of 16 bits, in a tile
# Entries of 1,024 tiles of 128 x 128, which keep a GPU busy for several waves.
_NEVER_CUT = 2**24
# Until 2.10 torch wants what a product of 16-bit operands is added to in 16 bits as well.
_ADDS_TO_WIDE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
_X86 = ("x86_64", "amd64", "x86", "i386", "i686")
# Values of oneDNN's environment variable that keep it from a unit.
_WITHOUT_AVX512_BF16 = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"),
)
_WITHOUT_AMX = (*_WITHOUT_AVX512_BF16, "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")
_X86_UNITS = {
    "AVX512-BF16": ("_is_avx512_bf16_supported", _WITHOUT_AVX512_BF16),
    "AMX": ("_is_amx_tile_supported", _WITHOUT_AMX),
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def products_for(weight: Tensor, block_bytes: int) -> Products:
    """The strategy for this dtype and device."""
    if weight.dtype in (torch.float32, torch.float64):
        return Products(weight, block_bytes)
    if weight.is_cuda and not torch.version.hip:
        return CudaHalfProducts(weight, block_bytes)
    on_cpu = weight.device.type == "cpu"
    if on_cpu and weight.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        return CpuBfloat16Products(weight, block_bytes)
    return UpcastProducts(weight, block_bytes)


class Operand(NamedTuple):
    """The gradient of a chunk's logits as the products want it."""

    values: Tensor  # (n, V)
    scale: Tensor | None = None
    """(), what results are to be multiplied by; None for 1."""
    of_rows: tuple[Tensor, Tensor] | None = None
    """(n,) each: rows are to be multiplied by both, outside of the products; None for 1."""


class Products:
    """float32 and float64: the library's products as they are."""

    extra_bytes_per_logit = 0
    """Scratch this strategy needs for each logit of a chunk, beside the logits themselves."""

    def __init__(self, weight: Tensor, block_bytes: int) -> None:
        self.weight = weight  # (V, D)
        self.dtype = accumulation_dtype(weight.dtype)
        if weight.device.type == "cpu":
            block_bytes = min(block_bytes, _CACHED_BYTES)
        self.block_bytes = block_bytes

    def logits(self, hidden: Tensor, out: Tensor) -> None:  # (n, D) -> (n, V)
        on_cpu = self.weight.device.type == "cpu"
        for rows in self._vocab_blocks() if on_cpu else [slice(None)]:
            torch.mm(hidden, self.weight[rows].T, out=out[:, rows])

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of `Operand.values`."""
        return self.dtype

    @property
    def scales_operands(self) -> bool:
        """Whether `operand_scale` is ever another than None, and a bound worth its price."""
        return False

    def operand_scale(self, bound: Tensor) -> Tensor | None:
        """The scale of an operand whose unscaled entries are at most `bound` (), in magnitude."""
        return None

    def operand(self, d_logits: Tensor) -> Operand:  # (n, V), which may be overwritten
        return Operand(d_logits)

    def grad_hidden(self, operand: Operand) -> Tensor:  # (n, D)
        return operand.values @ self.weight

    def add_grad_weight(
        self,
        operand: Operand,
        hidden: Tensor,  # (n, D)
        out: Tensor,  # (V, D)
        *,
        overwrite: bool,
    ) -> None:
        """Add the product to `out`, or write it there: a first chunk needs no zeros to add to."""
        torch.addmm(out, operand.values.T, hidden, beta=0 if overwrite else 1, out=out)

    def add_grad_hidden(
        self,
        operand: Operand,
        out: Tensor,  # (n, D), of self.dtype
        *,
        overwrite: bool,
    ) -> None:
        """Add `grad_hidden` to `out`, or write it there."""
        product = self.grad_hidden(operand)
        out.copy_(product) if overwrite else out.add_(product)

    def write_grad_weight(
        self,
        operand: Operand,
        hidden: Tensor,  # (n, D)
        out: Tensor,  # (V, D), of the weight's dtype
    ) -> None:
        """The product of all rows that there are: summed in self.dtype, and rounded once."""
        wide = out if out.dtype == self.dtype else torch.empty_like(out, dtype=self.dtype)
        self.add_grad_weight(operand, hidden, wide, overwrite=True)
        if wide is not out:
            out.copy_(wide)

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

    def grad_hidden(self, operand: Operand) -> Tensor:
        total = operand.values.new_zeros(len(operand.values), self.weight.shape[1])
        for rows in self._vocab_blocks():
            total.addmm_(operand.values[:, rows], self._widened(rows))
        return total

    def add_grad_weight(
        self, operand: Operand, hidden: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        super().add_grad_weight(operand, hidden.to(self.dtype), out, overwrite=overwrite)


class CpuBfloat16Products(Products):
    """bfloat16 on a CPU that multiplies it natively, three to five times faster than float32.

    A logit is made of two 16-bit halves: high = round(h W^T), then low = round(h W^T - high),
    where the subtraction happens in the product's float32 accumulator. high + low is good to
    2**-17, and both products together still cost half of a float32 one.
    """

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        for columns in self._vocab_blocks(len(hidden)):
            self.logits_of(hidden, columns, out[:, columns])

    def logits_of(
        self,
        hidden: Tensor,  # (n, D)
        columns: slice,  # a block of the V
        out: Tensor,  # (n, width of the block)
        *,
        may_be_infinite: bool = True,
    ) -> None:
        """A block of the logits. Where they may not be infinite, those that are become NaN."""
        weight = self.weight[columns].T
        high = hidden @ weight
        out.copy_(high)
        low = high.addmm_(hidden, weight, beta=-1)
        if may_be_infinite:  # inf - inf; the high half alone is right
            low.nan_to_num_(nan=0.0)
        out.add_(low)

    @property
    def operand_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def operand(self, d_logits: Tensor) -> Operand:
        """In the memory of `d_logits`: a row's values in the front half of the row itself."""
        vocab = d_logits.shape[1]
        halves = d_logits.view(self.weight.dtype)
        values = halves[:, :vocab]
        step = max(1, self.block_bytes // max(2 * vocab, 1))
        for wide, narrow in zip(d_logits.split(step), values.split(step), strict=True):
            narrow.copy_(wide.to(self.weight.dtype))
        # oneDNN's AMX product reads what follows the end of a row, and takes it times 0.
        halves[:, vocab : vocab + _AMX_COLUMNS].zero_()
        return Operand(values)

    def grad_hidden(self, operand: Operand) -> Tensor:
        return operand.values @ self.weight

    def add_grad_weight(
        self, operand: Operand, hidden: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        for rows in self._vocab_blocks():
            product = operand.values[:, rows].T @ hidden
            out[rows].copy_(product) if overwrite else out[rows].add_(product)

    def write_grad_weight(self, operand: Operand, hidden: Tensor, out: Tensor) -> None:
        # The library makes a transposed copy of what it is given.
        step = max(1, 2 * self.block_bytes // max(len(hidden), 1))
        for some in range(0, len(out), step):
            rows = slice(some, some + step)
            torch.mm(operand.values[:, rows].T, hidden, out=out[rows])


class CudaHalfProducts(Products):
    """16-bit operands on tensor cores that hand out their float32 accumulators."""

    extra_bytes_per_logit = 2

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=out)

    @property
    def operand_dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def scales_operands(self) -> bool:
        return self.weight.dtype == torch.float16

    def operand_scale(self, bound: Tensor) -> Tensor | None:
        if not self.scales_operands:
            return None
        # float16 loses what is small: the largest possible entry is brought near its upper end.
        # Its inverse must be finite too.
        return (bound / _FLOAT16_TOP).clamp(min=2.0**-100)

    def operand(self, d_logits: Tensor) -> Operand:
        scale = None
        if self.scales_operands and d_logits.numel():
            scale = self.operand_scale(torch.linalg.vector_norm(d_logits, ord=torch.inf))
            assert scale is not None
            d_logits.div_(scale)
        return Operand(d_logits.to(self.weight.dtype), scale)

    def grad_hidden(self, operand: Operand) -> Tensor:
        product = torch.mm(operand.values, self.weight, out_dtype=self.dtype)
        return product if operand.scale is None else product.mul_(operand.scale)

    def add_grad_weight(
        self, operand: Operand, hidden: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        transposed = operand.values.T
        if overwrite and out.dtype == self.dtype:
            torch.mm(transposed, hidden, out_dtype=self.dtype, out=out)
            if operand.scale is not None:
                out.mul_(operand.scale)
            return
        if operand.scale is None and not overwrite and _ADDS_TO_WIDE:
            torch.addmm(out, transposed, hidden, out_dtype=self.dtype, out=out)
            return
        # A scale lies on the device: waiting for it would cost more than a pass over a block.
        for rows in self._vocab_blocks():
            product = torch.mm(transposed[rows], hidden, out_dtype=self.dtype)
            if operand.scale is not None:
                product.mul_(operand.scale)
            out[rows].copy_(product) if overwrite else out[rows].add_(product)

    def add_grad_hidden(self, operand: Operand, out: Tensor, *, overwrite: bool) -> None:
        if operand.scale is not None or not _ADDS_TO_WIDE:
            super().add_grad_hidden(operand, out, overwrite=overwrite)
            return
        beta = 0 if overwrite else 1
        torch.addmm(out, operand.values, self.weight, out_dtype=self.dtype, beta=beta, out=out)

    def write_grad_weight(self, operand: Operand, hidden: Tensor, out: Tensor) -> None:
        # A result of few tiles cuBLAS may sum over parts of the tokens, and round between these
        # (torch.backends.cuda.matmul's reduced precision); in float32 it has nothing to round.
        if operand.scale is None and out.numel() >= _NEVER_CUT:
            torch.mm(operand.values.T, hidden, out=out)
        else:
            self.add_grad_weight(operand, hidden, out, overwrite=True)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has units for bfloat16 products, which are slower than float32 ones else."""
    return bool(cpu_bfloat16_units())


def cpu_bfloat16_units() -> tuple[str, ...]:
    """Names of what multiplies bfloat16 on this CPU; none where it would be emulated.

    On x86 oneDNN says that it supports bfloat16 wherever it can emulate it, at a quarter of
    float32's speed: what counts there is the instructions, and that oneDNN is on and may use them.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or not supported() or not torch.backends.mkldnn.enabled:
        return ()
    if platform.machine().lower() not in _X86:
        return ("bfloat16 instructions",)
    given = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    # Private names, which later versions may drop: a unit that cannot be asked for is not there.
    tests = {name: getattr(torch.cpu, test, None) for name, (test, _) in _X86_UNITS.items()}
    return tuple(
        name
        for name, test in tests.items()
        if test is not None and test() and given.upper() not in _X86_UNITS[name][1]
    )
