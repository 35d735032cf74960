"""The benchmark runs, its table and CSV say what they should, and it catches wrong results."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import loss
from benchmarks.check import Oracle, compute_oracle, errors_of, mismatch
from benchmarks.common import Record, peak_memory
from benchmarks.data import PairBatch, make_pairs
from benchmarks.loss import Failure
from benchmarks.measure import Case, measure, save_oracle, work
from benchmarks.peers import IMPLS, Impl, Step, naive

SMALL = Case(128, 32, 500, "float32", 0.5, response=8)
COLUMNS = {
    "impl", "tokens", "hidden", "vocab", "dtype", "active", "device", "median_ms", "q1_ms", "q3_ms",
    "ratio", "products", "extra_mib", "gradients_mib", "d_hidden_error", "d_weight_error",
    "torch", "trl", "liger-kernel", "cut-cross-entropy", "commit", "device_model", "threads",
}  # fmt: skip


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Table and CSV of a quick run of our implementations and of plain torch.

    One of its processes is a fresh one, for the others stay in this.
    """
    run_worker = loss.run_worker

    def worker(module: str, spec: Mapping[str, Any], *, threads: int | None) -> Record:
        if spec["impl"] == "one-pass":
            return run_worker(module, spec, threads=threads)
        return work(json.loads(json.dumps(spec)))

    path = tmp_path_factory.mktemp("benchmark") / "loss.csv"
    options = ["--quick", "--device", "cpu", "--threads", "1", "--csv", str(path)]
    with mock.patch.object(loss, "run_worker", worker), redirect_stdout(io.StringIO()) as output:
        assert loss.main([*options, "--impl", "one-pass", "op", "naive"]) == 0
    return output.getvalue(), path


def test_quick_table(quick_run: tuple[str, Path]) -> None:
    lines = quick_run[0].splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("implementation"))
    cells = {row.split()[0]: row.split()[1:] for row in lines[header + 2 : header + 5]}
    # products as the method promises with half of the pairs active: 1 + 2a, 1 + 3a, 3
    assert [cells[name][3] for name in ("one-pass", "op", "naive")] == ["2.00", "2.50", "3.00"]
    assert cells["one-pass"][2] == "1.00"
    assert float(cells["naive"][0]) > 0


def test_quick_csv(quick_run: tuple[str, Path]) -> None:
    with quick_run[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["impl"] for row in rows] == ["one-pass", "op", "naive"]
    assert set(rows[0]) >= COLUMNS
    for row in rows:
        assert float(row["d_weight_error"]) < 1e-5
        assert float(row["extra_mib"]) > 0


def test_plot_is_drawn_from_the_csv(quick_run: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    target = tmp_path / "loss.png"
    draw(quick_run[1], target, 0.5)
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows"):
        draw(quick_run[1], target, 0.25)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("ragged", [False, True])
def test_data_have_the_active_share(share: float, ragged: bool) -> None:
    case = Case(512, 32, 500, "bfloat16", share, response=16, ragged=ragged)
    batch = case.batch()
    oracle = compute_oracle(batch)
    assert oracle.active == share * batch.num_pairs
    assert oracle.margin > 10
    assert len(batch.hidden) == batch.cu_seqlens[-1] == 512


def test_impossible_share_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        make_pairs(
            64, 8, 50, response=8, active=0.3, dtype=torch.float32, device=torch.device("cpu")
        )


def _inactive_pairs_too(step: Step, batch: PairBatch) -> None:
    """A backward that lets a hinge leak: rows without a gradient get the smallest one there is."""
    assert step.hidden is not None
    assert step.hidden.grad is not None
    norms = step.hidden.grad.norm(dim=1)
    step.hidden.grad[norms == 0] = step.hidden.grad[norms == norms[norms > 0].min()]


def _rows_of_no_target_left_out(step: Step, batch: PairBatch) -> None:
    """A backward that forgets the softmax over the rest of the vocabulary."""
    assert step.weight is not None
    assert step.weight.grad is not None
    others = torch.ones(len(batch.weight), dtype=torch.bool)
    others[batch.targets] = False
    step.weight.grad[others] = 0


@pytest.mark.parametrize("spoil", [_inactive_pairs_too, _rows_of_no_target_left_out])
def test_wrong_gradient_is_a_mismatch(
    spoil: Callable[[Step, PairBatch], None], tmp_path: Path
) -> None:
    def prepare(batch: PairBatch) -> Step:
        step = naive(batch)

        def run() -> Tensor | None:
            loss = step.run()
            spoil(step, batch)
            return loss

        return Step(run, step.hidden, step.weight)

    assert _status_of(Impl("wrong", prepare), tmp_path) == "mismatch"
    assert _status_of(IMPLS["naive"], tmp_path) == "ok"


def _status_of(impl: Impl, folder: Path) -> str:
    path = folder / "oracle.pt"
    assert save_oracle(SMALL, path)["status"] == "ok"
    return measure(impl, SMALL, Oracle.load(path), repeats=1, seconds=0)["status"]


def test_nan_and_nonzero_gradients_of_nothing_are_mismatches() -> None:
    batch = Case(128, 32, 500, "float32", 0.0, response=8).batch()
    oracle = compute_oracle(batch)
    zeros = torch.zeros_like(batch.hidden), torch.zeros_like(batch.weight)
    loss = torch.tensor(0.0)
    assert mismatch(errors_of(loss, *zeros, oracle), torch.float32) is None
    assert mismatch(errors_of(loss, zeros[0] + 1e-30, zeros[1], oracle), torch.float32)
    assert mismatch(errors_of(loss, zeros[0] * torch.nan, zeros[1], oracle), torch.float32)


def test_exit_status_of_failures() -> None:
    assert Failure("trl", "mismatch", "").exit_status(asked_for=False) == 1
    assert Failure("op", "failed", "").exit_status(asked_for=False) == 1
    assert Failure("trl", "missing", "").exit_status(asked_for=False) == 0
    assert Failure("trl", "missing", "").exit_status(asked_for=True) == 2


def test_peak_memory_sees_what_is_freed_again() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(64, 2**18)  # 64 MiB
    assert peak.extra_bytes == pytest.approx(64 * 2**20, rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        loss.parse(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
