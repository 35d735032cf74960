"""Vocabulary-parallel ops on two and four gloo ranks; the cases are in _vocab_parallel_ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import _vocab_parallel_models  # noqa: F401  adds its cases
from tests._vocab_parallel_ranks import CASES, WORLD

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)

ROOT = Path(__file__).parent.parent
SECONDS = 150  # a hang must fail


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What went wrong, by rank and case: all cases in one start of four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests._vocab_parallel_ranks", str(folder)],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    reports = [folder / f"found{rank}.json" for rank in range(WORLD)]
    for report, output in zip(reports, outputs, strict=True):
        assert report.exists(), output
    return [json.loads(report.read_text()) for report in reports]


@pytest.mark.parametrize("size", [2, WORLD])
@pytest.mark.parametrize("name", CASES)
def test_vocab_parallel(found, name, size):
    failures = {
        rank: result.get(f"{name}-{size}", "did not run")
        for rank, result in enumerate(found)
        if result.get(f"{name}-{size}", "did not run")
    }
    assert not failures, "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())
