"""Random problems for the ops, and the error budget they are held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from plad_fast.ops.reference import (
    reference_logits,
    reference_sequence_sums,
    reference_token_logprobs,
)

INF = float("inf")
NAN = float("nan")
BUDGET_FACTOR = 2
"""|ours - truth| <= factor * |torch in the same dtype - truth| + one rounding of the result."""


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    cu_seqlens: Tensor
    spec: dict[str, Any] = field(default_factory=dict)
    """softcap, logit_scale, temperature."""
    scratch_bytes: int = 2**20

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers (rounded to `dtype`), as leaves of a new graph."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        return Problem(
            cast(self.hidden),
            cast(self.weight),
            cast(self.bias),
            self.targets,
            self.cu_seqlens,
            self.spec,
            self.scratch_bytes,
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets, self.cu_seqlens

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "scratch_bytes": self.scratch_bytes, **self.spec}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers (..., V) at other strides or addresses; NaN lies between them."""
    *lead, vocab = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "tokens first":
        return tensor.transpose(0, -2).contiguous().transpose(0, -2)
    if layout in ("gaps", "odd gaps"):  # the first keep rows aligned
        gap = 3 if layout == "odd gaps" else 8
        view = tensor.new_full((*lead, vocab + gap), NAN)[..., :vocab]
    elif layout == "stepped":
        view = tensor.new_full((*lead, 2 * vocab), NAN)[..., ::2]
    elif layout == "but the last":  # what a causal model's logits are shifted by
        *others, tokens = lead
        view = tensor.new_full((*others, tokens + 1, vocab), NAN)[..., :-1, :]
    else:
        assert layout == "shifted"
        view = tensor.new_full((tensor.numel() + 1,), NAN)[1:].view(tensor.shape)
    return view.copy_(tensor)


def make_problem(
    lengths: list[int],
    *,
    width: int = 8,
    vocab: int = 37,
    bias: bool = False,
    ignored: float = 0.0,
    contiguous: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    scratch_rows: int | None = None,
    **spec: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        if not contiguous and len(shape) == 2:
            return contiguously(shape[1], 2 * shape[0])[:, ::2].T
        return contiguously(*shape)

    def contiguously(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    num_tokens = sum(lengths)
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < ignored] = -100
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rows = scratch_rows or 10_000
    return Problem(
        (scale * drawn(num_tokens, width)).detach().requires_grad_(),
        drawn(vocab, width).detach().requires_grad_(),
        (3 * drawn(vocab)).detach().requires_grad_() if bias else None,
        targets,
        bounds,
        spec,
        # A float64 row takes 8 bytes per logit; a sixteenth of the budget is for weight blocks.
        scratch_bytes=rows * vocab * 8 * 16 // 15 + 64,
    )


@st.composite
def problems(draw: st.DrawFn, group_size: int | None = None) -> Problem:
    """Ragged, also empty sequences; odd sizes; every option; buffers of one row and of many."""
    size = group_size or 1
    num_groups = draw(st.integers(0 if group_size is None else 1, 4))
    lengths = draw(
        st.lists(st.integers(0, 6), min_size=num_groups * size, max_size=num_groups * size)
    )
    spec = {
        "softcap": draw(st.sampled_from([None, 0.7, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.0625, -1.5])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
    }
    return make_problem(
        lengths,
        width=draw(st.integers(1, 9)),
        vocab=draw(st.integers(1, 41)),
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        contiguous=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([0.1, 1.0, 10.0])),
        scratch_rows=draw(st.sampled_from([1, 3, None])),
        **spec,
    )


def oracle(problem: Problem, length_normalization: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sequence sums and token log-probabilities by the naive computation.

    In 16 bits its logits are rounded to 16 bits and the softmax runs in float32: what a model's
    own head followed by `.float()` gives, which is the stricter yardstick.
    """
    logits = reference_logits(problem.hidden, problem.weight, problem.bias, **problem.spec)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    tokens = reference_token_logprobs(logits, problem.targets)
    sums = reference_sequence_sums(
        tokens, problem.targets, problem.cu_seqlens, length_normalization
    )
    return sums, tokens


def assert_within_budget(
    ours: Tensor, same_dtype: Tensor, truth: Tensor, what: str, *, roundings: int = 1
) -> None:
    """Largest error against float64, compared with torch's own in the same dtype.

    roundings: of the largest result. Where a problem has a handful of numbers torch may happen to
    hit all of them exactly, and its error says nothing; drawn problems are given more than one.
    """
    truth = truth.double()
    if truth.numel() == 0:
        assert ours.numel() == 0
        return
    error = (ours.double() - truth).abs().max().item()
    torch_error = (same_dtype.double() - truth).abs().max().item()
    rounding = roundings * torch.finfo(ours.dtype).eps / 2 * truth.abs().max().item()
    assert error <= BUDGET_FACTOR * torch_error + rounding + torch.finfo(ours.dtype).tiny, (
        f"{what}: error {error:.3g} over the budget; torch in the same dtype has {torch_error:.3g}"
    )


def upstream(like: torch.Tensor, kind: str, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    if kind == "sparse":
        grad = grad * (torch.rand(like.shape, generator=generator) < 0.4)
    return (grad * (kind != "zero")).to(like.dtype)
