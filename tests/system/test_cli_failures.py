"""Failures and bare installations on the command line: a status and one line."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from plad_fast.cli import main


def failing(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_interruption_by_hand_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("plad_fast.recipe.distillation.distill", failing(KeyboardInterrupt()))
    assert main(["quickstart", "--output-dir", str(tmp_path / "q")]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_after_an_interrupted_overwriting_the_flag_is_to_be_left_out(monkeypatch, capsys):
    """It empties the folder at every start. The report's command is without it for the same."""
    commands = []

    def interrupted(config, *, overwrite, command):
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr("plad_fast.recipe.distillation.distill", interrupted)
    typed = ["distill", "--overwrite", "--beta", "1"]
    monkeypatch.setattr("sys.argv", ["plad-fast", *typed])
    assert main(typed) == 130
    assert "run the same command again without --overwrite, which" in capsys.readouterr().err
    assert commands == ["plad-fast distill --beta 1"]


def test_the_help_says_what_an_exit_status_means(capsys):
    """A scheduler has to be told which one asks to be run again."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "75 ended by SIGTERM or SIGHUP" in text
    assert "the same command goes on" in text


PAIRS = ["pairs", "--teacher", "t", "--student", "s", "--output-dir", "o"]


def test_pairs_take_answers_of_any_length(monkeypatch):
    """They are not scored here, so that no --max-length bounds them."""
    seen = []
    monkeypatch.setattr(
        "plad_fast.recipe.stages.pair_models", lambda config, **_: seen.append(config)
    )
    assert main([*PAIRS, "--max-new-tokens", "4096"]) == 0
    assert seen[0].max_new_tokens == 4096


@pytest.mark.parametrize("short", ["--max-length=9", "--limi=3", "--overwr"])
def test_flags_have_to_be_spelt_out(short, capsys):
    """`--max-length` is no flag of `pairs`, and must not be taken for --max-length-ratio."""
    with pytest.raises(SystemExit):
        main([*PAIRS, short])
    assert f"unrecognized arguments: {short}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "usage", "message"),
    [
        ("", "plad-fast COMMAND", "a command is missing; there are distill, tune, quickstart"),
        ("distil", "plad-fast COMMAND", "unknown command 'distil'; did you mean distill?"),
        ("Train", "plad-fast COMMAND", "did you mean train?"),
        ("fit", "plad-fast COMMAND", "unknown command 'fit'; there are distill"),
        ("--beta 1 train", "plad-fast COMMAND", "--beta stands where the command belongs: plad-f"),
        ("distill --bta 1", "plad-fast distill", "--bta 1; did you mean --beta?"),
        ("train --batch_size 4", "plad-fast train --model", "did you mean --batch-size?"),
        ("train -model x", "plad-fast train --model", "did you mean --model?"),
        ("pairs --rounds=2", "plad-fast pairs --teacher", "a flag of distill, not of pairs"),
        ("distill --pairs p", "plad-fast distill", "--pairs is a flag of train and evaluate, not"),
        ("pairs --lr 1", "plad-fast pairs", "--learning-rate is a flag of distill, tune and"),
        ("train c.yaml", "plad-fast train", "c.yaml; did you mean --config c.yaml?"),
        ("doctor --qqq", "plad-fast doctor", "plad-fast doctor --help lists the flags"),
        ("train my model", "plad-fast train", "a value with spaces needs quotes"),
        ("train --training a=b c=d", "plad-fast train", "c=d; repeat --training for each KEY=VAL"),
        ("distill --beta", "plad-fast distill", "argument --beta: expected one argument"),
        ("train --model m", "plad-fast train", "train needs --pairs and --output-dir"),
        ("evaluate", "plad-fast evaluate", "needs --student, --pairs and --output-dir"),
    ],
)
def test_what_is_mistyped_is_told_with_the_usage_of_the_command(typed, usage, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(typed.split())
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"usage: {usage}")
    assert message in printed
    assert len(printed.splitlines()) == 2


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train --lr 1", "--learning-rate"),
        ("train --per-device-train-batch-size 1", "--batch-size and --micro-batch-size"),
        ("train --gradient_accumulation_steps 1", "--batch-size and --micro-batch-size"),
        ("train --logging-steps 1", "--training logging_steps=..."),
        ("train --warmup-ratio 0.1", "--training warmup_steps=..., below 1 a share of the steps"),
        ("train --save-steps 1", "--saves-per-stage"),
        ("train --save-per-stage 1", "--saves-per-stage"),
        ("train --max-steps 1", "--epochs"),
        ("train --dataset d", "--pairs"),
        ("distill --dataset d", "--prompts"),
        ("pairs --dataset-name d", "--prompts"),
        ("train --use-peft", "--lora-r"),
        ("train --model-name-or-path m", "--model"),
        ("train --student m", "--model"),
        ("distill --model m", "--student"),
        ("train --bf16", "--precision"),
        ("train --output o", "--output-dir"),
        ("train --max-len 9", "--max-length"),
    ],
)
def test_the_flags_of_other_programs_are_answered_with_ours(typed, meant, capsys):
    with pytest.raises(SystemExit):
        main(typed.split())
    assert f"; did you mean {meant}" in capsys.readouterr().err


CONFIGS = {
    "distill": ("teacher: t\nbeta: 2", ["--beta=3"], {"teacher": "t", "beta": 3.0}),
    "quickstart": ("output_dir: q", [], {"output_dir": "q", "teacher": "column:answer"}),
    "pairs": (
        "teacher: t\nstudent: s\noutput-dir: o\nselect: all",
        ["--student=z"],
        {"teacher": "t", "student": "z", "output_dir": "o", "select": "all"},
    ),
    "train": (
        "model: m\npairs: p\nloss: dpo\nepochs: 2",
        ["--output-dir=o"],
        {"model": "m", "pairs": "p", "loss": "dpo", "epochs": 2.0, "output_dir": "o"},
    ),
    "evaluate": (
        "student: {A: a, B: b}\npairs: p\noutput_dir: o\nseed: 3",
        [],
        {"A": "a", "B": "b", "pairs": "p", "seed": 3, "output_dir": "o"},
    ),
}


@pytest.mark.parametrize("command", CONFIGS)
def test_every_command_takes_its_settings_from_a_file(command, monkeypatch, tmp_path, capsys):
    text, flags, expected = CONFIGS[command]
    names = {
        "distill": "distillation.distill",
        "quickstart": "distillation.distill",
        "pairs": "stages.pair_models",
        "train": "stages.train_on_pairs",
        "evaluate": "evaluate.evaluate_on_pairs",
    }
    seen = {}

    def run(*arguments, **options):
        seen.update(zip(("model", "pairs"), arguments, strict=False) if command == "train" else ())
        seen.update({"pairs": arguments[1]} if command == "evaluate" else {})
        for given in (*arguments, options):
            seen.update(given if isinstance(given, dict) else getattr(given, "__dict__", {}))

    monkeypatch.setattr(f"plad_fast.recipe.{names[command]}", run)
    monkeypatch.chdir(tmp_path)
    for name in "tsz":  # the teacher is looked for at once
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "c.yaml").write_text(text)
    assert main([command, "--config", "c.yaml", *flags]) == 0
    assert seen.items() >= expected.items()
    (tmp_path / "c.yaml").write_text("learning-rat: 1")
    assert main([command, "--config", "c.yaml", *flags]) == 2
    assert f"unknown setting 'learning-rat' of {command}" in capsys.readouterr().err


def test_students_of_a_file_are_a_mapping_or_a_list(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(
        "plad_fast.recipe.evaluate.evaluate_on_pairs",
        lambda students, *_, **__: seen.append(students),
    )
    file = tmp_path / "c.yaml"
    command = ["evaluate", "--pairs=p", "--output-dir=o", "--config", str(file)]
    for text in ("{A: a, B: b}", "[A=a, B=b]"):
        file.write_text(f"student: {text}")
        assert main(command) == 0
    file.write_text("student: A=c")
    assert main(command) == 0
    assert main([*command, "--student=Z=z"]) == 0
    assert seen == [{"A": "a", "B": "b"}] * 2 + [{"A": "c"}, {"Z": "z"}]
    for text in ("[A]", "3", "[[A=a]]", "{A: }", "[A=a, A=b]"):
        file.write_text(f"student: {text}")
        assert main(command) == 2
        assert "must be NAME=PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("stages.pair_models", ["pairs", "--teacher", "t", "--student", "s"]),
        ("evaluate.evaluate_on_pairs", ["evaluate", "--student", "A=~/a", "--pairs", "p"]),
        ("stages.train_model", ["train", "--model", "m", "--pairs", "pairs.jsonl"]),
        ("distillation.distill", ["distill"]),
        ("distillation.distill", ["quickstart"]),
    ],
)
def test_the_home_folder_is_spelt_out_for_every_command(stage, command, monkeypatch, tmp_path):
    """No shell does it in `--output-dir=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    row = '{"prompt": "a", "chosen": "%s", "rejected": "c"}\n'
    (tmp_path / "pairs.jsonl").write_text(row % "b" + row % "d")
    seen = []

    def run(*arguments, **options):
        seen.extend(str(getattr(value, "output_dir", value)) for value in arguments)
        return []

    monkeypatch.setattr(f"plad_fast.recipe.{stage}", run)
    assert main([*command, "--output-dir=~/x"]) == 0
    assert str(tmp_path / "x") in seen
    assert "~" not in "".join(seen)
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_unexpected_error_leaves_one_line_and_a_file(has_begun, monkeypatch, capsys, tmp_path):
    """The file lies with the run, if that got as far as a folder; it must not make one foreign."""
    (tmp_path / "q").mkdir()
    monkeypatch.setattr(
        "plad_fast.recipe.distillation.distill", failing(ZeroDivisionError("three\nlines\nl"))
    )
    monkeypatch.chdir(tmp_path)
    if has_begun:
        (tmp_path / "q" / "run.json").touch()
    assert main(["quickstart", "--output-dir", str(tmp_path / "q")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unexpected ZeroDivisionError: three; the traceback is in" in error
    folder = tmp_path / "q" if has_begun else tmp_path
    assert "ZeroDivisionError" in (folder / "plad-fast-error.log").read_text()


def test_an_unexpected_error_that_cannot_be_written_down(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("plad_fast.recipe.distillation.distill", failing(ZeroDivisionError("x")))
    (tmp_path / "plad-fast-error.log").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--output-dir", str(tmp_path / "q")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "could not be written" in error


WRAPPED = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)
OF_TORCH = "[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0"
OF_TORCH_AT_ITS_END = "[enforce fail at inline_container.cc] . unexpected pos 576 vs 470\nframe #0"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "file"), "make room"),
        (RuntimeError("I/O error: File too large (os error 27)"), "make room"),
        (WRAPPED, "make room"),
        (RuntimeError(OF_TORCH), "make room"),
        (RuntimeError(OF_TORCH_AT_ITS_END), "make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "may write to"),
        (PermissionError(errno.EPERM, "Operation not permitted"), "may write to"),
        (OSError(errno.EROFS, "Read-only file system"), "on another disk"),
        (
            RuntimeError("open file failed with strerror: Read-only file system"),
            "on another disk",
        ),
        (Exception("Read-only file system (os error 30)"), "on another disk"),
        (OSError(errno.ECONNRESET, "Connection reset by peer"), None),
        (OSError("Can't load the model"), None),
    ],
)
def test_only_what_the_disk_did_is_answered_with_what_helps_against_it(
    error, advice, monkeypatch, capsys
):
    """A full one wants room, and one that may not be written to has plenty of it."""
    monkeypatch.setattr("plad_fast.recipe.distillation.distill", failing(error))
    assert main(["quickstart"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert str(error).splitlines()[0] in printed
    assert ("what was finished is kept" in printed) == (advice is not None)
    for word in ("make room", "on another disk", "may write to"):
        assert (word in printed) == (word == advice)


def test_a_full_disk_behind_another_error_is_still_a_full_disk(monkeypatch, capsys):
    def fail(*args, **kwargs):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("while closing the archive")  # noqa: B904

    monkeypatch.setattr("plad_fast.recipe.distillation.distill", fail)
    assert main(["quickstart"]) == 2
    assert "make room" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_command_quietly():
    """As `plad-fast doctor | true` does. Buffered output, the default, is written last of all."""
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    code = (
        "import sys; from plad_fast.recipe import doctor; doctor.diagnose = lambda: 'one line'\n"
        "from plad_fast.cli import main; sys.exit(main(['doctor']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("text", "prompt"),
    [(r"a\nb", "a\nb"), (r"a\\nb", r"a\nb"), (r"\\nabla", r"\nabla"), (r"\theta", r"\theta")],
)
def test_a_line_break_in_a_template_flag(text, prompt, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "plad_fast.recipe.distillation.distill", lambda config, **_: seen.append(config)
    )
    assert main(["distill", "--prompt-template", text]) == 0
    assert seen[0].prompt_template == prompt


def without(*names: str) -> str:
    return f"import sys\nfor n in {names!r}: sys.modules[n] = None\n"


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_doctor_says_what_will_be_used():
    """It is for installations that do not work yet, so it needs torch alone."""
    code = without("transformers", "datasets", "accelerate", "matplotlib", "yaml")
    done = run_python(code + "from plad_fast.cli import main; sys.exit(main(['doctor']))")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "backend", "attention", "scratch", "plad_ranking", "cores"):
        assert word in done.stdout


def test_a_missing_library_is_named_with_its_pip_line():
    code = without("transformers", "datasets") + "from plad_fast.cli import main; "
    done = run_python(code + "sys.exit(main(['distill']))")
    assert done.returncode == 2
    assert "run: pip install transformers datasets" in done.stderr


def test_help_needs_no_heavy_import():
    code = without("torch", "transformers", "datasets", "matplotlib", "yaml")
    done = run_python(code + "from plad_fast.cli import main\nmain(['distill', '--help'])")
    assert done.returncode == 0, done.stderr
    assert "--prompt-template" in done.stdout


@pytest.mark.skipif(
    shutil.which("plad-fast") is None and not os.environ.get("CI"), reason="not installed"
)
def test_the_console_script_is_installed():
    script = shutil.which("plad-fast", path=os.path.dirname(sys.executable))
    assert script is not None
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("plad-fast ")
