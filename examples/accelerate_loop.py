"""PLaD's ranking loss in a loop of accelerate, on any number of processes.

accelerate launch examples/accelerate_loop.py --model MODEL --pairs pairs.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from accelerate import Accelerator
from data import arguments, pair_batches

from plad_fast import fused_linear_preference_loss
from plad_fast.data import to_device
from plad_fast.models import call_inside, load_model, through_head, unwrap

LOSS = {"loss": "plad_ranking"}


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    accelerator = Accelerator()
    model = load_model(args.model, dtype=torch.float32, device=accelerator.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    batches = pair_batches(args, model)
    # The wrapper reduces gradients in its forward pass: the loss is computed within it.
    wrapper, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    for batch in batches:
        batch = to_device(batch, accelerator.device)
        # Every pair and every token has the same weight in every process.
        pairs, tokens = accelerator.reduce(sizes(batch), "sum").tolist()

        op = partial(fused_linear_preference_loss, num_groups=pairs, num_tokens=tokens, **LOSS)

        def loss_of(_: torch.Tensor, batch=batch, op=op) -> torch.Tensor:
            return through_head(unwrap(wrapper), batch, op).loss

        with accelerator.autocast():
            loss = call_inside(wrapper, unwrap(wrapper), loss_of, batch["input_ids"])
        # The wrapper averages gradients over processes; this loss wants their sum.
        accelerator.backward(loss * accelerator.num_processes)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'sum').item():.4f}")

    if accelerator.is_main_process:
        unwrap(wrapper).save_pretrained(args.output_dir)
    accelerator.wait_for_everyone()
    # gloo may hang if its group ends while the wrapper holds it.
    wrapper, optimizer, batches = accelerator.free_memory(wrapper, optimizer, batches)
    accelerator.end_training()


def sizes(batch: dict[str, torch.Tensor]) -> torch.Tensor:  # (2,)
    """Pairs in a batch, and tokens of their chosen responses."""
    lengths = batch["cu_seqlens"].diff()
    return torch.stack([torch.tensor(len(lengths) // 2, device=lengths.device), lengths[::2].sum()])


if __name__ == "__main__":
    sys.exit(main())
