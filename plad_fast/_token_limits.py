"""Which token ids a model can take."""

from __future__ import annotations

from typing import NamedTuple


class TokenLimits(NamedTuple):
    """What token ids a model has weights for."""

    inputs: int
    """Ids of a prompt are below it: the embeddings."""
    outputs: int
    """Ids of a response are below it: the embeddings and the rows of the head."""
    positions: int | None
    """Tokens of a sequence, where the configuration names a number."""
