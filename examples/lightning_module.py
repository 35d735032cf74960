"""PLaD's ranking loss in a LightningModule.

python examples/lightning_module.py --model MODEL --pairs pairs.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning
import torch
from data import arguments, pair_batches
from transformers import PreTrainedModel

from plad_fast import fused_linear_preference_loss
from plad_fast.data import PreferenceBatch, to_device
from plad_fast.models import head_arguments, load_model


class Student(lightning.LightningModule):
    """Lightning calls `training_step` inside DDP's forward pass, where the loss has to be computed.

    Each process takes the mean of its own batch; accelerate_loop.py has totals over all of them.
    """

    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def training_step(self, batch: PreferenceBatch) -> torch.Tensor:
        out = fused_linear_preference_loss(**head_arguments(self.model, batch), loss="plad_ranking")
        self.log("active_pairs", out.active.float().mean(), batch_size=len(out.active))
        return out.loss

    def transfer_batch_to_device(
        self, batch: PreferenceBatch, device: torch.device, dataloader_idx: int
    ) -> PreferenceBatch:
        return to_device(batch, device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    student = Student(load_model(args.model, dtype=torch.float32).train(), args.learning_rate)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=args.output_dir
    )
    trainer.fit(student, pair_batches(args, student.model))
    if trainer.is_global_zero:
        student.model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
