"""The table of quickstarts has what the runs' own files say."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from benchmarks import quickstart


@pytest.mark.usefixtures("no_plots")
def test_a_run_that_has_ended_is_read_and_not_done_again(
    finished_run, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(finished_run, tmp_path / "float32-3")
    (folder / "cost.json").write_text(json.dumps({"wall_s": 240.0, "cpu_s": 400.0}))
    monkeypatch.setattr("benchmarks.quickstart.subprocess.run", None)
    arguments = ["--seeds", "3", "--precisions", "float32", "--output-dir", str(tmp_path)]
    assert quickstart.main([*arguments, "--csv", str(tmp_path / "out.csv")]) == 0
    with open(tmp_path / "out.csv", newline="") as file:
        [row] = csv.DictReader(file)
    metrics = json.loads((folder / "metrics.json").read_text())
    sft, plad = metrics["students"]
    assert float(row["plad_margin"]) == plad["margin"]["mean"]
    assert float(row["sft_mean_words"]) == sft["mean_words"]
    change = metrics["comparisons"][0]
    assert float(row["change_rougeL_teacher_low"]) == change["rougeL_teacher"]["low"]
    assert int(row["wins"]) == change["wins"]["wins"]
    assert row["kept_step"] == ""  # nothing was validated
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].startswith("float32 3")
    assert f"{change['win_rate']['mean']:.3f}" in printed
    assert printed.split()[-2:] == ["400", "240"]
