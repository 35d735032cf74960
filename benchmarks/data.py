"""Made-up preference pairs of which a known share is inside the hinge.

Letters: N tokens, D hidden size, V vocabulary, S sequences, B pairs (S = 2 B, chosen first in each
pair).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BETA = 1.0
# Nats by which one sequence of a pair beats the other, give or take about sqrt(2 * length): so far
# from the hinge at BETA that rounding in any dtype cannot move a pair across it.
LEAD = 128.0
IGNORE = -100


@dataclass(frozen=True)
class PairBatch:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    cu_seqlens: Tensor  # (S + 1,)
    active_tokens: int  # rows of the pairs inside the hinge

    @cached_property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    @property
    def num_pairs(self) -> int:
        return len(self.lengths) // 2


def check_shape(tokens: int, response: int, active: float) -> int:
    """Number of pairs B, or a ValueError that says how the shape has to change."""
    if tokens <= 0 or tokens % (2 * response):
        raise ValueError(
            f"{tokens} tokens are not a whole number of pairs of 2 x {response} tokens; "
            "change the first number of --shape, or --response"
        )
    pairs = tokens // (2 * response)
    if not 0 <= active <= 1 or (active * pairs) % 1:
        raise ValueError(f"an active share of {active} is not a whole number of {pairs} pairs")
    return pairs


def make_pairs(
    tokens: int,
    hidden_size: int,
    vocab: int,
    *,
    response: int,
    active: float,
    dtype: torch.dtype,
    device: torch.device,
    ragged: bool = False,
    seed: int = 0,
) -> PairBatch:
    """Pairs of which exactly the share `active` has a positive hinge loss at `BETA`, spread evenly.

    Hidden states and weights are normal with logits of unit variance. In an inactive pair the
    chosen sequence gets target logits raised by `LEAD` nats in total, in an active pair the
    rejected one does. With `ragged`, the lengths of pairs differ, between half and one and a half
    times `response`, at the same total; the two sequences of a pair stay equally long, for a longer
    one would be the less likely one whatever its targets. Numbers are drawn on the device: the same
    on every CPU, and others on a GPU.

    Raises:
        ValueError: `tokens` is not a whole number of pairs, or `active` not a whole number of them.
    """
    pairs = check_shape(tokens, response, active)
    generator = torch.Generator(device).manual_seed(seed)
    there = {"generator": generator, "device": device}
    hidden = torch.randn(tokens, hidden_size, **there)
    weight = torch.randn(vocab, hidden_size, **there).div_(hidden_size**0.5)
    targets = torch.randint(vocab, (tokens,), **there)

    lengths = torch.full((pairs,), response)
    if ragged:
        shift = torch.randint(-(response // 2), response // 2 + 1, (pairs // 2,), **there).cpu()
        lengths[: 2 * len(shift)] += torch.stack((shift, -shift), dim=1).flatten()
    lengths = lengths.repeat_interleave(2)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))

    count, active_tokens = round(active * pairs), 0
    for pair in range(pairs):
        is_active = (pair + 1) * count // pairs > pair * count // pairs
        boosted = 2 * pair + int(is_active)
        if is_active:
            active_tokens += int(lengths[2 * pair : 2 * pair + 2].sum())
        rows = slice(int(cu_seqlens[boosted]), int(cu_seqlens[boosted + 1]))
        # rows of `weight` have a norm of about 1, so this raises the target logit by the factor
        hidden[rows] += weight[targets[rows]] * (LEAD / int(lengths[boosted]))
    return PairBatch(
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        cu_seqlens.to(device),
        active_tokens,
    )
