"""Signals end a command in good order, and what was finished by then is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from plad_fast.cli import main
from plad_fast.data import store
from plad_fast.training import signals, trainer
from plad_fast.training.checkpoints import Checkpoints
from plad_fast.training.signals import Terminated, deferred_signals, raised_signals
from plad_fast.training.train import train_model
from tests.support.recipe_runs import write_pairs

pty = pytest.importorskip("pty", reason="sends POSIX signals")

AGAIN = 75
STEPS = 6


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 2 * STEPS)


def train(model, pairs, output) -> list[str]:
    """Saves at the end only."""
    return ["train", "--model", str(model), "--pairs", str(pairs), "--output-dir", str(output),
            "--batch-size", "2", "--precision", "float32", "--learning-rate", "1e-3",
            "--saves-per-stage", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def straight(tiny_teacher, pairs, tmp_path_factory) -> bytes:
    """The weights of a training that nothing disturbed."""
    output = tmp_path_factory.mktemp("straight") / "out"
    assert main(train(tiny_teacher, pairs, output)) == 0
    return (output / "model.safetensors").read_bytes()


@pytest.fixture
def send(monkeypatch):
    """Sends signals to this process at a call of a function, once."""

    def at(module, name, call, *numbers):
        real, calls = getattr(module, name), []

        def wait(*args, **kwargs):
            calls.append(name)
            for number in numbers if len(calls) == call else ():
                signal.raise_signal(number)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, wait)

    return at


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_whose_exception_python_drops_comes_once_more(number, monkeypatch):
    """As in a `__del__`, which the collector may call at any time."""

    class Sending:
        def __del__(self):
            signal.raise_signal(number)
            time.sleep(0)

    hook, left = sys.unraisablehook, []
    monkeypatch.setattr(signals, "_SAME", 0.0)  # as if the first had been long ago
    monkeypatch.setattr(signals, "_GRACE", 0.1)
    monkeypatch.setattr(os, "_exit", left.append)
    with raised_signals(lambda _: 1):
        Sending()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
        time.sleep(0.5)
    assert not left  # it was no second signal
    assert sys.unraisablehook is hook


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGTERM, AGAIN, "ended by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_saves_at_the_next_step_and_the_same_command_goes_on(
    number, status, said, send, tiny_teacher, pairs, straight, tmp_path, capfd
):
    output = tmp_path / "out"
    command = train(tiny_teacher, pairs, output)
    send(trainer, "fused_linear_preference_loss", 3, number)
    assert main(command) == status
    error = capfd.readouterr().err
    assert f"{number.name}: saving a checkpoint" in error
    assert f"error: {said}; what was finished is kept: run the same command again" in error
    assert [p.name for p in tmp_path.glob("*/checkpoint-*")] == ["checkpoint-3"]
    assert not output.exists()
    assert main(command) == 0
    assert (output / "model.safetensors").read_bytes() == straight
    assert "not whole" not in capfd.readouterr().err


HELD = """
import sys
import plad_fast.training.trainer as trainer
from plad_fast.cli import main
real = trainer.fused_linear_preference_loss
count = 0
def hold(*args, **kwargs):
    global count
    count += 1
    if count == 3:
        print("REACHED", flush=True)
        sys.stdin.readline()
    return real(*args, **kwargs)
trainer.fused_linear_preference_loss = hold
sys.exit(main({command!r}))
"""


def status_after_the_terminal_is_closed(code) -> int:
    """Of a program that says REACHED on the terminal and reads a line."""
    # Under nohup, programs begin with the signal ignored.
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n{code}"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        said = b""
        # Python may write the end of the line by itself, and that would fail on a closed terminal.
        while b"REACHED\r\n" not in said:
            said += os.read(ours, 1024)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        process.communicate(b"\n")
    return process.returncode


BAR = """
import signal, sys
from plad_fast.training.signals import Terminated, deferred_signals, raised_signals
try:
    with raised_signals(lambda number: 1), deferred_signals("{}"):
        print("REACHED", flush=True)
        sys.stdin.readline()
        print("a bar", file=sys.stderr, flush=True)
