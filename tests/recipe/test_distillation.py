"""The recipe end to end on a tiny model: its files, its resumption after kill -9, its stages."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from plad_fast.cli import main
from plad_fast.data.prompts import builtin_prompts
from plad_fast.errors import UsageError
from plad_fast.models.loading import load_model
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.recipe.dependencies import STAGES as SETTINGS_OF
from plad_fast.recipe.dependencies import stage_settings
from plad_fast.recipe.run_folder import RunFolder
from plad_fast.recipe.settings import DistillConfig
from tests.support.recipe_runs import arguments, content, evaluate, kill_at

STAGES = [
    "student", "teacher's answers", "fine-tuning", "student's samples", "pairs",
    "preference training", "evaluation",
]  # fmt: skip
LOSS = "training.trainer.fused_linear_preference_loss"


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def finished(finished_run):
    return finished_run


def test_the_run_folder_holds_what_was_promised(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert list(json.loads((finished / "run.json").read_text())["stages"]) == STAGES
    student = AutoModelForCausalLM.from_pretrained(finished / "plad")
    assert student.config.num_hidden_layers == 1
    tokenizer = AutoTokenizer.from_pretrained(finished / "plad")
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    assert student.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    pair = json.loads((finished / "pairs" / "train.jsonl").read_text().splitlines()[0])
    assert {"prompt", "chosen", "rejected", "id", "source"} <= pair.keys()
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [row["name"] for row in metrics["students"]] == ["SFT student", "PLaD student"]
    assert metrics["students"][0]["ranking_accuracy"]["mean"] is not None
    assert metrics["students"][0]["own_ranking_accuracy"] is not None
    assert {p.name for p in (finished / "plots").iterdir()} == {
        "comparison.png", "margins.png", "training.png",
    }  # fmt: skip
    assert "<html" in (finished / "report.html").read_text()
    assert not list(finished.glob("*.checkpoints"))
    assert not list(finished.glob(".*"))


def test_what_became_of_every_prompt_is_told(finished):
    """In a file beside the pairs, and as a funnel in the report."""
    from plad_fast.pairs.build import PairReport
    from plad_fast.recipe.inputs import read_jsonl

    report = (finished / "report.html").read_text()
    for name, dropped, pairs in (
        ("training pairs", "dropped", "train"),
        ("held-out pairs", "dropped-held-out", "held-out"),
    ):
        drops = read_jsonl(finished / "pairs" / f"{dropped}.jsonl")
        kept = read_jsonl(finished / "pairs" / f"{pairs}.jsonl")
        assert all(
            {"id", "prompt", "teacher", "student", "reason"} <= drop.keys() for drop in drops
        )
        total = 8
        assert len(drops) + len(kept) == total
        assert len({row["id"] for row in [*drops, *kept]}) == total
        summary = json.loads((finished / "run.json").read_text())["stages"]["pairs"]["summary"]
        assert str(PairReport(len(kept), drops)) in summary
        table = report.split(f"<caption>{name}</caption>")[1].split("</table>")[0]
        assert f">prompts</th><td>{total}</td>" in table
        assert f">kept</th><td>{len(kept)}</td>" in table
    assert "the number of training pairs is" in report
    assert "owes part of any gain to the answers to these" in report


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_another_teacher_in_the_same_folder_is_refused(finished, tiny_teacher, tmp_path, capsys):
    """Its answers may have been paid for; everything else would be made anew all the same."""
    folder = copy_of(finished, tmp_path)
    before = content(folder)
    assert main(arguments(tiny_teacher, folder, "--max-new-tokens", "50")) == 2
    error = capsys.readouterr().err
    assert "max_new_tokens was 60 and is 50" in error
    assert "--overwrite" in error
    # The same limit, of a model that writes its reasoning into its answers.
    assert main(arguments(tiny_teacher, folder, "--reasoning-tokens", "9")) == 2
    assert "reasoning_tokens was 'not set' and is 9" in capsys.readouterr().err
    assert content(folder) == before


@pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signal")
@pytest.mark.parametrize(
    ("function", "at", "stage"),
    [
        ("data.store._line", 12, "teacher's answers"),
        pytest.param(LOSS, 6, "fine-tuning", marks=pytest.mark.slow),
        pytest.param("data.store._line", 38, "student's samples", marks=pytest.mark.slow),
        (LOSS, 14, "preference training"),
        ("evaluation.run_students.score_rows", 2, "evaluation"),
        # The model is in its place, and run.json does not know yet.
        ("recipe.run_folder.RunFolder._write", 4, "fine-tuning"),
    ],
    ids=["pairs", "sft", "samples", "training", "evaluation", "unrecorded"],
)
def test_kill_and_go_on(function, at, stage, finished, tiny_teacher, tmp_path, capfd):
    """After kill -9 in any stage the same command ends with the numbers of a run left alone."""
    folder = tmp_path / "run"
    command = arguments(tiny_teacher, folder, "--generation-batch-size", "4")
    kill_at(function, at, command)
    done = json.loads((folder / "run.json").read_text())["stages"]
    assert list(done) == STAGES[: STAGES.index(stage)]
    stored = sum(len(path.read_text().splitlines()) for path in folder.rglob("*.jsonl"))
    checkpoints = list(folder.glob("*.checkpoints/checkpoint-4/trainer_state.json"))
    assert (folder / "sft").is_dir() == (stage not in STAGES[:3] or "run_folder" in function)
    assert main(command) == 0
    out = capfd.readouterr().out
    assert out.count("done before") == len(done)
    if stage in ("teacher's answers", "student's samples"):
        assert stored > 4  # what had been answered was kept
    if function == LOSS:
        assert checkpoints  # there was something to go on from
    for file in ("metrics.json", "pairs/train.jsonl"):
        assert (folder / file).read_text() == (finished / file).read_text(), file


def test_the_stages_alone(finished, tiny_teacher, tmp_path, capsys):
    """pairs, train and evaluate, each on what the one before wrote."""
    pairs = [
        "pairs", "--teacher", str(tiny_teacher), "--student", str(finished / "student"),
        "--limit", "12", "--teacher-temperature", "1", "--student-temperature", "1",
        "--max-new-tokens", "60", "--precision", "float32", "--output-dir", str(tmp_path / "p"),
    ]  # fmt: skip
    assert main(pairs) == 0
    file = str(tmp_path / "p" / "pairs.jsonl")
    train = ["train", "--model", str(finished / "student"), "--pairs", file]
    assert main([*train, "--output-dir", str(tmp_path / "sft"), "--loss", "sft"]) == 0
    assert main([*train, "--output-dir", str(tmp_path / "plad"), "--beta", "0.1"]) == 0
    assert "ranking_accuracy" in capsys.readouterr().out
    evaluate = [
        "evaluate",
        "--student", f"SFT={tmp_path / 'sft'}",
        "--student", f"PLaD={tmp_path / 'plad'}",
        "--pairs", file, "--output-dir", str(tmp_path / "e"), "--precision", "float32",
        "--max-new-tokens", "60",
    ]  # fmt: skip
    assert main(evaluate) == 0
    assert "PLaD compared with SFT" in capsys.readouterr().out
    assert (tmp_path / "e" / "report.html").is_file()


def test_a_finished_run_may_be_moved_and_is_not_done_again(
    finished, tiny_teacher, tmp_path, capsys, monkeypatch
):
    """A copy has other times and another path; no model is loaded, tables and report come from the
    files."""
    moved = shutil.copytree(finished, tmp_path / "moved", copy_function=shutil.copyfile)
    monkeypatch.setattr("plad_fast.recipe.distillation.load_model", None)
    monkeypatch.setattr("plad_fast.models.loading.load_model", None)
    monkeypatch.setattr("plad_fast.evaluation.run_students.load_model", None)
    assert main(arguments(tiny_teacher, moved)) == 0
    assert capsys.readouterr().out.count("done before") == len(STAGES)
    assert (moved / "metrics.json").read_text() == (finished / "metrics.json").read_text()


def test_answers_to_prompts_that_are_still_there_are_kept(
    tiny_teacher, tmp_path, capsys, monkeypatch
):
    """Under the same path one prompt is new and one has changed under its id."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": p.content, "id": i} for i, p in enumerate(builtin_prompts()[:12])]
    write_rows(file, rows[:11])
    command = [*arguments(tiny_teacher, tmp_path / "run"), "--prompts", str(file)]
    command[command.index("--held-out") + 1] = "4"
    monkeypatch.setattr("plad_fast.recipe.distillation.Distillation._fine_tune", stop)
    assert main(command) == 2
    store = tmp_path / "run" / "answers" / "teacher.jsonl"
    before = store.read_text().splitlines()
    rows[3]["prompt"] = "Say something else."
    write_rows(file, rows)
    asked = []
    real = LocalModel.generate_samples
    monkeypatch.setattr(
        LocalModel,
        "generate_samples",
        lambda model, wanted, sampling: (asked.extend(wanted), real(model, wanted, sampling))[1],
    )
    capsys.readouterr()
    assert main(command) == 2
    assert "prompts was '11 prompts, " in capsys.readouterr().out
    assert [prompt.id for prompt, _ in asked] == ["3", "11"]
    after = store.read_text().splitlines()
    [changed] = [line for line in before if line.startswith('{"id": "3"')]
    assert after[:-2] == [line for line in before if line != changed]
    assert store.with_name("teacher.old.jsonl").read_text().splitlines()[1:] == [changed]


