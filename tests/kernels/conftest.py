"""Fixtures that make Triton's interpreter a stricter stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def poisoned_memory():
    """What `torch.empty` returns holds NaN, or the least integer."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        worst = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
        return tensor.fill_(worst)

    with mock.patch.object(torch, "empty", poisoned):
        yield


@pytest.fixture(scope="module")
def gpu_minimum():
    """Of a number and NaN a GPU takes the number; the interpreter, unless told, NaN."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    with (
        mock.patch.object(Builder, "create_minnumf", lambda b, x, y: b.binary_op(x, y, np.fmin)),
        mock.patch.object(Builder, "create_maxnumf", lambda b, x, y: b.binary_op(x, y, np.fmax)),
    ):
        yield


@pytest.fixture
def programs_backwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To be called: from then on the last program of a grid runs first."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    set_grid_idx = Builder.set_grid_idx

    def from_the_end(self: Any, x: int, y: int, z: int) -> None:
        set_grid_idx(self, self.grid_dim[0] - 1 - x, y, z)

    return lambda: monkeypatch.setattr(Builder, "set_grid_idx", from_the_end)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    from triton.runtime.interpreter import GridExecutor

    names, run = [], GridExecutor.__call__

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", noting)
    return names


@pytest.fixture
def sparse(tmp_path) -> Iterator[Callable[..., Tensor]]:
    """Tensors of gigabytes, of which only what is written takes memory: files with holes."""
    paths = []

    def make(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        assert size > 2**31
        paths.append(tmp_path / str(len(paths)))
        storage = torch.from_file(str(paths[-1]), shared=True, size=size, dtype=dtype)
        return storage.as_strided(shape, stride)

    yield make
    for path in paths:
        path.unlink()
