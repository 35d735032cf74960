"""Options without which a registered loss cannot be called."""

from __future__ import annotations

from typing import Any

REQUIRED: dict[str, dict[str, Any]] = {
    "kto": {"kl": 0.5},
    "mixture": {"parts": {"dpo": {"weight": 0.8}, "bco_pair": {"weight": 0.2, "beta": 0.3}}},
}
