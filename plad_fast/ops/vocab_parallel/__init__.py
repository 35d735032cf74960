"""The ops for an LM head whose rows lie on the ranks of a process group."""

from plad_fast.ops.vocab_parallel.api import (
    vocab_parallel_preference_loss,
    vocab_parallel_sequence_logprobs,
)

__all__ = ["vocab_parallel_preference_loss", "vocab_parallel_sequence_logprobs"]