except Terminated as error:
    sys.exit(40 + error.number)
"""


def test_what_is_written_to_a_closed_terminal_is_no_error():
    assert status_after_the_terminal_is_closed(BAR) == 40 + signal.SIGHUP


@pytest.mark.slow
def test_a_terminal_that_is_closed_takes_no_step_with_it(tiny_teacher, pairs, tmp_path):
    """What still writes to it, such as a progress bar, must not keep the checkpoint from it."""
    command = train(tiny_teacher, pairs, tmp_path / "out")
    assert status_after_the_terminal_is_closed(HELD.format(command=command)) == AGAIN
    assert [p.name for p in tmp_path.glob("*/checkpoint-*")] == ["checkpoint-3"]


def test_every_step_can_be_gone_on_from(tiny_teacher, pairs, straight, tmp_path, monkeypatch):
    """Ended at each step in turn, a training that never gets further than one ends the same."""
    real = Checkpoints.on_step_end
    steps = []

    def on_step_end(callback, args, state, control, **kwargs):
        steps.append(state.global_step)
        signal.raise_signal(signal.SIGTERM)
        real(callback, args, state, control, **kwargs)

    command = train(tiny_teacher, pairs, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_step_end", on_step_end)
        for _ in range(STEPS):
            assert main(command) == AGAIN
    assert steps == list(range(1, STEPS + 1))
    assert main(command) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == straight


def test_a_second_signal_ends_a_training_at_once(send, tiny_teacher, pairs, tmp_path, monkeypatch):
    command = train(tiny_teacher, pairs, tmp_path / "out")
    monkeypatch.setattr(signals, "_SAME", 0)
    monkeypatch.setattr(signals, "_GRACE", 60)
    send(trainer, "fused_linear_preference_loss", 3, signal.SIGINT, signal.SIGINT)
    assert main(command) == 130
    assert not list(tmp_path.glob("*/checkpoint-*"))
    assert main(command) == 0


HANGING = """
import hashlib, sys
import plad_fast.training.signals as s
import plad_fast.training.trainer as trainer
from plad_fast.cli import main
s._SAME = s._GRACE = 0
def hang(*args, **kwargs):
    print("REACHED", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
trainer.fused_linear_preference_loss = hang
sys.exit(main({arguments!r}))
"""


@pytest.mark.slow
def test_a_step_that_hangs_traps_nobody(tiny_teacher, pairs, tmp_path):
    """Code that does not come back to Python runs no handler; a second signal does without."""
    code = HANGING.format(arguments=train(tiny_teacher, pairs, tmp_path / "out"))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert any("REACHED" in line for line in process.stdout)
        while process.poll() is None:  # signals that come too fast are one
            os.kill(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert process.returncode == AGAIN
        assert "run the same command again" in process.stderr.read()


ENDING = """
import atexit, signal, sys
from plad_fast import cli
def run(typed):
    signal.raise_signal({number})
def more():
    print("ending", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.raise_signal(number)
    print("ended", flush=True)
atexit.register(more)
cli._attempt = run
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, AGAIN), (signal.SIGINT, 130)])
def test_a_signal_while_the_process_ends_does_not_change_its_exit_status(number, status):
    """Slurm sends more than one, and requeues by the status."""
    code = ENDING.format(number=int(number))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "ending\nended\n"), done.stderr
    assert done.stderr.count("run the same command again") == 1


