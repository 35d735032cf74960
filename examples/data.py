"""Arguments of the examples, and preference pairs as batches for the loss."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from plad_fast.data import PreferenceCollator, tokenize_dataset
from plad_fast.models import load_tokenizer, prepare


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", type=Path, required=True, help="JSONL: prompt, chosen, rejected")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/example"))
    parser.add_argument("--batch-size", type=int, default=4, help="pairs")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    return parser.parse_args(argv)


def pair_batches(args: argparse.Namespace, model: PreTrainedModel) -> DataLoader:
    """Batches without padding and with shared prompts, if the model can take them."""
    tokenizer = load_tokenizer(args.model)
    rows = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    groups = tokenize_dataset(rows, tokenizer, max_length=1024)
    collate = PreferenceCollator(tokenizer.pad_token_id, group_size=2, layout=prepare(model))
    return DataLoader(groups, args.batch_size, collate_fn=collate, drop_last=True)
