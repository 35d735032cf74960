"""The order in which rows of a workspace are compacted."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_fast.ops.impl.workspace import compacting_order


@given(active=st.lists(st.booleans(), max_size=40))
def test_programs_of_a_compaction_do_not_meet(active):
    """They run in any order on a GPU: none may read a row that another one writes."""
    order = compacting_order(torch.tensor(active, dtype=torch.bool)).tolist()
    assert sorted(order) == [i for i, on in enumerate(active) if on]
    for place, row in enumerate(order):
        assert row == place or row >= len(order)
