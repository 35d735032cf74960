"""The arms of the small PLaD experiment: ways to go on from a fine-tuned student."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plad_fast.errors import UsageError
from plad_fast.losses import get_loss
from plad_fast.pairs import PairFilters
from plad_fast.pairs.filters import KEEP_ALL

TRAINING_OPTIONS = {"beta", "loss_args", "sft_weight", "length_normalization"}


@dataclass(frozen=True)
class Arm:
    """One way to go on from the fine-tuned student.

    Raises:
        UsageError: there is no such loss, or training has no such option.
    """

    name: str
    loss: str
    learning_rate: float
    batch_size: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `train_model`: `TRAINING_OPTIONS`."""
    filters: PairFilters = KEEP_ALL
    pairs: int | None = None
    """The first so many only, more often: the compute stays the same."""

    def __post_init__(self) -> None:
        if not self.fine_tunes:
            get_loss(self.loss)
        if unknown := sorted(self.options.keys() - TRAINING_OPTIONS):
            raise UsageError(f"arm {self.name!r}: no option {', '.join(unknown)}")
        if not self.learning_rate > 0 or self.batch_size < 1:
            raise UsageError(f"arm {self.name!r}: learning_rate and batch_size must be positive")
        if self.pairs is not None and self.pairs < 1:
            raise UsageError(f"arm {self.name!r}: pairs must be positive, not {self.pairs}")

    @property
    def fine_tunes(self) -> bool:
        return self.loss == "sft"


MEANS = {"length_normalization": 1.0}
ARMS = (
    Arm("SFT longer", "sft", 1e-5),
    Arm("PLaD ranking", "plad_ranking", 3e-5, options={**MEANS, "beta": 8.0, "sft_weight": 1.0}),
    Arm("PLaD margin", "plad_margin", 3e-5, options={**MEANS, "beta": 200.0, "sft_weight": 1.0}),
    Arm("DPO", "dpo", 1e-5, options={"beta": 0.1}),
    Arm("SimPO", "simpo", 1e-5, options={"beta": 2.0, "loss_args": '{"gamma": 1.0}'}),
)
BASELINE = ARMS[0]
FINE_TUNED = "SFT"


def read_arms(path: Path) -> tuple[Arm, ...]:
    """Arms from a JSON list of objects with the fields of `Arm`.

    Raises:
        UsageError: the file is no such list, or two of its arms would share a folder.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(found, list) or not all(isinstance(fields, dict) for fields in found):
        raise UsageError(f"{path} must hold a list of objects")
    arms = []
    for fields in found:
        try:
            filters = PairFilters(**fields.get("filters", {}))
            arms.append(Arm(**{**fields, "filters": filters}))
        except (TypeError, ValueError) as error:
            known = ", ".join(f.name for f in dataclasses.fields(Arm))
            raise UsageError(f"{path}: {error}; an arm has {known}") from None
    names = [slug(name) for name in (FINE_TUNED, BASELINE.name, *(arm.name for arm in arms))]
    if taken := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{path}: the name {taken[0]!r} is taken")
    return tuple(arms)


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")
