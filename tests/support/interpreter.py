"""Fixtures that make Triton's interpreter a stricter stand-in for a GPU; a module imports them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory():
    """What `torch.empty` returns holds NaN, or the least integer."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        worst = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
        return tensor.fill_(worst)

    with mock.patch.object(torch, "empty", poisoned):
        yield


@pytest.fixture(scope="module", autouse=True)
def gpu_minimum():
    """Of a number and NaN a GPU takes the number; the interpreter, unless told, NaN."""
    builder = interpreter.InterpreterBuilder
    with (
        mock.patch.object(builder, "create_minnumf", lambda b, x, y: b.binary_op(x, y, np.fmin)),
        mock.patch.object(builder, "create_maxnumf", lambda b, x, y: b.binary_op(x, y, np.fmax)),
    ):
        yield