def test_a_third_signal_does_not_disturb_the_end_that_the_second_began(monkeypatch):
    monkeypatch.setattr(signals, "_SAME", 0)

    def run():
        with raised_signals(lambda number: 0):
            try:
                with deferred_signals(""):
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                reached.append(True)

    reached = []
    with pytest.raises(Terminated):
        run()
    assert reached
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_answers_are_kept_when_their_making_is_ended(send, tiny_teacher, pairs, tmp_path, capfd):
    """A stage without checkpoints ends at once: every answer is on the disk when it has come."""

    def command(output):
        return ["pairs", "--teacher", str(tiny_teacher), "--student", str(tiny_teacher),
                "--prompts", str(pairs), "--output-dir", str(output), "--max-new-tokens", "40",
                "--teacher-temperature", "1", "--generation-batch-size", "2",
                "--precision", "float32"]  # fmt: skip

    assert main(command(tmp_path / "straight")) == 0
    send(store, "_line", 8, signal.SIGTERM)
    assert main(command(tmp_path / "p")) == AGAIN
    assert "ended by SIGTERM; what was finished is kept" in capfd.readouterr().err
    stored = (tmp_path / "p" / "teacher.jsonl").read_text().splitlines()
    assert len(stored) > 3  # a header, and answers
    assert main(command(tmp_path / "p")) == 0
    assert (tmp_path / "p" / "teacher.jsonl").read_text().splitlines()[: len(stored)] == stored
    found, expected = ((tmp_path / x / "pairs.jsonl").read_text() for x in ("p", "straight"))
    assert found == expected


OPTIONS = {
    "loss": "plad_ranking",
    "epochs": 1,
    "learning_rate": 1e-3,
    "batch_size": 2,
    "saves": 1,
    "precision": "float32",
}


def test_in_the_process_of_others_a_signal_does_what_it_did(send, tiny_teacher, pairs, tmp_path):
    """After the checkpoint: Ctrl-C raises KeyboardInterrupt, without a handler of ours."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    send(trainer, "fused_linear_preference_loss", 2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_model(tiny_teacher, rows, tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.glob("*/checkpoint-*")] == ["checkpoint-2"]


DEFERRED = """
import signal
from plad_fast.training.signals import deferred_signals
with deferred_signals("{}: wait"):
    signal.raise_signal(signal.SIGTERM)
    print("reached", flush=True)
print("survived")
"""


def test_a_signal_without_a_handler_ends_the_process_after_the_block():
    done = subprocess.run([sys.executable, "-c", DEFERRED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "reached\n"), done.stderr
    assert "SIGTERM: wait" in done.stderr


def test_handlers_are_put_back_and_only_the_main_thread_sets_any(tiny_teacher, pairs, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    assert main(train(tiny_teacher, pairs, tmp_path / "a")) == 0
    assert main(train(tiny_teacher, pairs, tmp_path / "missing" / "\0")) != 0
    assert [signal.getsignal(number) for number in numbers] == before
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    ended = []

    def run():
        train_model(tiny_teacher, rows, tmp_path / "b", **OPTIONS)
        ended.append(main(train(tiny_teacher, pairs, tmp_path / "c")))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [0]
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in ("a", "b", "c")]
    assert weights[0] == weights[1] == weights[2]


def test_a_handler_of_others_and_a_signal_that_is_ignored_stay_as_they_are():
    """`nohup` ignores SIGHUP, and a notebook or a scheduler's library knows what it does."""
    seen = []
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: seen.append(number)),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    }
    try:
        with raised_signals(lambda number: 0), deferred_signals("{}") as asked:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            assert not asked
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_is_held_back_until_the_end_of_the_block():
    reached = []

    def run():
        with raised_signals(lambda number: 0), deferred_signals("{}: wait") as asked:
            assert not asked
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # `timeout` sends it to a process and to its group
            reached.append(asked.by)

    with pytest.raises(Terminated) as caught:
        run()
    assert reached == [caught.value.number] == [signal.SIGTERM]


def test_an_error_is_not_hidden_by_a_signal_that_came_before_it():
    def run():
        with raised_signals(lambda number: 0), deferred_signals("{}"):
            signal.raise_signal(signal.SIGTERM)
            raise OSError("a full disk")

    with pytest.raises(OSError, match="full disk"):
        run()
