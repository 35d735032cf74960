"""What the head's loss asks of a GPU, where offsets of sequences stay on the host."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("trl")

from benchmarks.cuda_recorder import counting
from plad_fast.integrations.trl.head_loss import HeadLoss


def test_weights_of_pairs_are_made_on_the_gpu():
    """torch sums segments only with offsets that lie where the values do."""
    head_loss = HeadLoss(lambda _: ("dpo", {"beta": 0.1}, 0.0), (), impl="triton")
    head_loss.loss, head_loss.options, head_loss.sft_weight = "dpo", {"beta": 0.1}, 0.0
    with counting() as recorder:
        hidden, weight = recorder.empty(12, 64), recorder.empty(256, 64)
        arguments = {
            "hidden": hidden.requires_grad_(),
            "weight": weight,
            "targets": recorder.tensor(torch.arange(12)),
            "cu_seqlens": torch.tensor([0, 3, 5, 9, 12]),
        }
        reference = recorder.tensor(torch.zeros(4))
        loss, sums, counts = head_loss._weighted(arguments, reference, None, 2)
        assert loss.is_cuda
        assert (sums.shape, counts.shape) == ((4,), (4,))
    assert recorder.waits == []
