"""One rank of the two-process test in test_processes.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import SequentialSampler

from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.training.config import PLaDConfig
from plad_fast.training.trainer import PLaDTrainer


class InOrder(PLaDTrainer):
    """Takes the rows as they come; only transformers 5 has a setting for it."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def main(folder: Path) -> None:
    # A file rather than a port: nobody else can take it between its choice and its use.
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        run(folder)
        # Neither rank may go while the other still talks to it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(folder: Path) -> None:
    rows = json.loads((folder / "rows.json").read_text())
    trainer = InOrder(
        model=load_model(folder / "model"),
        args=PLaDConfig(
            **{
                "output_dir": str(folder / "run"),
                "per_device_eval_batch_size": 2,
                "learning_rate": 0.05,
                "lr_scheduler_type": "constant",
                "optim": "sgd",
                "max_grad_norm": 0.0,
                "logging_steps": 1,
                "save_strategy": "no",
                "use_cpu": True,
                "disable_tqdm": True,
                "sft_weight": 0.0,  # as `tests.support.trainings.build` has them
                "length_normalization": 0.0,
                **json.loads(os.environ["PLAD_TEST_OPTIONS"]),
            }
        ),
        train_dataset=rows,
        eval_dataset=rows[:7],  # an odd number: the last batch is filled up with repeated rows
        processing_class=load_tokenizer(folder / "model"),
    )
    assert trainer.args.world_size == 2
    trainer.train()
    evaluated = trainer.evaluate()
    if trainer.is_world_process_zero():
        logged = next(e for e in reversed(trainer.state.log_history) if "loss" in e)
        found = {name: p.detach() for name, p in trainer.model.named_parameters()}
        torch.save(
            {"weights": found, "logged": logged, "evaluated": evaluated}, folder / "result.pt"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
