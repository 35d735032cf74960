"""PLaD's ranking loss in a loop of plain PyTorch.

python examples/plain_pytorch.py --model HuggingFaceTB/SmolLM2-135M-Instruct --pairs pairs.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from data import arguments, pair_batches

from plad_fast import fused_linear_preference_loss
from plad_fast.data import to_device
from plad_fast.models import head_arguments, load_model


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, dtype=torch.float32, device=device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    for batch in pair_batches(args, model):
        out = fused_linear_preference_loss(
            **head_arguments(model, to_device(batch, device)), loss="plad_ranking"
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {out.loss.item():.4f}, {out.active.float().mean():.0%} of the pairs active")

    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
