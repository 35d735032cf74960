"""Answers by actors of Ray: the same as without them, whatever is killed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types

import pytest

from plad_fast.cli import main
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation import ray_model
from plad_fast.pairs.generation.ray_model import RayModel, _parts
from plad_fast.recipe.settings import DistillConfig
from tests.support.recipe_runs import pair

RUN = [sys.executable, "-c", "import sys; from plad_fast.cli import main; sys.exit(main())"]
RAY = ["--engine", "ray", "--actors", "2", "--generation-batch-size", "1"]


def test_parts_hold_everything_once_the_longest_first():
    wanted = [(Prompt(f"p{i}", "x" * (i % 7)), k) for i in range(50) for k in range(2)]
    parts = _parts(wanted, batch_size=2, actors=3)
    shared = [asked for part in parts for asked in part]
    assert sorted(map(str, shared)) == sorted(map(str, wanted))
    assert {len(part) for part in parts[:-1]} == {16}
    lengths = [len(prompt.content) for prompt, _ in shared]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(part) for part in _parts(wanted[:10], batch_size=16, actors=4)] == [3, 3, 3, 1]


@pytest.mark.parametrize("option", ["actors", "gpus_per_actor"])
def test_options_of_actors_need_the_engine(option):
    name = f"--{option.replace('_', '-')}"
    with pytest.raises(UsageError, match=f"{name} is of Ray's actors"):
        DistillConfig(**{option: 1})
    with pytest.raises(UsageError, match=f"{name} must be"):
        DistillConfig(engine="ray", **{option: -1})


def test_a_missing_ray_is_named_before_a_teacher_is_asked(
    tiny_teacher, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ray", None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "answer": "b"}\n')
    assert main(pair("column:answer", tiny_teacher, prompts, tmp_path / "out", *RAY)) == 2
    assert "pip install -e '.[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "teacher.jsonl").exists()


@pytest.fixture
def ray(monkeypatch):
    # Its workers are 15 steps nicer than the command: beside other work they get 3% of a core.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    return pytest.importorskip("ray")


@pytest.mark.parametrize(
    ("actors", "gpus", "has", "pool"),
    [
        (None, None, {"CPU": 1.0}, (1, 0)),
        (3, None, {"CPU": 2.0}, (3, 0)),
        (None, None, {"GPU": 8.0}, (8, 1)),
        (None, 0.5, {"GPU": 8.0}, (16, 0.5)),
        (None, 3, {"GPU": 8.0}, (2, 3)),
        (2, 0, {"GPU": 8.0}, (2, 0)),
    ],
)
def test_there_is_an_actor_for_every_gpu(actors, gpus, has, pool, monkeypatch):
    monkeypatch.setattr(ray_model, "require_packages", lambda name: None)
    cluster = types.SimpleNamespace(cluster_resources=lambda: has)
    assert RayModel(dict, "m", actors=actors, gpus=gpus)._pool(cluster) == pool
    with pytest.raises(UsageError, match="is to have 9 GPUs, and the cluster has"):
        RayModel(dict, "m", gpus=9)._pool(cluster)


def test_more_actors_than_the_cluster_has_room_for_are_told(monkeypatch, caplog):
    monkeypatch.setattr(ray_model, "require_packages", lambda name: None)
    cluster = types.SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "GPU": 2.0})
    for actors, gpus in ((4, 0), (2, 1), (5, 0), (3, 1)):
        RayModel(dict, "m", actors=actors, gpus=gpus)._pool(cluster)
    assert [record.getMessage() for record in caplog.records] == [
        "m: the cluster has cores for 4 of 5 actors",
        "m: the cluster has GPUs for 2 of 3 actors",
    ]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(160)))
    return path


def rows(path):
    """How many a store has after its header."""
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def until(holds, patience=600):  # machines are shared
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def actors():
    """Processes of actors that descend from this one."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "_Actor" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_pairs_are_those_of_one_process_though_an_actor_is_killed(
    ray, tiny_teacher, prompts, tmp_path, monkeypatch
):
    # An actor has a core: where Ray finds but one, the second would never start.
    monkeypatch.setattr(ray, "init", functools.partial(ray.init, num_cpus=2))
    assert main(pair(tiny_teacher, tiny_teacher, prompts, tmp_path / "one")) == 0
    store = tmp_path / "ray" / "teacher.jsonl"
    killed = []
    over = threading.Event()

    def kill():
        while not over.wait(0.02):
            if rows(store) > 0 and len(both := actors()) == 2:
                both[0].kill()
                killed.append(rows(store))
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert main(pair(tiny_teacher, tiny_teacher, prompts, tmp_path / "ray", *RAY)) == 0
    finally:
        over.set()
        killer.join()
    assert killed
    assert killed[0] < 160
    names = ("pairs.jsonl", "dropped.jsonl")
    one, other = ([(tmp_path / f / n).read_bytes() for n in names] for f in ("one", "ray"))
    assert one == other
    assert not actors()
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_command_that_was_ended_goes_on(ray, tiny_teacher, prompts, tmp_path):
    """Twice, and then without Ray: a store does not know who filled it."""
    command = pair(tiny_teacher, tiny_teacher, prompts, tmp_path / "out", *RAY)
    store = tmp_path / "out" / "teacher.jsonl"
    had = b""
    for ending, status in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen([*RUN, *command])
        before = rows(store)
        until(lambda before=before: rows(store) > before)
        at_work = actors()
        os.kill(process.pid, ending)
        assert process.wait(60) == status
        until(lambda at_work=at_work: not any(actor.is_running() for actor in at_work))
        assert store.read_bytes().startswith(had)
        had = store.read_bytes()
    assert rows(store) < 160
    assert main(command[: -len(RAY)]) == 0
    assert store.read_bytes().startswith(had)
    assert main(pair(tiny_teacher, tiny_teacher, prompts, tmp_path / "one")) == 0
    one, other = ((tmp_path / f / "pairs.jsonl").read_bytes() for f in ("one", "out"))
    assert one == other


