"""The generation benchmark runs, its table and CSV say what they should, its plot is drawn."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks import generation


def test_quick_run(tmp_path, capsys, monkeypatch):
    """One of its processes is a fresh one, for the others stay in this."""
    path = tmp_path / "generation.csv"
    run_worker = generation.run_worker

    def worker(module, spec, *, threads):
        if spec["impl"] == "plad_fast":
            return run_worker(module, spec, threads=threads)
        return generation.measure(json.loads(json.dumps(spec)))

    monkeypatch.setattr(generation, "run_worker", worker)
    arguments = ["--quick", "--threads", "1", "--limit", "12", "--max-new-tokens", "24"]
    status = generation.main([*arguments, "--batch-size", "4", "--csv", str(path)])
    output = capsys.readouterr().out
    assert status == 0, output
    with path.open(newline="") as file:
        rows = {row["impl"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(generation.DEFAULT)
    assert rows["generate"]["ratio"] == "1.0"
    assert rows["plad_fast"]["same_answers"] == "1.0"
    assert int(rows["plad_fast"]["shortest"]) < int(rows["plad_fast"]["longest"])
    assert rows["plad_fast"]["tokens"] == rows["generate sorted"]["tokens"]
    assert {"torch", "transformers", "commit", "device_model", "threads"} <= set(rows["plad_fast"])
    pytest.importorskip("matplotlib")
    assert generation.draw(path).read_bytes().startswith(b"\x89PNG")


def record(tokens, seconds, texts):
    return {
        "status": "ok", "tokens": tokens, "seconds": seconds, "cpu_seconds": 2 * seconds,
        "shortest": 1, "median_length": 2, "longest": 3, "peak_bytes": 0.0, "texts": texts,
    }  # fmt: skip


def test_ratios_are_taken_within_rounds_and_differing_answers_are_an_error(monkeypatch, capsys):
    answers = {str(i): f"{i}" for i in range(8)}
    other = answers | dict.fromkeys("123", "another")
    rounds = iter([record(100, 2.0, answers), record(100, 1.0, answers), record(300, 2.0, other)])
    monkeypatch.setattr(generation, "run_worker", lambda *args, **kwargs: next(rounds))
    assert generation.main(["--quick"]) == 1
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("plad_fast"))
    assert line.split() == ["plad_fast", "150.0", "3.00", "13.33", "3.00", "300", "0", "62%"]


def test_bad_arguments_are_said_at_once(capsys):
    for arguments, said in (
        (["--limit", "0"], "--limit"),
        (["--instructions", "no"], "no file"),
        (["--quick", "--plot"], "writes none"),
    ):
        with pytest.raises(SystemExit) as stopped:
            generation.parse(arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
