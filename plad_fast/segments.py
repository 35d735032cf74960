"""Sums over ragged sequences, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(
    values: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """values[cu_seqlens[i] : cu_seqlens[i + 1]].sum() for every i; 0 for an empty sequence.

    The addition runs in float64: there are N terms only, and the result does not depend on how a
    sequence was cut into chunks.
    """
    sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, initial=0)
    return sums.to(values.dtype)
