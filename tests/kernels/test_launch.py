"""What a launch takes, and what multiplies: our kernels or the library."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from plad_fast.kernels import launch
from plad_fast.kernels.launch import Device, LinearConfig

from tests.support.linear_cases import SMALL
from tests.support.problems import laid_out

HOPPER, AMPERE = Device((9, 0), 132), Device((8, 0), 108)


@pytest.mark.parametrize(
    ("version", "device", "loads", "lean", "num_tokens", "offered"),
    [
        ("3.6.0", HOPPER, "tma", True, 2048, True),
        ("3.7.1", HOPPER, "tma", True, 2048, False),
        ("3.6.0", AMPERE, "vector", True, 2048, False),
        ("3.6.0", HOPPER, "scalar", True, 2048, False),
        ("3.6.0", HOPPER, "tma", True, 16, False),  # a warp group of 64 rows multiplies them
    ],
)
def test_specialised_warps_are_chosen_by_measurement_alone(
    monkeypatch, version, device, loads, lean, num_tokens, offered
):
    """And offered where the version of Triton compiles them."""
    monkeypatch.setattr(launch.triton, "__version__", version)
    arguments = torch.bfloat16, num_tokens, device
    first, *others = launch.linear_candidates(*arguments, loads=loads, lean=lean)
    assert first == launch.linear_config(*arguments, loads=loads, lean=lean)
    assert not first.WARP_SPECIALIZE
    assert [c.num_warps for c in others if c.WARP_SPECIALIZE] == ([4] if offered else [])


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


@pytest.mark.parametrize(
    ("dtype", "width", "layout", "device", "loads"),
    [
        (torch.bfloat16, 64, "contiguous", HOPPER, "tma"),
        (torch.bfloat16, 72, "gaps", HOPPER, "tma"),  # rows of 8 entries are enough
        (torch.bfloat16, 68, "contiguous", HOPPER, "scalar"),
        (torch.bfloat16, 64, "shifted", HOPPER, "scalar"),
        (torch.bfloat16, 64, "transposed", HOPPER, "scalar"),
        (torch.bfloat16, 64, "stepped", HOPPER, "scalar"),
        (torch.float32, 64, "contiguous", HOPPER, "vector"),
        (torch.bfloat16, 64, "contiguous", AMPERE, "vector"),
        (torch.bfloat16, 72, "contiguous", AMPERE, "scalar"),
        (torch.bfloat16, 64, "gaps", AMPERE, "scalar"),  # a stride of 72
        (torch.bfloat16, 72, "gaps", AMPERE, "scalar"),  # a stride of 80, a width of 72
    ],
)
def test_how_operands_are_read(dtype, width, layout, device, loads):
    good = torch.zeros(32, 64, dtype=dtype)
    matrix = laid_out(torch.zeros(32, width, dtype=dtype), layout)
    assert launch.load_kind(device, matrix, good) == loads
    assert launch.load_kind(device, good, matrix) == loads


@pytest.mark.parametrize("num_tokens", [16, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_of_12_0_takes_the_tiles_of_8_9(dtype, num_tokens):
    """It has the same memory and units; in float32 steps of 32 spill registers there, too."""
    found = [
        launch.linear_config(dtype, num_tokens, Device(capability, 142), loads="vector", lean=True)
        for capability in ((8, 9), (12, 0))
    ]
    assert found[0] == found[1]


def test_few_tokens_fill_the_gpu():
    """4 tiles of tokens on 132 multiprocessors; the vocabulary is split until they are busy."""
    tile = launch.linear_config(torch.bfloat16, 512, HOPPER, loads="tma", lean=True)
    splits = launch.vocab_splits(512, 151_936, tile, HOPPER)
    programs = 512 // tile.BLOCK_N * splits
    waves = -(-programs // HOPPER.num_sms)
    assert programs / (waves * HOPPER.num_sms) > 0.9


@given(
    num_tokens=st.integers(1, 10_000),
    vocab=st.integers(1, 300_000),
    config=st.sampled_from([SMALL, LinearConfig(128, 256, 64, num_warps=8, num_stages=4)]),
    num_sms=st.integers(1, 200),
)
def test_number_of_splits(num_tokens, vocab, config, num_sms):
    """At least one, none without a tile, and hardly worse than not splitting."""
    device = Device((9, 0), num_sms)
    splits = launch.vocab_splits(num_tokens, vocab, config, device)
    token_tiles, tiles = -(-num_tokens // config.BLOCK_N), -(-vocab // config.BLOCK_V)
    assert 1 <= splits <= tiles
    waves = -(-token_tiles * splits // num_sms)
    unsplit = -(-token_tiles // num_sms) * tiles
    assert waves * -(-tiles // splits) <= unsplit * (1 if token_tiles <= 16 else 1.25)


def test_groups_of_token_tiles_fill_the_gpu():
    """What runs together then reads the hidden states of one group, not of all tokens."""
    tile = LinearConfig(128, 256, 64, num_warps=8, num_stages=4)
    for num_tokens, vocab in ((8192, 128_256), (16_384, 248_320), (65_536, 151_936)):
        splits = launch.vocab_splits(num_tokens, vocab, tile, HOPPER)
        assert launch.TOKEN_GROUP * splits >= 0.95 * HOPPER.num_sms


@pytest.mark.parametrize("vocab", [1, 37, 4096, 4097, 151_936, 256_000])
def test_a_row_takes_blocks_of_a_power_of_two(vocab):
    config = launch.rows_config(vocab)
    assert config.BLOCK_V.bit_count() == 1
    assert config.BLOCK_V <= 4096
    # Each thread has one vector of 16 bytes to load, of entries of 4 bytes, or it idles.
    assert 32 * config.num_warps <= config.BLOCK_V
