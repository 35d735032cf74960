"""The check for a GPU runs on a CPU, catches wrong results, and outlives what fails or hangs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import plad_fast
from benchmarks.common import ROOT, Record, version_of

pytest.importorskip("triton")

from plad_fast.kernels.launch import LinearConfig, RowsConfig

from benchmarks.gpu import correctness, worker
from benchmarks.gpu.__main__ import SECTIONS, Job, Running, main, parse
from benchmarks.gpu.loss import all_implementations
from benchmarks.gpu.summary import COUNTED, TABLES, losses, predictions
from benchmarks.gpu.sweep import Sweep
from benchmarks.gpu.worker import Section, Shape
from tests.support.launched import SPAWN, run_module

CUDA = torch.cuda.is_available()


def one_fresh_process(command: list[str], **options: Any) -> Any:
    """The other sections are forked from a process that has done most of the imports, which take
    longer than what a section does."""
    if command[2] == "benchmarks.gpu.environment":
        return subprocess.Popen(command, **options)
    process = SPAWN.Process(
        target=run_module, args=(command[2:], options["env"], options["stdout"].name)
    )
    process.start()
    return SimpleNamespace(pid=process.pid, poll=lambda: process.exitcode, wait=process.join)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of every section."""
    out = tmp_path_factory.mktemp("gpu")
    with (
        mock.patch.dict(os.environ, OMP_NUM_THREADS="1"),
        mock.patch("benchmarks.gpu.__main__.subprocess", SimpleNamespace(Popen=one_fresh_process)),
    ):
        assert main(["--device=cpu", "--tiny", "--minutes=15", f"--out={out}"]) == 0
    return out


def rows_of(folder: Path, section: str) -> list[Record]:
    return [row for row in worker.read(folder) if row["section"] == section]


def test_every_section_has_reported(dry_run: Path) -> None:
    processes = rows_of(dry_run, "sections")
    assert (
        {row["name"].split()[0] for row in processes}
        == set(SECTIONS)
        == TABLES.keys() - {"sections"}
    )
    assert all(row["status"] == "ok" for row in processes)
    for section in SECTIONS:
        statuses = Counter(row["status"].partition(":")[0] for row in rows_of(dry_run, section))
        assert statuses["ok"] > 0 or section == "tests"
        assert statuses.keys() <= {"ok", "missing", "skipped"}
        with (dry_run / f"{section}.csv").open(newline="") as file:
            written = list(csv.DictReader(file))
        assert len(written) == statuses.total()
        assert all(row["torch"] == version_of("torch") for row in written)
    summary = (dry_run / "summary.md").read_text()
    assert all(f"## {title}" in summary for title, _ in TABLES.values())
    assert "Nothing yet" not in summary


def test_both_ops_are_compared_with_float64(dry_run: Path) -> None:
    rows = rows_of(dry_run, "correctness")
    kinds = {(row["dtype"], row["how"]) for row in rows}
    assert len(rows) == len(kinds) == 6
    assert all(float(row["d_weight"]) > 0 for row in rows)


def test_every_implementation_is_measured_or_named_as_missing(dry_run: Path) -> None:
    rows = {row["impl"]: row for row in rows_of(dry_run, "loss")}
    implementations = all_implementations()
    assert rows.keys() == implementations.keys()
    for name, impl in implementations.items():
        if impl.package is not None and find_spec(impl.package) is None:
            assert impl.package in rows[name]["status"]
            continue
        assert rows[name]["median_ms"] > 0
        if not impl.products_only:
            assert rows[name]["worst_error"] < 1e-5
            assert rows[name]["extra_mib"] >= 0


def test_times_stand_beside_their_predictions() -> None:
    known = predictions()
    for name in COUNTED.values():
        assert float(known["A", name, 1.0]) > 1
    row = {"shape": "A", "impl": "trl", "active": 1.0, "median_ms": 5.0, "status": "ok"}
    missing = {"impl": "liger", "status": "missing: liger_kernel"}
    *_, first, last = losses([missing, row]).splitlines()
    assert known["A", "TRL, chunked", 1.0] in first
    assert "liger_kernel" in last


def test_the_sweep_can_be_frozen(dry_run: Path) -> None:
    with (dry_run / "sweep.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ms"]]
    kinds: dict[str, list[LinearConfig | RowsConfig]] = {}
    for row in rows:
        config = LinearConfig if row["BLOCK_D"] else RowsConfig
        fields = {name: literal_eval(row[name]) for name in config.__dataclass_fields__}
        kinds.setdefault(row["kernel"], []).append(config(**fields))
    assert len(kinds) >= 4  # linear and row kernels, forward and gradient
    assert all(len(set(configs)) >= 2 for configs in kinds.values())
    frozen = Counter(row["kernel"] for row in rows if row["default"] == "True")
    assert frozen == Counter(dict.fromkeys(kinds, 1))


