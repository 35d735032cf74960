"""plad_fast: exact, memory-saving preference losses on an LM head, and distillation with them.

Importing this package needs torch alone; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "linear_sequence_logprobs": "plad_fast.ops.logprobs",
    "sequence_logprobs": "plad_fast.ops.logprobs",
    "SequenceLogProbs": "plad_fast.ops.logprobs",
    "fused_linear_preference_loss": "plad_fast.ops.preference_losses",
    "FusedLoss": "plad_fast.ops.preference_losses",
    "preference_loss": "plad_fast.ops.preference_losses",
    "register_loss": "plad_fast.losses",
    "UsageError": "plad_fast.errors",
    "PLaDConfig": "plad_fast.training.config",
    "PLaDTrainer": "plad_fast.training.trainer",
}

# What a star import brings needs torch alone; the trainer needs transformers.
__all__ = [
    "FusedLoss",
    "SequenceLogProbs",
    "UsageError",
    "fused_linear_preference_loss",
    "linear_sequence_logprobs",
    "preference_loss",
    "register_loss",
    "sequence_logprobs",
]

if TYPE_CHECKING:
    from plad_fast.errors import UsageError
    from plad_fast.losses.registry import register_loss
    from plad_fast.ops.logprobs import SequenceLogProbs, linear_sequence_logprobs, sequence_logprobs
    from plad_fast.ops.preference_losses import (
        FusedLoss,
        fused_linear_preference_loss,
        preference_loss,
    )
    from plad_fast.training.config import PLaDConfig as PLaDConfig
    from plad_fast.training.trainer import PLaDTrainer as PLaDTrainer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'plad_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
