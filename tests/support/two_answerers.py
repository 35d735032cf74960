"""One process of the tests in test_shards.py: answers prompts with a tiny model, or fails."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from plad_fast.data.prompts import Prompt
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.team import led
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.sources import LazyLocalModel

PROMPTS = [Prompt(f"p{i}", "word " * (i % 5 + 1) + str(i)) for i in range(11)]


class Failing(LocalModel):
    """Its second process is killed or raises, once it has stored a few answers."""

    def generate_samples(self, wanted, sampling):
        for count, answers in enumerate(super().generate_samples(wanted, sampling)):
            yield answers
            if count == 2 and os.environ["RANK"] == "1":
                if os.environ["PLAD_TEST_FAILURE"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("planted")


def main(folder: Path, settings: str) -> None:
    # A file rather than a port: nobody else can take it between its choice and its use.
    dist.init_process_group(
        "gloo",
        init_method=os.environ["PLAD_TEST_RENDEZVOUS"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    model = LazyLocalModel(functools.partial(load, folder), "tiny")
    with led() as leads:
        if leads:
            sampling = Sampling(**json.loads(settings))
            answered = stored_answers(
                lambda: model, PROMPTS, folder / "answers.jsonl", sampling, fingerprint={}
            )
            rows = [vars(a) for answers in answered.answers.values() for a in answers]
            (folder / "result.json").write_text(json.dumps(rows))


def load(folder: Path) -> LocalModel:
    (folder / f"loaded{os.environ['RANK']}").touch()
    kind = Failing if "PLAD_TEST_FAILURE" in os.environ else LocalModel
    return kind(load_model(folder), load_tokenizer(folder), "tiny")


def run(folder: Path, settings: str, environment: dict[str, str], log: Path) -> None:
    """As a process of its own would run `main`, with its standard error stream in a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with log.open("w") as sys.stderr:
        try:
            main(folder, settings)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    dist.destroy_process_group()
