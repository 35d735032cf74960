"""What a module of kernel tests in Triton's interpreter is marked with; see
`tests/kernels/conftest.py` for the fixtures."""

from __future__ import annotations

import pytest
from plad_fast.kernels import launch

MARKS = [
    pytest.mark.skipif(not launch.interpreted(), reason="the kernels are compiled, for a GPU"),
    pytest.mark.usefixtures("poisoned_memory", "gpu_minimum"),
    # numpy computes in the interpreter: exp and differences that overflow would say so.
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    # Of its own reduction, which leaves NaN out as a GPU does.
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
