"""The predicted times follow from counts and stated rates, and the page says what the code does."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import counted
from benchmarks.counted import CASES, CSV, IMPLEMENTATIONS, RATES, Rates
from benchmarks.cuda_counts import Shape
from benchmarks.cuda_recorder import Launch

SMALL = Shape(1024, 128, 1024)
OURS = ("one pass", "op")


def launch(kind: str, **sizes: float) -> Launch:
    return Launch("name", kind, **{"flops": 0.0, "read": 0.0, "written": 0.0} | sizes)


def test_rates_of_our_products_pass_through_what_is_assumed():
    for width, rate in RATES.triton:
        assert RATES.of_triton(width) == pytest.approx(rate)
    ascending = [RATES.of_triton(width) for width in (256, 576, 896, 1024, 2048, 3584, 4096, 8192)]
    assert ascending == sorted(ascending)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (launch("product", flops=2e12, read=9e12, written=9e12), 2.0),
        (launch("product", flops=2e12, accumulated=1e11), 3.0),
        (launch("triton", flops=2e12, read=9e12), 4.0),
        (launch("triton", read=1e11, written=1e11), 2.0),
        (launch("torch", read=1e11), 1.0),
        (launch("torch", read=1.0), 0.25),
    ],
)
def test_seconds_of_a_launch(given, seconds):
    rates = Rates(product=1e12, triton=((100, 5e11), (200, 5e11)), memory=1e11, launch=0.25)
    assert rates.seconds(given, 100) == pytest.approx(seconds)


@pytest.mark.parametrize("active", [1.0, 0.5])
def test_every_implementation_multiplies_what_it_should(active):
    found = {}
    for name, implementation in IMPLEMENTATIONS.items():
        counts = implementation(SMALL, active)
        if counts is not None:
            found[name.partition(" ")[0]] = counts.flops / counted._product(SMALL)
    expected = {"one": 1 + 2 * active, "op": 1 + 3 * active, "TRL": 4, "PyTorch": 4}
    assert found == pytest.approx({name: expected[name] for name in found})


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."),
    reason="the same code is other operations in another version of PyTorch",
)
def test_the_table_is_what_the_code_counts():
    """`python -m benchmarks.counted` writes it anew."""
    with CSV.open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["implementation"] in OURS]
    names = [name for name in IMPLEMENTATIONS if name not in OURS]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.delitem(IMPLEMENTATIONS, name)
        now = [counted.record(row) for row in counted.rows() if row.counts is not None]
    assert len(now) == len(OURS) * 2 * len(CASES)
    assert [{k: str(v) for k, v in row.items()} for row in now] == table
