"""Both ops against float64 at the sizes of real heads, beside plain torch in the same dtype.

An error is the norm of the difference over the norm of the truth; ours may be twice plain torch's
and one rounding. The loss is a hinge that about half of the pairs satisfy. Every result is made
three times, and must have the same bits each time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import plad_fast
from benchmarks.gpu.worker import Section
from plad_fast.ops.reference import (
    reference_logits,
    reference_sequence_sums,
    reference_token_logprobs,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
LOSS: dict[str, Any] = {
    "loss": "plad_ranking", "beta": 1.0, "sft_weight": 0.0, "length_normalization": 0.0,
}  # fmt: skip
BUDGET_FACTOR = 2


@dataclass(frozen=True)
class Problem:
    name: str
    lengths: tuple[int, ...]  # chosen and rejected in turn
    hidden: int
    vocab: int
    bias: bool = False
    options: dict[str, float] = field(default_factory=dict)


EVERY_OPTION = {"softcap": 30.0, "logit_scale": 0.5, "temperature": 0.7}
PROBLEMS = (
    Problem("llama", (300, 200, 0, 12, 257, 230), 2048, 128_256),
    Problem("qwen", (512, 500, 100, 130), 896, 151_936),
    Problem("gpt2, odd vocabulary", (130, 110, 1, 60), 768, 50_257, bias=True),
    Problem("gemma, every option", (200, 156, 40, 90), 2304, 64_001, True, EVERY_OPTION),
    Problem("rows of no whole vector", (40, 24, 17, 30), 1001, 4099, True),
    Problem("long responses", (4096, 4000), 256, 32_000),
)
TINY = (Problem("tiny, every option", (5, 3, 0, 4, 2, 6), 24, 70, True, EVERY_OPTION),)


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    cu_seqlens: Tensor  # (S + 1,)
    options: dict[str, float]

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, rounded to the dtype, as leaves."""
        leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in self.leaves.items()}
        return replace(self, **leaves)


def make(problem: Problem, device: torch.device) -> Inputs:
    """float32; logits have a deviation of 2, and every 17th target is ignored."""
    generator = torch.Generator(device).manual_seed(1)
    there: dict[str, Any] = {"generator": generator, "device": device}
    tokens = sum(problem.lengths)
    targets = torch.randint(problem.vocab, (tokens,), **there)
    targets[::17] = -100
    return Inputs(
        torch.randn(tokens, problem.hidden, **there),
        torch.randn(problem.vocab, problem.hidden, **there) * 2 * problem.hidden**-0.5,
        torch.randn(problem.vocab, **there) if problem.bias else None,
        targets,
        torch.tensor([0, *problem.lengths], device=device).cumsum(0),
        problem.options,
    )


def results(inputs: Inputs, how: str) -> dict[str, Tensor]:
    """Sums, and gradients of the loss, by "op", "one pass" or "plain" torch."""
    arguments = inputs.hidden, inputs.weight, inputs.targets, inputs.cu_seqlens
    options: dict[str, Any] = {"bias": inputs.bias, "impl": "triton", **inputs.options}
    if how == "one pass":
        fused = plad_fast.fused_linear_preference_loss(*arguments, **LOSS, **options)
        sums, loss = fused.sums, fused.loss
    else:
        if how == "op":
            ours = plad_fast.linear_sequence_logprobs(*arguments, **options)
            sums, counts = ours.sums, ours.counts
        else:
            sums, counts = plain_sums(inputs)
        loss = plad_fast.preference_loss(sums, counts, **LOSS)
    gradients = torch.autograd.grad(loss, list(inputs.leaves.values()))
    named = {f"d_{n}": g for n, g in zip(inputs.leaves, gradients, strict=True)}
    return {"sums": sums.detach(), **named}


def plain_sums(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Sums and counts by a model's own head, whose logits of 16 bits the softmax widens."""
    logits = reference_logits(inputs.hidden, inputs.weight, inputs.bias, **inputs.options)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    tokens = reference_token_logprobs(wide, inputs.targets)
    counted = (inputs.targets != -100).long()
    bounds = inputs.cu_seqlens.tolist()
    counts = [counted[a:b].sum() for a, b in pairwise(bounds)]
    return reference_sequence_sums(tokens, inputs.targets, inputs.cu_seqlens), torch.stack(counts)


def relative(value: Tensor, truth: Tensor) -> float:
    norm = torch.linalg.vector_norm(truth).item()
    return torch.linalg.vector_norm(value.double() - truth).item() / (norm or 1.0)


def check(section: Section, problem: Problem, kind: str) -> None:
    facts = {"problem": problem.name, "dtype": kind}
    inputs = make(problem, section.device).to(DTYPES[kind])
    truth = results(inputs.to(torch.float64), "plain")
    plain = {n: relative(x, truth[n]) for n, x in results(inputs, "plain").items()}
    for how in ("one pass", "op"):
        with section.row(**facts, how=how) as row:
            first, *others = (results(inputs, how) for _ in range(3))
            wrong = []
            for name, value in first.items():
                error = relative(value, truth[name])
                row[name] = f"{error:.1e}"
                row[f"{name} in plain torch"] = f"{plain[name]:.1e}"
                # NaN is beyond any bound.
                if not error <= BUDGET_FACTOR * plain[name] + torch.finfo(value.dtype).eps:
                    wrong.append(name)
                if not all(torch.equal(value, other[name]) for other in others):
                    wrong.append(f"{name} changes from run to run")
            if wrong:
                row["status"] = f"wrong: {', '.join(wrong)}"


def main() -> int:
    section = Section("correctness")
    for kind in DTYPES:
        for problem in TINY if section.tiny else PROBLEMS:
            try:
                check(section, problem, kind)
            except torch.OutOfMemoryError:
                print(f"{problem.name} in {kind}: no memory for plain torch", flush=True)
    return section.finish()


if __name__ == "__main__":
    sys.exit(main())
