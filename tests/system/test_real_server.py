"""Pairs from a server that others wrote: `transformers serve`, on loopback, without a hub."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("transformers.cli.serving")  # not in transformers 4

from plad_fast.data.prompts import Prompt, builtin_prompts
from plad_fast.pairs.build import build_pairs
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.sources import open_teacher
from plad_fast.pairs.generation.text_model import Answer

KEY = "sk-planted-0123456789"


@contextlib.contextmanager
def served(folder, log, *, patience: float = 120):
    """The URL of a server of this model, once it has loaded it, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + patience
            open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
            while True:
                with contextlib.suppress(OSError):
                    open_url(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(model, prompts, path, sampling):
    made_by = {"m": model.name}
    return stored_answers(lambda: model, prompts, path, sampling, fingerprint=made_by)


def test_pairs_from_a_served_teacher(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch):
    """Greedy answers must be those that the same model gives here; sampled ones make pairs."""
    from plad_fast.models.loading import load_model

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    # Without this the server takes the likeliest token at any temperature.
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "do_sample": True}))
    local = LocalModel(load_model(folder), tiny_tokenizer, "local")
    prompts = [Prompt(f"p{i}", f"say {i}") for i in range(12)]
    with served(folder, tmp_path / "server.log") as (url, _):
        teacher = open_teacher(f"openai:{folder}", base_url=url, concurrency=2, timeout=60)
        greedy = Sampling(max_new_tokens=12, temperature=0)
        asked = answers(teacher, prompts, tmp_path / "greedy.jsonl", replace(greedy, n=2))
        drawn = answers(teacher, prompts, tmp_path / "drawn.jsonl", Sampling(100)).first
    # It takes `n` and gives one answer: the second ones were asked for as well.
    assert all(len(samples) == 2 for samples in asked.answers.values())
    here = answers(local, prompts, tmp_path / "here.jsonl", greedy).first
    # An answer without text is stored by one and listed as a failure by the other.
    texts = {i: answer.text for i, answer in asked.first.items()}
    assert texts == {i: answer.text for i, answer in here.items() if answer.text}
    assert len(texts) >= 3

    weak = answers(local, prompts, tmp_path / "student.jsonl", Sampling(100, seed=1)).first
    pairs, _ = build_pairs(prompts, drawn, weak, tokenizer=tiny_tokenizer)
    assert pairs
    assert {pair["chosen"][-1]["content"] for pair in pairs} <= {a.text for a in drawn.values()}
    assert not any(KEY in file.read_text() for file in tmp_path.glob("*.*l*"))


@pytest.mark.slow
def test_two_servers_of_which_one_is_killed(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch):
    """Greedy answers of both are those that the model gives here, and none is missing."""
    from plad_fast.models.loading import load_model

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts = [Prompt(f"p{i}", f"say {i}") for i in range(40)]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    local = LocalModel(load_model(tiny_teacher), tiny_tokenizer, "local")
    here = answers(local, prompts, tmp_path / "here.jsonl", greedy).first
    first = served(tiny_teacher, tmp_path / "first.log")
    second = served(tiny_teacher, tmp_path / "second.log")
    with first as (url, process), second as (other, _):
        teacher = open_teacher(
            f"openai:{tiny_teacher}", base_url=f"{url},{other}", concurrency=4, timeout=60
        )
        teacher.try_out(greedy, tmp_path / "none.jsonl")
        found = []
        for batch in teacher.generate(prompts, greedy):
            found += batch
            if len(found) == 10:
                process.kill()
    assert {item.prompt_id for item in found} == set(here)
    texts = {item.prompt_id: item.text for item in found if isinstance(item, Answer)}
    assert texts == {i: answer.text for i, answer in here.items() if answer.text}
    by_url = {server.url: server for server in teacher.endpoint._servers.every}
    assert by_url[url].is_down
    assert 5 < by_url[url].asked < by_url[other].asked


@pytest.mark.slow
def test_pairs_from_smollm2_behind_a_server(tmp_path, capsys):
    """Minutes on two cores. The student is the teacher itself, drawn at a higher temperature:
    one of fewer layers would have to be trained first to come to an end."""
    from plad_fast.models.loading import load_model, load_tokenizer, offline_teacher_path

    source = offline_teacher_path()
    model, tokenizer = load_model(source), load_tokenizer(source)
    folder = tmp_path / "teacher"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = builtin_prompts()[:8]
    start = time.monotonic()
    with served(folder, tmp_path / "server.log") as (url, _):
        ready = time.monotonic()
        teacher = open_teacher(f"openai:{folder}", base_url=url, concurrency=2, timeout=120)
        sampling = Sampling(max_new_tokens=64, temperature=0.5)
        asked = answers(teacher, prompts, tmp_path / "teacher.jsonl", sampling)
        seconds = time.monotonic() - ready
    student = LocalModel(model, tokenizer, "student")
    weak = answers(student, prompts, tmp_path / "student.jsonl", Sampling(64, seed=1)).first
    pairs, report = build_pairs(prompts, asked.first, weak, tokenizer=tokenizer)
    with capsys.disabled():
        print(f"\nserver ready in {ready - start:.1f} s; {teacher.endpoint.usage}; {seconds:.1f} s")
        print(report)
        for pair in pairs[:3]:
            print({key: pair[key] for key in ("prompt", "chosen", "rejected")})
    assert len(asked.first) == len(prompts)
    assert pairs
