"""What a launch takes, and what multiplies: our kernels or the library."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from plad_fast.kernels import launch
from plad_fast.kernels.launch import Device

AMPERE = Device((8, 0), 108)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "forward", "gradient"),
    [
        ((9, 0), torch.bfloat16, 4096, True, True),
        ((9, 0), torch.float16, 2048, True, False),
        ((9, 0), torch.bfloat16, 3072, True, True),
        ((9, 0), torch.bfloat16, 1024, False, False),
        ((9, 0), torch.float32, 4096, False, False),
        ((8, 0), torch.bfloat16, 4096, False, False),
    ],
)
def test_where_the_library_multiplies(monkeypatch, capability, dtype, width, forward, gradient):
    monkeypatch.setattr(launch, "device_of", lambda _: Device(capability, 132))
    hidden = torch.empty(3, width, dtype=dtype)
    assert launch.uses_library(hidden, gradient=False) is forward
    assert launch.uses_library(hidden, gradient=True) is gradient


def test_a_measurement_overrules_where_the_library_multiplies(monkeypatch):
    monkeypatch.setattr(launch, "device_of", lambda _: AMPERE)
    monkeypatch.setitem(launch.LIBRARY_FROM, (8, 0), launch.LibraryFrom(512, 640))
    hidden = torch.empty(3, 576, dtype=torch.bfloat16)
    assert launch.uses_library(hidden, gradient=False)
    assert not launch.uses_library(hidden, gradient=True)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_count_of_an_h100(gradient):
    """Picoseconds a logit, at the assumed rates, on both sides of where the library takes over."""
    least = launch.LIBRARY_FROM[9, 0].gradient if gradient else launch.LIBRARY_FROM[9, 0].forward
    ours = {896: 3.98, 1024: 4.41, 2048: 7.80, 3072: 11.22, 4096: 14.63}
    for width, time in ours.items():
        moved = (8 if gradient else 6) / 3
        library = 2 * width / 720 + moved
        assert (library < time) == (width >= least), width
