"""Exact log-probabilities and preference losses without stored logits."""

from plad_fast.ops.logprobs import SequenceLogProbs, linear_sequence_logprobs, sequence_logprobs
from plad_fast.ops.preference_autograd import FusedLoss
from plad_fast.ops.preference_losses import fused_linear_preference_loss, preference_loss

__all__ = [
    "FusedLoss",
    "SequenceLogProbs",
    "fused_linear_preference_loss",
    "linear_sequence_logprobs",
    "preference_loss",
    "sequence_logprobs",
]
