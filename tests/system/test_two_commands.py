"""Two commands on one folder: the second changes nothing and says so, whichever they are."""

from __future__ import annotations

import pkgutil
import sys

import pytest

from plad_fast.cli import main
from plad_fast.data.store import RowStore, fingerprint_of
from tests.support.launched import Started
from tests.support.recipe_runs import arguments, write_pairs

# Before anything is written, in the middle of the work, and while the results are written.
MOMENTS = {
    "distill": (
        "recipe.run_folder.shutil.disk_usage",
        "evaluation.run_students.load_model",
        "evaluation.report.write.write_metrics",
    ),
    "pairs": (
        "recipe.run_folder.shutil.disk_usage",
        "pairs.generation.answering._ask",
        "recipe.inputs.write_jsonl",
    ),
    "train": (
        "training.train.newest_checkpoint",
        "training.trainer.fused_linear_preference_loss",
        "training.trained_folders.publish_folder",
    ),
    "evaluate": (
        "recipe.run_folder.shutil.disk_usage",
        "evaluation.run_students.load_model",
        "evaluation.report.write.write_metrics",
    ),
}


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def commands(tiny_teacher, tmp_path):
    """Every command on the folder `out`, with and without --overwrite."""
    out, model = str(tmp_path / "out"), str(tiny_teacher)
    pairs = str(write_pairs(tmp_path / "pairs.jsonl", 4))
    tail = ["--precision", "float32", "--output-dir", out]
    short = ["--max-new-tokens", "60", *tail]
    plain = {
        "distill": arguments(model, out, "--limit", "14", "--held-out", "5"),
        "pairs": ["pairs", "--teacher", model, "--student", model, "--prompts", pairs,
                  "--teacher-temperature", "1", *short],
        "train": ["train", "--model", model, "--pairs", pairs, "--batch-size", "2", *tail],
        "evaluate": ["evaluate", "--student", f"A={model}", "--pairs", pairs, *short],
    }  # fmt: skip
    return plain, [*plain.values(), *([*c, "--overwrite"] for c in plain.values())]


def contents(folder):
    return {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}


@pytest.mark.parametrize("first", list(MOMENTS))
def test_the_second_command_changes_nothing(first, commands, tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl")
    plain, every = commands
    met = []

    def meet(moment):
        if moment in met:
            return
        met.append(moment)
        before = contents(tmp_path / "out")
        there = set((tmp_path / "out").parent.iterdir())
        capsys.readouterr()
        for second in every:
            assert main(second) == 2, (moment, second)
            error = capsys.readouterr().err
            assert "is being filled by another process" in error, (moment, second)
        assert contents(tmp_path / "out") == before, moment
        assert set((tmp_path / "out").parent.iterdir()) == there, moment

    for moment in MOMENTS[first]:
        owner, _, name = f"plad_fast.{moment}".rpartition(".")
        real = getattr(pkgutil.resolve_name(owner), name)

        def hooked(*args, real=real, moment=moment, **kwargs):
            meet(moment)
            return real(*args, **kwargs)

        monkeypatch.setattr(f"plad_fast.{moment}", hooked)
    assert main(plain[first]) == 0
    assert tuple(met) == MOMENTS[first]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_paid_answers_are_safe_from_another_process(commands, tmp_path, tmp_path_factory, capsys):
    """Its --overwrite discards nothing, its settings are not recorded, and the first goes on."""
    plain, _ = commands
    hold = "recipe.inputs.write_jsonl 1 hold"
    started = Started(1, plain["pairs"], tmp_path_factory.mktemp("logs"), hold)
    started.wait_for("REACHED")
    before = contents(tmp_path / "out")
    assert len((tmp_path / "out" / "teacher.jsonl").read_text().splitlines()) == 5
    for extra in (["--overwrite"], ["--seed", "3"], ["--seed", "3", "--overwrite"]):
        assert main([*plain["pairs"], *extra]) == 2
        assert "another process" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    started.release()
    assert started.statuses() == [0]
    assert (tmp_path / "out" / "pairs.jsonl").is_file()


def test_a_store_in_use_keeps_all_from_being_discarded(commands, tmp_path, capsys):
    """Also where it is another program that has it open: all are locked before any is emptied."""
    pytest.importorskip("fcntl")
    plain, _ = commands
    assert main(plain["pairs"]) == 0
    before = contents(tmp_path / "out")
    store = tmp_path / "out" / "student.jsonl"
    with RowStore.open(store, fingerprint_of(store)):
        assert main([*plain["pairs"], "--overwrite"]) == 2
        assert "student.jsonl is being filled by another process" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