def stop(*_):
    raise UsageError("far enough")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_changed_setting_makes_anew_what_depends_on_it(finished, tiny_teacher, tmp_path, capsys):
    """Evaluation settings the evaluation alone, the margin training on pairs and what follows; the
    numbers are those of a run that never had another setting."""
    folder = copy_of(finished, tmp_path)
    before = (finished / "metrics.json").read_text()
    assert main(arguments(tiny_teacher, folder, "--calibration-samples", "2")) == 0
    out = capsys.readouterr().out
    assert "calibration_samples was 0 and is 2: evaluation runs anew" in out
    assert out.count("done before") == len(STAGES) - 1
    assert json.loads((folder / "metrics.json").read_text())["calibration"] is not None

    assert main(arguments(tiny_teacher, folder, "--beta", "9", "--epochs", "1")) == 0
    out = capsys.readouterr().out
    assert "beta was None and is 9.0: preference training and evaluation run anew" in out
    assert out.count("done before") == len(STAGES) - 2
    assert json.loads((folder / "plad" / "training.json").read_text())["beta"] == 9.0
    assert (folder / "metrics.json").read_text() != before

    assert main(arguments(tiny_teacher, folder)) == 0
    assert (folder / "metrics.json").read_text() == before
    capsys.readouterr()
    assert main(arguments(tiny_teacher, folder)) == 0
    assert capsys.readouterr().out.count("done before") == len(STAGES)


