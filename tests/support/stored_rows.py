"""Stored logits with their targets, the kernels on them, and what these must find."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from plad_fast.kernels.launch import RowsConfig
from plad_fast.kernels.logits_rows import RowStatistics, logits_rows_backward, logits_rows_forward
from torch import Tensor

from plad_fast.ops.reference import transform_logits
from tests.support.problems import INF, NAN, laid_out, normal

IGNORED = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = RowsConfig(16, num_warps=4)
CONFIGS = [SMALL, RowsConfig(64, num_warps=4), None]
OPTIONS = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, "ignore_index": IGNORED}


@dataclass
class Case:
    """Stored logits with their targets, and the ways of reading them that must not matter."""

    logits: Tensor  # (N, V) or (S, T, V)
    targets: Tensor  # (N,) or (S, T)
    bias: Tensor | None = None  # (V,)
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    config: RowsConfig | None = SMALL
    row_width: int | None = None

    @property
    def keep(self) -> Tensor:
        return self.targets != self.options["ignore_index"]

    def forward(self, entropy_order: int = 1) -> RowStatistics:
        return logits_rows_forward(
            self.logits,
            self.targets,
            bias=self.bias,
            entropy_order=entropy_order,
            row_width=self.row_width,
            config=self.config,
            **self.options,
        )

    def backward(
        self,
        grad: Tensor,  # of the targets' shape
        grad_lse: Tensor | None = None,
        *,
        statistics: RowStatistics | None = None,
        out: Tensor | None = None,
        rows: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        statistics = statistics or self.forward(False)
        return logits_rows_backward(
            self.logits,
            self.targets,
            statistics.lse,
            statistics.tail,
            statistics.miss,
            grad,
            grad_lse,
            bias=self.bias,
            out=torch.empty(self.logits.shape, dtype=self.logits.dtype) if out is None else out,
            rows=rows,
            scale=scale,
            row_width=self.row_width,
            config=self.config,
            **self.options,
        )


def make_case(
    *shape: int,  # of the logits
    dtype: torch.dtype = torch.float32,
    size: float = 3.0,
    bias: bool = False,
    ignored: float = 0.0,
    seed: int = 0,
    config: RowsConfig | None = SMALL,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    options = {**OPTIONS, **options}
    silent = torch.rand(shape[:-1], generator=generator) < ignored
    return Case(
        (size * normal(*shape, seed=seed + 1)).to(dtype),
        targets.masked_fill(silent, options["ignore_index"]),
        normal(shape[-1], seed=seed + 2).to(dtype) if bias else None,
        options,
        config,
    )


LAYOUTS = [
    "contiguous",
    "transposed",
    "tokens first",
    "odd gaps",
    "stepped",
    "but the last",
    "shifted",
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """No row and up to a dozen; up to seven blocks of the vocabulary, the last one ragged or not;
    entries of -inf anywhere but at a target.
    """
    lead = draw(
        st.one_of(
            st.tuples(st.integers(0, 12)),
            st.tuples(st.integers(0, 3), st.integers(0, 4)),
        )
    )
    vocab = draw(st.one_of(st.integers(1, 100), st.sampled_from([16, 17, 64, 65])))
    seed = draw(st.integers(0, 2**16))
    case = make_case(
        *lead,
        vocab,
        dtype=draw(st.sampled_from(DTYPES)),
        size=draw(st.sampled_from([0.1, 3.0, 30.0])),
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=seed,
        config=draw(st.sampled_from(CONFIGS)),
        softcap=draw(st.sampled_from([None, 0.7, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.0625, -1.5])),
        temperature=draw(st.sampled_from([1.0, 0.7])),
        ignore_index=draw(st.sampled_from([IGNORED, 0, 1])),
    )
    if case.options["logit_scale"] > 0:
        masked = normal(*case.logits.shape, seed=seed + 3) > draw(st.sampled_from([INF, 1.0, -0.5]))
        masked &= torch.arange(vocab) != case.targets.where(case.keep, 0)[..., None]
        case.logits.masked_fill_(masked, -INF)
    case.logits = laid_out(case.logits, draw(st.sampled_from(LAYOUTS)))
    return case


def transformed(case: Case, raw: Tensor) -> Tensor:
    bias = 0 if case.bias is None else case.bias.to(raw.dtype)
    options = {k: v for k, v in case.options.items() if k != "ignore_index"}
    return transform_logits(raw + bias, **options)


def at_targets(case: Case, values: Tensor) -> Tensor:
    """The entries of (..., V) at targets, and at 0 where the target is ignored."""
    return values.gather(-1, case.targets.where(case.keep, 0)[..., None]).squeeze(-1)


def expected_statistics(
    case: Case, dtype: torch.dtype, entropy_order: int = 1
) -> dict[str, Tensor]:
    """By the naive computation in `dtype` on the numbers as they are stored."""
    z = transformed(case, case.logits.to(dtype))
    logprobs = torch.log_softmax(z, dim=-1)
    tokens = at_targets(case, logprobs)
    entropy = -torch.where(logprobs == -INF, 0.0, logprobs.exp() * logprobs).sum(-1)
    if entropy_order == 2:
        entropy = -torch.logsumexp(2 * logprobs, dim=-1)
    exact = {
        "token_logprobs": tokens,
        "lse": torch.logsumexp(z, dim=-1),
        "miss": -torch.expm1(tokens),
        "entropy": entropy,
    }
    return {name: values.where(case.keep, 0.0) for name, values in exact.items()}


def expected_gradient(
    case: Case, dtype: torch.dtype, grad: Tensor, grad_lse: Tensor | None
) -> Tensor:
    """Of the stored logits, by autograd in `dtype`."""
    raw = case.logits.to(dtype).detach().requires_grad_()
    z = transformed(case, raw)
    loss = (at_targets(case, torch.log_softmax(z, dim=-1)) * grad).where(case.keep, 0.0).sum()
    if grad_lse is not None:
        loss = loss + (torch.logsumexp(z, dim=-1) * grad_lse).where(case.keep, 0.0).sum()
    return torch.autograd.grad(loss, raw)[0]


def narrowed(case: Case, dtype: torch.dtype, row_width: int) -> tuple[Case, Tensor]:
    """The case with its logits in rows of `row_width` entries, NaN behind them; and the first part
    of these rows in a narrower dtype."""
    memory = torch.full((*case.logits.shape[:-1], row_width), NAN)
    vocab = case.logits.shape[-1]
    memory[..., :vocab] = case.logits
    case = replace(case, logits=memory[..., :vocab], row_width=row_width)
    return case, memory.view(dtype)[..., :vocab]
