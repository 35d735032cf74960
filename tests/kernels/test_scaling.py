"""The kernel that scales gradients, run by Triton's interpreter."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from plad_fast.kernels.launch import SegmentsConfig
from plad_fast.kernels.scaling import scaled

from plad_fast.ops.impl import scaling, triton_backend
from tests.support import interpreter

pytestmark = [
    *interpreter.MARKS,
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]

SMALL = SegmentsConfig(16)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [None, 1.001, -3e4, 0.0])
def test_equals_one_rounding_of_a_float32_product(source, target, factor):
    """1.001 is 1 in bfloat16: a factor that was rounded first would change nothing."""
    given = values(5, 37, dtype=source)
    number = None if factor is None else torch.tensor(factor)
    want = given.float() if number is None else given.float() * number
    assert torch.equal(scaled(given, number, target, SMALL), want.to(target))


def test_a_factor_in_another_dtype():
    given = values(3, 5, dtype=torch.bfloat16)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        factor = torch.tensor(1.25, dtype=dtype)
        assert torch.equal(scaled(given, factor, torch.float32, SMALL), given.float() * 1.25)


@pytest.mark.parametrize("shape", [(), (1,), (16,), (17,), (0, 4), (2, 3, 5)])
def test_every_shape(shape):
    given = values(*shape) if shape else torch.tensor(1.5)
    result = scaled(given, torch.tensor(2.0), torch.float32, SMALL)
    assert torch.equal(result, 2 * given)


def test_strides_are_kept_and_gaps_closed():
    dense = values(4, 6).T
    result = scaled(dense, torch.tensor(2.0), torch.float16, SMALL)
    assert result.stride() == dense.stride()
    assert torch.equal(result, (2 * dense).half())
    for gaps in (values(4, 12)[:, ::2], values(6).expand(4, 6)):
        assert torch.equal(scaled(gaps, torch.tensor(2.0), torch.float32, SMALL), 2 * gaps)


def test_gradients_on_a_gpu_take_one_launch():
    grad, factor = values(40, 50), torch.tensor(0.3)
    with (
        mock.patch.object(triton_backend, "preferred", return_value=True),
        mock.patch("plad_fast.kernels.scaling.scaled", side_effect=scaled) as launched,
    ):
        found = scaling.scaled_gradient(grad, factor, torch.float16)
        assert scaling.scaled_gradient(grad, None, torch.float32) is grad
    assert launched.call_count == 1
    assert torch.equal(found, scaling.scaled_gradient(grad, factor, torch.float16))
