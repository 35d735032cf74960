"""Sums over ragged sequences, in a fixed order, and their length normalisation."""

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
    wide = values if values.device.type == "mps" else values.double()  # MPS has no float64
    return torch.segment_reduce(wide, "sum", offsets=cu_seqlens, initial=0).to(values.dtype)


def segment_counts(
    keep: Tensor,  # (N,) bool
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,) int64
    """How many of keep[cu_seqlens[i] : cu_seqlens[i + 1]] are set, for every i."""
    before = torch.nn.functional.pad(keep.long().cumsum(0), (1, 0))[cu_seqlens]
    return before.diff()


def length_normalized(
    sums: Tensor,  # (S,)
    counts: Tensor,  # (S,)
    alpha: float,
) -> Tensor:  # (S,)
    """sums / counts ** alpha; an empty sequence stays 0."""
    return sums if alpha == 0 else sums / counts.clamp(min=1).to(sums.dtype) ** alpha
