"""What the kernels share, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from plad_fast.kernels.primitives import grouped_tile

from tests.support import interpreter

pytestmark = interpreter.MARKS


@pytest.mark.parametrize(("tiles", "parts", "group"), [(1, 1, 16), (5, 3, 2), (7, 4, 3), (4, 2, 4)])
def test_every_tile_and_part_once(tiles, parts, group):
    """A group of tiles takes all parts before the next one does."""
    seen = torch.full((tiles * parts, 2), -1)
    _order_kernel[(tiles * parts,)](seen, tiles, parts, GROUP=group)
    assert len({tuple(pair) for pair in seen.tolist()}) == tiles * parts
    assert (seen[:, 0].diff() >= -group).all()
    groups = seen[:, 0] // group
    assert (groups.diff() >= 0).all()
    assert seen[:, 1].max() == parts - 1


@triton.jit
def _order_kernel(out_ptr, tiles, parts, GROUP: tl.constexpr):  # noqa: N803
    tile, part = grouped_tile(tiles, parts, GROUP)
    tl.store(out_ptr + 2 * tl.program_id(0), tile)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, part)


@triton.jit
def _cast_kernel(wide_ptr, narrow_ptr, count: tl.constexpr):
    offsets = tl.arange(0, count)
    tl.store(narrow_ptr + offsets, tl.load(wide_ptr + offsets).to(tl.bfloat16))


def test_bfloat16_is_rounded_to_the_nearest():
    """Every upper half of a float32, with lower halves below, at and above the middle."""
    halves = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    wide = ((torch.arange(2**16)[:, None] << 16) + halves).to(torch.int32).view(torch.float32)
    for values in wide.unbind(1):
        narrow = torch.empty(2**16, dtype=torch.bfloat16)
        _cast_kernel[(1,)](values.contiguous(), narrow, count=2**16)
        expected = values.to(torch.bfloat16)
        torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)
