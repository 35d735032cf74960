"""Problems of the head with their tiles and layouts, the linear kernels on them, and what these
must find."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from plad_fast.kernels import launch
from plad_fast.kernels.launch import LinearConfig
from plad_fast.kernels.linear_backward import logits_gradient
from plad_fast.kernels.linear_forward import launch_linear_forward
from plad_fast.kernels.logits_rows import RowStatistics
from torch import Tensor
from triton.runtime import interpreter

from plad_fast.ops.reference import (
    reference_logits,
    reference_token_logprobs,
    transform_logits,
)
from tests.support.problems import INF, Problem, laid_out, make_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = LinearConfig(16, 16, 16, num_warps=4, num_stages=2)
CONFIGS = [
    SMALL,
    LinearConfig(32, 16, 32, num_warps=4, num_stages=2),
    LinearConfig(16, 64, 16, num_warps=4, num_stages=2),
]
LAYOUTS = ["contiguous", "transposed", "gaps", "stepped", "shifted"]


@dataclass
class Case:
    """A problem, and the ways of computing it that must not matter."""

    problem: Problem
    ignore_index: int = -100
    config: LinearConfig | None = SMALL
    splits: int | None = None
    """Parts of the vocabulary; None for what the heuristic says."""
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    """Of hidden and weight."""
    group: int = 2
    """Tiles of tokens that take all parts of the vocabulary before the next."""

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        hidden, weight = (
            laid_out(x.detach(), layout)
            for x, layout in zip(
                (self.problem.hidden, self.problem.weight), self.layouts, strict=True
            )
        )
        bias = self.problem.bias
        return hidden, weight, None if bias is None else bias.detach(), self.problem.targets

    @property
    def options(self) -> dict[str, Any]:
        plain = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0}
        return {**plain, **self.problem.spec, "ignore_index": self.ignore_index}

    def forward(self, entropy_order: int = 1) -> RowStatistics:
        heuristic = launch.vocab_splits
        with (
            mock.patch.object(launch, "TOKEN_GROUP", self.group),
            mock.patch.object(
                launch, "vocab_splits", lambda *args: self.splits or heuristic(*args)
            ),
        ):
            return launch_linear_forward(
                *self.operands, **self.options, entropy_order=entropy_order, config=self.config
            )

    def backward(
        self,
        statistics: RowStatistics,
        grad: Tensor,  # (N,)
        grad_lse: Tensor | None = None,  # (N,)
        *,
        scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        shape = len(self.problem.hidden), len(self.problem.weight)
        with mock.patch.object(launch, "TOKEN_GROUP", self.group):
            return logits_gradient(
                *self.operands,
                statistics.lse,
                *(statistics.tail, statistics.miss, grad, grad_lse),
                **self.options,
                out=torch.empty(shape, dtype=self.problem.hidden.dtype) if out is None else out,
                scale=scale,
                config=self.config,
            )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to three tiles of tokens, seven of the vocabulary, three steps of the width."""
    # Rows of a multiple of 8 are what tensor descriptors can read, in 16 bits.
    width = draw(st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 32, 40])))
    vocab = draw(st.one_of(st.integers(1, 100), st.sampled_from([16, 32, 64])))
    config = draw(st.sampled_from(CONFIGS))
    problem = make_problem(
        draw(st.lists(st.integers(0, 17), max_size=4)),
        width=width,
        vocab=vocab,
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([0.1, 1.0, 5.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        softcap=draw(st.sampled_from([None, 0.7, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.0625, -1.5])),
        temperature=draw(st.sampled_from([1.0, 0.7])),
    )
    ignore_index = draw(st.sampled_from([-100, 0, 1]))
    problem.targets[problem.targets == -100] = ignore_index
    return Case(
        problem,
        ignore_index,
        config,
        splits=draw(st.integers(1, -(-vocab // config.BLOCK_V))),
        layouts=draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))),
        group=draw(st.sampled_from([1, 2, 16])),
    )


def expected_statistics(
    problem: Problem, ignore_index: int = -100, entropy_order: int = 1
) -> dict[str, Tensor]:
    """By the naive computation; in 16 bits logits are rounded and the softmax is in float32."""
    logits = reference_logits(problem.hidden, problem.weight, problem.bias, **problem.spec)
    logits = logits.detach()
    if logits.dtype != torch.float64:
        logits = logits.float()
    keep = problem.targets != ignore_index
    tokens = reference_token_logprobs(logits, problem.targets, ignore_index)
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -torch.where(logprobs == -INF, 0.0, logprobs.exp() * logprobs).sum(-1)
    if entropy_order == 2:
        entropy = -torch.logsumexp(2 * logprobs, dim=-1)
    return {
        "token_logprobs": tokens,
        "lse": torch.logsumexp(logits, dim=-1).where(keep, 0.0),
        "miss": -torch.expm1(tokens),
        "entropy": entropy.where(keep, 0.0),
    }


def expected_gradient(
    problem: Problem, grad: Tensor, grad_lse: Tensor | None, ignore_index: int = -100
) -> Tensor:  # (N, V)
    """Of the raw products, by autograd."""
    raw = reference_logits(problem.hidden, problem.weight, problem.bias).detach().requires_grad_()
    logits = transform_logits(raw, **problem.spec)
    if logits.dtype != torch.float64:
        logits = logits.float()
    tokens = reference_token_logprobs(logits, problem.targets, ignore_index)
    loss = (tokens * grad).sum()
    if grad_lse is not None:
        keep = problem.targets != ignore_index
        loss = loss + (torch.logsumexp(logits, dim=-1).where(keep, 0.0) * grad_lse).sum()
    return torch.autograd.grad(loss, raw)[0]


def count_products(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often the interpreter multiplies two tiles, at which precision."""
    counter: Counter = Counter()
    multiply = interpreter.InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        counter[precision] += 1
        return multiply(self, a, b, d, precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    return counter