def test_edited_pairs_are_trained_on(finished, tiny_teacher, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    file = folder / "pairs" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # The same rows in another spelling are no edit.
    write_rows(file, [dict(reversed(row.items())) for row in rows])
    assert main(arguments(tiny_teacher, folder)) == 0
    assert capsys.readouterr().out.count("done before") == len(STAGES)

    rows[1]["chosen"][0]["content"] = "better"
    write_rows(file, rows[1:])
    edited = file.read_text()
    assert main(arguments(tiny_teacher, folder)) == 0
    out = capsys.readouterr().out
    count = f"({len(rows)} before, {len(rows) - 1} now)"
    assert f"pairs/train.jsonl has other rows {count}, and is kept as edited: preference" in out
    assert out.count("done before") == len(STAGES) - 2
    assert file.read_text() == edited
    record = json.loads((folder / "plad" / "training.json").read_text())
    assert record["rows"].startswith(f"{len(rows) - 1} rows, ")
    assert main(arguments(tiny_teacher, folder)) == 0
    assert capsys.readouterr().out.count("done before") == len(STAGES)

    # What would make the file anew is refused before anything is done.
    before = content(folder)
    assert main(arguments(tiny_teacher, folder, "--sft-epochs", "1")) == 2
    error = capsys.readouterr().err
    assert "train.jsonl was edited" in error
    assert "sft_epochs was 2.0 and is 1.0" in error
    # Cut off, there is nothing that the edit could be made again from.
    file.write_text("".join(edited.splitlines(keepends=True)[:2]))
    assert main(arguments(tiny_teacher, folder)) == 2
    assert f"has 2 of its {len(rows) - 1} rows" in capsys.readouterr().err
    file.write_text(edited)
    assert content(folder) == before
    file.unlink()
    assert main(arguments(tiny_teacher, folder)) == 0
    assert (folder / "metrics.json").read_text() == (finished / "metrics.json").read_text()


def test_every_setting_is_one_of_a_stage():
    """A new one would make all stages anew until it is listed with its own."""
    config = DistillConfig()
    everywhere = set.intersection(*(set(stage_settings(config, name)) for name in SETTINGS_OF))
    assert not everywhere


def test_prompts_of_any_name(tiny_teacher, tmp_path):
    """Tabs, which stand before the number of a sample, line breaks, slashes, and their like."""
    ids = [
        "t",
        "t\t1",
        "t\t\t1",
        "n\n",
        "../s",
        "a/b",
        "\u00fc",
        " t",
        "t ",
        "C:",
        "0",
        "1",
        "\u2028",
    ]
    prompts = [p.content for p in builtin_prompts()]
    file = tmp_path / "prompts.jsonl"
    write_rows(file, [{"prompt": p, "id": i} for p, i in zip(prompts, ids, strict=False)])
    command = [
        *arguments(tiny_teacher, tmp_path / "run", "--student-samples", "2", "--select", "all"),
        *("--prompts", str(file), "--held-out", "4", "--teacher-temperature", "0"),
    ]
    assert main(command) == 0
    pairs = (tmp_path / "run" / "pairs" / "train.jsonl").read_text().split("\n")[:-1]
    names = [json.loads(line)["id"] for line in pairs]
    assert len(set(names)) == len(names) > 3
    assert main(command) == 0


@pytest.mark.parametrize("option", ["--student", "--scorer", "--teacher", "--teacher vllm"])
def test_nothing_is_emptied_that_the_run_is_to_read(option, tiny_teacher, tmp_path, capsys):
    run = tmp_path / "run"
    RunFolder(run, {}).close()
    shutil.copytree(tiny_teacher, run / "sft")
    place = f"reward:{run / 'sft'}#good" if option == "--scorer" else str(run / "sft")
    extra = ["--overwrite"]
    if option.endswith("vllm"):  # which runs models that are not made into students
        option, place = "--teacher", f"vllm:{place}"
        extra += ["--student", str(tiny_teacher)]
    assert main(arguments(tiny_teacher, run, option, place, *extra)) == 2
    assert f"{option} {place} lies in --output-dir" in capsys.readouterr().err
    assert (run / "sft" / "config.json").exists()


@pytest.mark.parametrize("option", ["--student", "--teacher"])
def test_nothing_is_emptied_for_a_model_that_is_not_there(option, tiny_teacher, tmp_path, capsys):
    run = tmp_path / "run"
    RunFolder(run, {}).close()
    (run / "sft").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "config.json").write_text("{}")
    place = str(tmp_path / "nothing")
    assert main(arguments(tiny_teacher, run, option, place, "--overwrite")) == 2
    assert place in capsys.readouterr().err
    assert (run / "sft").exists()


