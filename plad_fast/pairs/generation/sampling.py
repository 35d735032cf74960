"""Seeded sampling whose rows do not depend on their batch.

`generate(do_sample=True)` draws all rows of a batch from one random stream, so an answer changes
with the batch size and with its neighbours. Here every prompt has a stream of its own, and a
token is drawn by inverting the distribution function at one uniform number a step.

Letters: B rows of a batch, V vocabulary, T most new tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plad_fast.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Raises UsageError for values out of range."""

    max_new_tokens: int = 64
    """Longest answer, in tokens, its end token included."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""

    top_p: float = 1.0
    """Smallest set of likeliest tokens with at least this probability; 1 keeps all."""

    top_k: int = 0
    """So many likeliest tokens; 0 keeps all. Applied before `top_p`."""

    seed: int = 0
    """Two models with one seed get the same uniform numbers for a prompt, which makes their
    answers alike: give the student another seed than the teacher."""

    n: int = 1
    """Answers to every prompt, each from a stream of random numbers of its own. More of them only
    add to those that fewer give."""

    batch_size: int = 16
    """Prompts at once; it changes speed, memory and rounding, and nothing else."""

    def settings(self) -> dict[str, Any]:
        """The fields on which answers depend, for the fingerprint of a store."""
        fields = dataclasses.asdict(self)
        del fields["batch_size"], fields["n"]
        return fields

    def __post_init__(self) -> None:
        smallest = {"max_new_tokens": 1, "top_k": 0, "batch_size": 1, "seed": 0, "n": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, not {value}")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def uniforms(self, prompt_id: str, sample: int = 0) -> Tensor:  # (T,) float32 on the CPU
        """One number in [0, 1) a step.

        They depend on the seed, the prompt's id and the number of the sample alone, and more steps
        only append to them.
        """
        name = f"{self.seed}:{prompt_id}".encode()
        if sample:
            # Any string may be a prompt's id: a number written into it would be another's name.
            digest = hashlib.blake2b(name, salt=sample.to_bytes(8, "big")).digest()
        else:
            digest = hashlib.sha256(name).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(self.max_new_tokens, generator=generator)


def invert_cdf(
    probs: Tensor,  # (B, V)
    uniforms: Tensor,  # (B,)
) -> Tensor:  # (B,) int64
    """The first token, in vocabulary order, whose cumulative probability exceeds the uniform.

    Vocabulary order rather than order of probability: rounding swaps tokens of nearly equal
    probability, which would change the choice for most uniforms instead of for a few.
    A token of probability 0 is never chosen.
    """
    cumulative = probs.cumsum(-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    # A parallel sum may not be monotonic to the last bit, so that zeros have to be excluded.
    eligible = (cumulative > threshold) & (probs > 0)
    first = eligible.to(torch.uint8).argmax(-1)
    return torch.where(eligible.any(-1), first, probs.argmax(-1))


class TokenSampler:
    """Draws the next token of every row."""

    def __init__(self, sampling: Sampling) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._greedy = sampling.temperature == 0
        self._warpers: list[Any] = []
        if sampling.temperature not in (0, 1):
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(
        self,
        logits: Tensor,  # (B, V)
        uniforms: Tensor,  # (B,)
    ) -> tuple[Tensor, Tensor]:  # (B,) int64, (B,) bool
        """The tokens, and which rows have NaN or infinite logits, whose tokens mean nothing."""
        # Masked tokens have -inf; it takes NaN or +inf for the largest logit not to be finite.
        if self._greedy:
            tokens = logits.argmax(-1)
            return tokens, ~logits.gather(-1, tokens[:, None]).squeeze(-1).isfinite()
        scores = logits.float()
        broken = ~scores.amax(-1).isfinite()
        for warper in self._warpers:
            scores = warper(None, scores)
        return invert_cdf(scores.softmax(-1), uniforms), broken


class RowSampler:
    """A transformers logits processor under which greedy `generate` samples row by row."""

    def __init__(
        self,
        sampling: Sampling,
        uniforms: Tensor,  # (B, T), on the device of the logits
        prompt_length: int,  # tokens before the first step, padding included
    ) -> None:
        self.broken = torch.zeros(len(uniforms), dtype=torch.bool, device=uniforms.device)
        """(B,): whether a row met NaN or infinite logits. Kept on the device, to be read once."""

        self._choose = TokenSampler(sampling)
        self._uniforms = uniforms
        self._prompt_length = prompt_length

    def __call__(
        self,
        input_ids: Tensor,  # (B, prompt_length + step)
        scores: Tensor,  # (B, V) float32
    ) -> Tensor:  # (B, V): 0 at the chosen token, -inf elsewhere
        step = input_ids.shape[1] - self._prompt_length
        chosen, broken = self._choose(scores, self._uniforms[:, step])
        self.broken |= broken
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)
