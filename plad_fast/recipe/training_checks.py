"""The settings of a training that can be told wrong before a model or a row is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plad_fast.data.places import shown
from plad_fast.errors import UsageError
from plad_fast.losses.objective import check_settings
from plad_fast.recipe.pair_settings import flag

PRECISIONS = ("auto", "float32", "bfloat16")

_COUNTS = ("batch_size", "micro_batch_size", "max_tokens_per_batch", "saves_per_stage")
_POSITIVE = ("epochs", "learning_rate")
_NOT_NEGATIVE = ("sft_weight", "length_normalization")


def check_training(settings: Mapping[str, Any]) -> None:
    """Checks the settings of a training one by one, and the loss with its options.

    Args:
        settings: by the names of `DistillConfig`, of which any but `loss` may be missing or None.

    Raises:
        UsageError: a value out of range, or an option that the loss does not have; in one sentence
            with the flag's name.
    """
    given = {name: value for name, value in settings.items() if value is not None}

    def require(name: str, rule: str, holds: bool) -> None:
        if not holds:
            raise UsageError(f"{flag(name)} {rule}, got {shown(given[name])}")

    if "beta" in given:
        require("beta", "must be at least 0", given["beta"] >= 0)
    check_settings(given["loss"], given, flag)
    for names, rule, holds in (
        (("seed",), "must be from 0 to 4294967295", lambda value: 0 <= value < 2**32),
        (("precision",), f"must be one of {PRECISIONS}", lambda value: value in PRECISIONS),
        (_COUNTS, "must be at least 1", lambda value: value >= 1),
        (_POSITIVE, "must be positive", lambda value: value > 0),
        (_NOT_NEGATIVE, "must be at least 0", lambda value: value >= 0),
        (("max_length",), "must be at least 2", lambda value: value >= 2),
    ):
        for name in names:
            if name in given:
                require(name, rule, holds(given[name]))
