"""Steps get cheaper as pairs become satisfied: 200 steps of `PLaDTrainer` on a small task.

    python -m benchmarks.step_satisfaction            # two minutes: CSV and PNG in results/
    python -m benchmarks.step_satisfaction --steps 20 --csv /tmp/satisfaction.csv

A small random Llama learns by heart which of two random responses to prefer. A pair whose chosen
response leads by beta has no gradient, and a micro-batch of such pairs runs no backward; pairs get
there one after the other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Record, environment, write_csv
from benchmarks.loss import say
from benchmarks.step_models import tiny_llama, tiny_tokenizer

PAIRS = 64
PAIRS_PER_STEP = 16
PROMPT, RESPONSE = 96, 24
# Responses of a pair are as long as one another, within this many tokens around RESPONSE: short
# ones take longer to get beta apart.
SPREAD = 16
BETA = 20.0
# Four pairs, of PROMPT + 2 * RESPONSE tokens each, in a forward and backward.
MAX_TOKENS = 4 * (PROMPT + 2 * RESPONSE)
LEARNING_RATE = 4e-6
COLUMNS = ("loss", "active_pairs", "skipped_backwards", "saved_tokens", "ranking_accuracy")


def make_rows(vocab: int, seed: int = 0) -> list[Record]:
    """Rows of random ids for the trainer."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(vocab, (count,), generator=generator).tolist()

    rows = []
    for pair in range(PAIRS):
        response = RESPONSE - SPREAD + 2 * SPREAD * pair // (PAIRS - 1)
        rows.append(
            {
                "prompt_ids": ids(PROMPT),
                "response_ids": [ids(response), ids(response)],
                "length": PROMPT + response,
            }
        )
    return rows


def run(steps: int, *, layers: int, hidden: int, progress: bool = True) -> list[Record]:
    """Trains, and returns a record of every step."""
    from transformers import TrainerCallback

    from plad_fast.training.config import PLaDConfig
    from plad_fast.training.trainer import PLaDTrainer

    records: list[Record] = []

    class Follow(TrainerCallback):
        """A step lasts from the end of the one before, its logging left out."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs:
                row = {"step": state.global_step, "seconds": self.seconds}
                records.append(row | {name: logs.get(name, "") for name in COLUMNS})
                if progress and state.global_step % 20 == 0:
                    say(
                        f"  step {state.global_step}/{steps}  {self.seconds * 1e3:.0f} ms, "
                        f"{logs.get('active_pairs', 1.0):.0%} of pairs active"
                    )
            self.started = time.perf_counter()

    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, layers=layers, hidden=hidden)
    with tempfile.TemporaryDirectory() as folder:
        config = PLaDConfig(
            output_dir=folder,
            loss="plad_ranking",
            beta=BETA,
            sft_weight=0.0,
            length_normalization=0.0,
            max_tokens_per_batch=MAX_TOKENS,
            per_device_train_batch_size=PAIRS_PER_STEP,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = PLaDTrainer(
            model,
            config,
            train_dataset=make_rows(len(tokenizer)),
            processing_class=tokenizer,
            callbacks=[Follow()],
        )
        # Its lines would hide the progress.
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return records


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_satisfaction",
        description=(__doc__ or "").partition("\n\n")[0],
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--csv", type=Path, default=RESULTS / "satisfaction_cpu.csv")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    records = run(args.steps, layers=args.layers, hidden=args.hidden)
    facts = environment(torch.device("cpu"))
    model = {"layers": args.layers, "hidden": args.hidden, "pairs_per_step": PAIRS_PER_STEP}
    write_csv(args.csv, [record | model | facts for record in records])
    third = max(1, len(records) // 3)
    first, last = records[:third], records[-third:]
    for label, part in (("first", first), ("last", last)):
        mean = sum(record["seconds"] for record in part) / third
        print(f"{label} {third} steps: {mean * 1e3:.0f} ms a step")
    print(f"wrote {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