def test_adapters_of_a_run_move_with_it(tiny_teacher, tmp_path, capsys):
    """What they are on lies in the folder too, and other adapters may be on them."""
    folder, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    lora = ("--lora-r", "2", "--learning-rate", "1e-2")
    assert main(arguments(tiny_teacher, folder, *lora)) == 0
    card = (folder / "plad" / "README.md").read_text()
    assert "without the model that they are on, sft, which" in card
    assert 'load_model("plad", merge_adapters=True)' in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("plad")' in card
    assert str(tmp_path) not in card
    moved.parent.mkdir()
    folder.rename(moved)
    capsys.readouterr()
    assert main(arguments(tiny_teacher, moved, *lora)) == 0
    assert capsys.readouterr().out.count("done before") == len(STAGES)
    pairs = moved / "pairs" / "held-out.jsonl"
    assert main(evaluate(moved / "plad", pairs, tmp_path / "compared")) == 0
    merged = load_model(moved / "plad", merge_adapters=True).state_dict()
    sft = load_model(moved / "sft", merge_adapters=True).state_dict()
    assert any(not torch.equal(weight, sft[name]) for name, weight in merged.items())
    alone = shutil.copytree(moved / "plad", tmp_path / "alone" / "plad")
    assert main(evaluate(alone, pairs, tmp_path / "compared-again")) == 2
    assert f"there is nothing at '{tmp_path / 'alone' / 'sft'}'" in capsys.readouterr().err
