"""What stands between the LM head's matrix product and the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plad_fast.errors import UsageError


@dataclass(frozen=True)
class LogitSpec:
    """z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature.

    `softcap` is Gemma 2's `final_logit_softcapping`; None leaves the tanh out.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise UsageError(f"softcap must be a positive number or None, got {self.softcap}")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature must be positive, got {self.temperature}")
        if not -math.inf < self.logit_scale < math.inf:
            raise UsageError(f"logit_scale must be finite, got {self.logit_scale}")

    @property
    def slope(self) -> float:
        """dz / d(h W^T + b) where the tanh is not felt."""
        return self.logit_scale / self.temperature
