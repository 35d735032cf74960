"""The step benchmark runs, compares with naive, and catches wrong losses and gradients."""

from __future__ import annotations

import csv
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import TrainingArguments

from benchmarks import step, step_models
from benchmarks.common import ROOT
from benchmarks.step_data import (
    Pair,
    StepCase,
    batches,
    dialogsum_pairs,
    load,
    with_active_share,
)
from benchmarks.step_impls import IMPLS, Impl, Job, naive
from benchmarks.step_measure import measure, prepare, save_truth, work
from benchmarks.step_record import Truth

pytestmark = pytest.mark.skipif(
    not hasattr(TrainingArguments, "train_sampling_strategy"), reason="the benchmark refuses to run"
)

COLUMNS = {
    "kind", "dtype", "active", "checkpointing", "impl", "median_s", "q1_s", "q3_s", "pairs_per_s",
    "tokens_per_s", "ratio", "process_mib", "growth_mib", "memory_ratio", "loss_error",
    "gradient_error", "worst_error", "worst_parameter", "torch", "trl", "commit", "device_model",
    "threads",
}  # fmt: skip


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Table and CSV of a quick run of our trainer and of plain torch, half of the pairs active.

    Workers work in this process; those of `benchmarks.loss` are started as always.
    """
    path = tmp_path_factory.mktemp("benchmark") / "step.csv"
    options = ["--quick", "--threads", "1", "--steps", "2", "--csv", str(path)]

    def in_this_process(_: str, spec: dict[str, Any], *, threads: int) -> dict[str, Any]:
        return json.loads(json.dumps(work(json.loads(json.dumps(spec)))))

    output = io.StringIO()
    with mock.patch.object(step, "run_worker", in_this_process), redirect_stdout(output):
        assert step.main([*options, "--impl", "plad_fast", "naive"]) == 0
    return output.getvalue(), path


def test_quick_run(quick_run: tuple[str, Path]) -> None:
    output, path = quick_run
    assert "50% active" in output
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["impl"] for row in rows] == ["plad_fast", "naive"]
    assert set(rows[0]) >= COLUMNS
    for row in rows:
        assert float(row["gradient_error"]) < 1e-5
        assert float(row["loss_error"]) < 1e-5
        assert float(row["pairs_per_s"]) > 0
    assert float(rows[0]["active_pairs"]) == 0.5
    assert float(rows[1]["gradient_error"]) == 0


def test_steps_are_drawn_from_the_csv(quick_run: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot_step import draw_steps

    target = tmp_path / "step.png"
    draw_steps(quick_run[1], target)
    assert target.read_bytes().startswith(b"\x89PNG")
    empty = tmp_path / "empty.csv"
    empty.write_text("kind\n")
    with pytest.raises(ValueError, match="no rows"):
        draw_steps(empty, target)


def test_rates_are_drawn_where_trl_and_plad_fast_were_measured(
    quick_run: tuple[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot_step import RESULTS, draw_rates

    target = tmp_path / "rates.png"
    draw_rates(RESULTS / "step_cpu.csv", target)
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="trl"):
        draw_rates(quick_run[1], target)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, Path]]:
    """Pairs, and the naive first step at two active shares."""
    folder = tmp_path_factory.mktemp("truth")
    pairs = folder / "pairs.json"
    prepare(_case(), pairs, None)
    truths = {share: folder / f"truth_{share}.pt" for share in (0.5, 1.0)}
    for share, path in truths.items():
        assert save_truth(_case(active=share), pairs, path)["status"] == "ok"
    return pairs, truths


def _case(**options: Any) -> StepCase:
    return StepCase("fixed", quick=True, **options)


def _measure(impl: Impl, files: tuple[Path, dict[float, Path]], **options: Any) -> dict[str, Any]:
    case = _case(**options)
    return measure(impl, case, files[0], files[1][case.active], steps=2)


@pytest.mark.parametrize("name", ["plad_fast", "plad_fast one pair", "plad_fast padded", "naive"])
@pytest.mark.parametrize(
    "options", [{}, {"checkpointing": True}, {"dtype": "bfloat16"}], ids=["", "lean", "bf16"]
)
def test_everyone_does_the_same_step(
    name: str, options: dict[str, Any], files: tuple[Path, dict[float, Path]]
) -> None:
    record = _measure(IMPLS[name], files, **options)
    assert record["status"] == "ok", record["reason"]
    assert len(record["seconds"]) == 2
    assert record["distinct_tokens"] == 2 * 4 * (32 + 2 * 8)
    assert record["process_bytes"] > record["growth_bytes"]


@pytest.mark.parametrize("name", ["trl", "trl batched"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_trl_does_the_same_step(
    name: str, share: float, files: tuple[Path, dict[float, Path]]
) -> None:
    pytest.importorskip("trl")
    record = _measure(IMPLS[name], files, active=share)
    assert record["status"] == "ok", record["reason"]


def test_wrong_steps_are_mismatches(files: tuple[Path, dict[float, Path]]) -> None:
    def another_beta(model: Any, tokenizer: Any, job: Job, recorder: Any) -> dict[str, float]:
        job = Job(job.case, job.pairs, job.beta + 1, job.steps, job.folder)
        return naive(model, tokenizer, job, recorder)

    def another_order(model: Any, tokenizer: Any, job: Job, recorder: Any) -> dict[str, float]:
        pairs = [pair.swapped() for pair in job.pairs]
        return naive(
            model, tokenizer, Job(job.case, pairs, job.beta, job.steps, job.folder), recorder
        )

    def a_frozen_norm(model: Any, *args: Any) -> dict[str, float]:
        model.model.norm.weight.requires_grad_(False)
        return naive(model, *args)

    expected = ((another_beta, "loss"), (another_order, "gradients"), (a_frozen_norm, "norm"))
    for run, word in expected:
        record = _measure(Impl("wrong", run), files)
        assert record["status"] == "mismatch"
        assert word in record["reason"]


def test_nan_gradients_are_a_mismatch(files: tuple[Path, dict[float, Path]]) -> None:
    model, _ = step_models.load(True, "cpu")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    assert not Truth(files[1][1.0]).compare(model).together <= 1e9


def test_the_active_share_is_exact(files: tuple[Path, dict[float, Path]]) -> None:
    pairs, margins = load(files[0])
    roles, beta = with_active_share(pairs, margins, 0.5, least_gap=1e-3)
    leads = [
        margin if role == pair else -margin
        for role, pair, margin in zip(roles, pairs, margins, strict=True)
    ]
    assert sum(lead < beta for lead in leads) == 2
    assert min(abs(lead - beta) for lead in leads) > 1e-3
    same, beta = with_active_share(pairs, margins, 1.0)
    assert same == pairs
    assert max(margins) < beta
    with pytest.raises(ValueError, match="whole number"):
        with_active_share(pairs, margins, 0.3)
    with pytest.raises(ValueError, match="nats from the hinge"):
        with_active_share(pairs, margins, 0.5, least_gap=1e3)


def test_the_timed_pairs_are_the_same_whatever_the_warm_up(tmp_path: Path) -> None:
    pairs = [Pair([index], [1], [2]) for index in range(12)]
    for steps in (2, 3, 5):
        one = Job(StepCase("fixed"), pairs, 0.0, steps, tmp_path)
        whole = Job(StepCase("fixed"), pairs, 0.0, steps, tmp_path, whole_warm_up=True)

        def timed(job: Job, steps: int = steps) -> list[list[Pair]]:
            return list(batches(job.rows, job.warm_up + steps))[job.warm_up :]

        assert timed(one) == timed(whole) == list(batches(pairs, steps))
        assert one.rows[:4] == whole.rows[:4] == pairs[:4]  # the checked step


def test_dialogsum_pairs(tmp_path: Path) -> None:
    path = tmp_path / "dialogues.jsonl"
    summaries = ["aa", "aa", "bbbb", "ccc", "dddddddd"]
    rows = [{"dialogue": f"#{i}: hello", "summary": text} for i, text in enumerate(summaries)]
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = step_models.tiny_tokenizer()
    pairs = dialogsum_pairs(path, tokenizer, count=4)
    assert "hello" in tokenizer.decode(pairs[0].prompt)
    # the nearest in length that reads differently
    assert tokenizer.decode(pairs[0].rejected).startswith("ccc")
    assert tokenizer.decode(pairs[2].chosen).startswith("bbbb")
    assert tokenizer.decode(pairs[2].rejected).startswith("ccc")
    with pytest.raises(ValueError, match="should have 64 rows"):
        dialogsum_pairs(path, tokenizer)


def test_bad_arguments_are_said_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = {
        "--case dialogsum": "needs --dialogsum",
        f"--dialogsum {tmp_path / 'none'}": "there is no file",
        "--active 0.3": "whole number",
        "--steps 0": "at least 1",
    }
    if not torch.cuda.is_available():
        bad["--device cuda"] = "there is no CUDA device here"
    for arguments, message in bad.items():
        with pytest.raises(SystemExit) as stopped:
            step.parse(arguments.split())
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_only_the_standard_plan_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "dialogues.jsonl"
    path.touch()
    whole = step.parse(["--dialogsum", str(path)])
    assert whole.whole
    assert {job.case.kind for job in whole.plan} == {"fixed", "dialogsum", "short-prompt"}
    part = step.parse([])
    assert part.whole
    assert {job.case.kind for job in part.plan} == {"fixed", "short-prompt"}
    assert not step.parse(["--dialogsum", str(path), "--steps", "20"]).whole


def test_exit_status_of_failures() -> None:
    failed, mismatch = {"status": "failed"}, {"status": "mismatch"}
    assert step.exit_status("trl", mismatch, asked_for=False) == 1
    assert step.exit_status("plad_fast", failed, asked_for=False) == 1
    assert step.exit_status("trl", failed, asked_for=False) == 0
    assert step.exit_status("trl", failed, asked_for=True) == 2


def test_satisfaction_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import step_satisfaction
    from benchmarks.plot_step import main

    path, target = tmp_path / "satisfaction.csv", tmp_path / "satisfaction.png"
    arguments = ["--steps", "4", "--layers", "1", "--hidden", "32", "--csv", str(path)]
    assert step_satisfaction.main(arguments) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert main(["--satisfaction", str(path), str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_floor_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import step_floor

    assert step_floor.main(["--quick", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"matrix products +\d+\.\d+ +\d+%", printed)
    # Two layers of 32 channels, 64 within, half as many heads of keys; a head of 260 tokens. Four
    # pairs of 32 + 2 * 8 tokens; only responses reach the head.
    body, head = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64), 260 * 32
    found = re.search(r"its products are (\d+\.\d+) GFLOP", printed)
    assert found is not None
    assert float(found[1]) == pytest.approx(6 * (192 * body + 64 * head) / 1e9, rel=0.01)


def test_the_evidence_has_the_table_of_the_results() -> None:
    from benchmarks.common import RESULTS
    from benchmarks.step_table import markdown

    with (RESULTS / "step_cpu.csv").open(newline="") as file:
        assert markdown(list(csv.DictReader(file))) in (ROOT / "docs/evidence.md").read_text()
