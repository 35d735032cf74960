"""Batches of TRL as rows of this library."""

from __future__ import annotations

import pytest
import torch

from plad_fast.errors import UsageError
from plad_fast.integrations.trl import pair_rows


def test_left_padding_is_refused():
    ids, mask = torch.ones(2, 3).long(), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(UsageError, match="padding on the right"):
        pair_rows.pair_batch(ids, mask, mask, layout="shared")
