"""No kernel touches memory beyond a tensor, and one that does is noticed; see `guard_pages`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.support import guard_pages

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pages are forbidden as on Linux"
)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """How each process ended, by name; one program for all, as its imports take seconds."""
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    program = str(Path(guard_pages.__file__))
    done = subprocess.run(
        [sys.executable, program], env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: {**line, "errors": done.stderr[-3000:]} for line in lines}


@pytest.mark.parametrize("edge", guard_pages.EDGES)
def test_the_page_beside_a_tensor_is_forbidden(results, edge):
    """And the byte at the very edge is not."""
    assert results[f"touch inside {edge}"]["exit"] == 0
    assert results[f"touch outside {edge}"]["exit"] == -signal.SIGSEGV


@pytest.mark.parametrize("edge", guard_pages.EDGES)
@pytest.mark.parametrize("family", guard_pages.CASES)
def test_no_access_out_of_bounds(results, family, edge):
    result = results[f"{family} {edge}"]
    assert result["exit"] == 0, f"in the case {result['told'][-1]}: {result['errors']}"


@pytest.mark.parametrize("module", guard_pages.FAMILIES)
def test_every_mask_left_out_is_noticed(results, module):
    """So the cases reach the edge of everything that a mask or a clamp protects."""
    _, safeguards = guard_pages.safeguards(module)
    assert safeguards
    for index in range(len(safeguards)):
        result = results[f"planted {module} {index}"]
        without, case = result["told"][0], result["told"][-1]
        assert result["exit"] == -signal.SIGSEGV, (
            f"without {without}: exit status {result['exit']} in the case {case}"
        )