def test_steps_have_one_loss_and_gradient(dry_run: Path) -> None:
    rows = [row for row in rows_of(dry_run, "step") if row["status"] == "ok"]
    assert "plad_fast" in {row["impl"] for row in rows}
    for row in rows:
        assert row["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=1e-4)
        assert row["ms"] > 0


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Section:
    argv = ["section", "--device=cpu", "--tiny", f"--out={tmp_path}", f"--truths={tmp_path}"]
    monkeypatch.setattr(sys, "argv", argv)
    return Section("correctness")


def test_wrong_and_changing_results_are_found(
    section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, calls = plad_fast.linear_sequence_logprobs, []

    def drifting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = ours(*args, **kwargs)
        return found._replace(sums=found.sums * (1 + 1e-4 * len(calls)))

    monkeypatch.setattr(plad_fast, "linear_sequence_logprobs", drifting)
    correctness.check(section, correctness.TINY[0], "float32")
    one_pass, op = worker.read(section.args.out)
    assert one_pass["status"] == "ok"
    assert op["status"].startswith("wrong: sums, sums changes from run to run, d_hidden")
    assert section.finish() == 1


def test_a_row_that_fails_is_a_result(section: Section, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (ValueError("seven"), torch.OutOfMemoryError("full"), ImportError("no module")):
        with section.row(what=str(error)) as row:
            row["half"] = 1
            raise error
    rows = worker.read(section.args.out)
    assert [row["half"] for row in rows] == [1, 1, 1]
    assert [row["status"] for row in rows] == [
        "failed: ValueError('seven')", "out of memory", "missing: no module",
    ]  # fmt: skip
    assert section.finish() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed: ValueError('seven')"


def test_what_cannot_be_launched_is_out_of_the_sweep(section: Section) -> None:
    slow, broken = (LinearConfig(16, width, 16, 4, 2) for width in (16, 32))
    times = {slow: 2.0}
    sweep = Sweep(section, Shape("X", 16, 16, 64))
    assert sweep.tuned("linear_forward", "key", [broken, slow], times.__getitem__) == slow
    rows = worker.read(section.args.out)
    assert rows[0]["status"].startswith("not launched: KeyError(LinearConfig(")
    assert [row.get("ms") for row in rows] == [None, 2.0, 2.0, 2.0]
    assert [row["splits"] for row in rows] == [1.0, 1.0, 0.5, 2.0]
    assert sweep.tuned("linear_forward", "key", [broken, slow], times.__getitem__) == slow
    assert len(worker.read(section.args.out)) == 4


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", "ok"),
        ("raise SystemExit('broken')", "exit status 1: broken"),
        ("import time; time.sleep(60)", "stopped after 1 s"),
    ],
)
def test_statuses_of_processes(tmp_path: Path, code: str, status: str) -> None:
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=file, stderr=file, start_new_session=True
        )
    running = Running(Job("loss", 1.0, "op"), process, 1.0 if "sleep" in code else 60.0, log)
    while (found := running.status()) is None:
        process.poll()
    assert found == status
    assert process.poll() is not None


def test_without_time_everything_is_named_and_old_results_are_kept(tmp_path: Path) -> None:
    old = {"section": "parts", "what": "cast", "ms": 1.0, "status": "ok"}
    for row in (old, {"section": "tests", "test": "old", "status": "ok"}):
        worker.append(tmp_path, row)
    options = ["--device=cpu", "--tiny", "--minutes=0", f"--out={tmp_path}"]
    assert main([*options, "--section", "tests", "sweep"]) == 0
    rows = worker.read(tmp_path)
    assert [json.dumps(row) for row in rows if row["section"] != "sections"] == [json.dumps(old)]
    assert {row["name"]: row["status"] for row in rows_of(tmp_path, "sections")} == {
        "tests": "no time left", "sweep": "no time left",
    }  # fmt: skip


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_devices_that_will_not_do_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (([], "CUDA"), (["--device", "cpu"], "--tiny")):
        with pytest.raises(SystemExit) as end:
            parse(arguments)
        assert end.value.code == 2
        assert said in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, benchmarks.gpu.__main__ as m; print('torch' in sys.modules); m.parse(['-h'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("False")
    assert "--minutes" in done.stdout