@pytest.mark.slow
def test_what_is_wrong_is_told_as_without_ray(ray, tiny_teacher, tmp_path, monkeypatch, capfd):
    """A prompt too long, and a function that ends its process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.py").write_text(
        "import os\ndef ask(prompt):\n    return 'fine' if prompt != 'die' else os._exit(1)\n"
    )
    rows = [{"prompt": p} for p in ("a", "b" * 300, "c")]
    long, deadly = tmp_path / "long.jsonl", tmp_path / "deadly.jsonl"
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    deadly.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ["a", "die", "c"]))
    died = "teacher: 4 actors died over the same prompts, the first of which"
    for teacher, given, says in (
        (tiny_teacher, long, "has 304 tokens, and of 256 positions"),
        ("python:asked.ask", deadly, died),
    ):
        assert main(pair(teacher, tiny_teacher, given, tmp_path / given.stem, *RAY)) == 2
        assert says in capfd.readouterr().err


@pytest.mark.slow
def test_a_cluster_that_runs_is_used_and_left_alone(ray, tiny_teacher, tmp_path, monkeypatch):
    """The answers name the parent of the process that gave them, which starts a node's workers."""
    import psutil

    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.py").write_text("import os\ndef ask(p):\n    return f'{p} {os.getppid()}'\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(20)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2"]
    start += ["--node-ip-address", "127.0.0.1", "--port", str(port)]
    # In a folder of its own, so that no other test finds it; the path of a socket is short.
    start += ["--temp-dir", own := tempfile.mkdtemp(prefix="ray-")]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with subprocess.Popen([sys.executable, *start], stdout=subprocess.DEVNULL) as cluster:
        try:
            until(lambda: is_listening(port))
            out = tmp_path / "out"
            subprocess.run(
                [*RUN, *pair("python:asked.ask", tiny_teacher, prompts, out, *RAY)], check=True
            )
            lines = (out / "teacher.jsonl").read_text().splitlines()[1:]
            (parent,) = {json.loads(line)["text"].split()[-1] for line in lines}
            of_cluster = psutil.Process(cluster.pid).children(recursive=True)
            assert int(parent) in {process.pid for process in of_cluster}
            # Of processes that have given their cores back, some never end (seen with Ray 2.60).
            ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
            until(lambda: ray.available_resources().get("CPU") == 2)
            ray.shutdown()
            assert cluster.poll() is None
        finally:
            for process in [*psutil.Process(cluster.pid).children(recursive=True), cluster]:
                process.kill()
            shutil.rmtree(own, ignore_errors=True)


def is_listening(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
