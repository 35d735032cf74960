"""The naive computation in plain torch: the only definition of "right".

It stores all logits, uses no kernel of this library and no trick, and autograd differentiates it.
In float64 it is the oracle of the tests; in lower precision it is the yardstick their error
budget is measured with, and the `naive` row of the benchmarks.

N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:  # (N, V)
    """Logits as a language model's head and a sampler's temperature make them."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return transform_logits(logits, softcap, logit_scale, temperature)


def transform_logits(
    logits: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """softcap * tanh(logit_scale * logits / softcap) / temperature."""
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def reference_token_logprobs(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,)
    ignore_index: int = -100,
) -> Tensor:  # (N,)
    """Log-probability of every target; 0 where the target is ignored."""
    logprobs = torch.log_softmax(logits, dim=-1)
    keep = targets != ignore_index
    picked = logprobs.gather(1, targets.where(keep, 0).unsqueeze(1)).squeeze(1)
    return picked * keep


def reference_sequence_sums(
    token_logprobs: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    length_normalization: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:  # (S,)
    """Sum over each sequence's tokens, divided by (number of counted tokens) ** alpha."""
    sums = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        count = int((targets[start:stop] != ignore_index).sum())
        total = token_logprobs[start:stop].sum()
        sums.append(total / max(count, 1) ** length_normalization)
    if not sums:
        return token_logprobs.new_zeros(0) + token_logprobs.sum()
    return torch.stack(sums)
