"""The arms of the small PLaD experiment: ways to go on from a fine-tuned student."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plad_fast.checks import check_number, is_whole
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.pairs.select import KEEP_ALL, PairFilters
from plad_fast.training.config import PLaDConfig

TRAINING_OPTIONS = {"beta", "loss_args", "sft_weight", "length_normalization"}


@dataclass(frozen=True)
class Arm:
    """One way to go on from the fine-tuned student.

    Raises:
        UsageError: a field has not the kind or range that it needs.
    """

    name: str
    """Letters, digits, spaces, - and _: it names a folder."""
    loss: str
    learning_rate: float
    batch_size: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `train_model`: `TRAINING_OPTIONS`."""
    filters: PairFilters = KEEP_ALL
    pairs: int | None = None
    """The first so many only, more often: the compute stays the same."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w -]*", self.name):
            raise UsageError(f"a name is letters, digits, spaces, - and _, not {self.name!r}")
        check_number("learning_rate", self.learning_rate)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate must be positive, not {self.learning_rate}")
        for name, count in (("batch_size", self.batch_size), ("pairs", self.pairs)):
            if count is not None and (not is_whole(count) or count < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, not {count!r}")
        if not isinstance(self.options, Mapping):
            raise UsageError(f"options must be an object, not {self.options!r}")
        if unknown := sorted(self.options.keys() - TRAINING_OPTIONS):
            raise UsageError(f"there is no option {', '.join(unknown)}")
        if self.fine_tunes and (self.pairs is not None or self.filters != KEEP_ALL):
            raise UsageError("loss 'sft' takes answers: it has neither pairs nor filters of pairs")

    @property
    def fine_tunes(self) -> bool:
        return self.loss == "sft"

    @property
    def objective(self) -> Objective:
        """Raises UsageError: no such loss, or options that it does not take."""
        args = PLaDConfig(output_dir="unused", use_cpu=True, loss=self.loss, **self.options)
        return args.objective(group_size=2)


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
        UsageError: the file is no such list, an arm could not train, or two would share a folder.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(found, list) or not all(isinstance(fields, dict) for fields in found):
        raise UsageError(f"{path} must hold a list of objects")
    if not found:
        raise UsageError(f"{path} holds no arm")
    arms = []
    for number, fields in enumerate(found, start=1):
        try:
            arms.append(_read_arm(fields))
        except (TypeError, ValueError) as error:
            known = ", ".join(f.name for f in dataclasses.fields(Arm))
            raise UsageError(f"{path}: arm {number}: {error}; an arm has {known}") from None
    taken = {"evaluation", slug(FINE_TUNED), slug(BASELINE.name)}
    for arm in arms:
        if slug(arm.name) in taken:
            raise UsageError(f"{path}: the name {arm.name!r} is taken; choose another")
        taken.add(slug(arm.name))
    return tuple(arms)


def _read_arm(fields: Mapping[str, Any]) -> Arm:
    filters = fields.get("filters", {})
    if not isinstance(filters, Mapping):
        raise UsageError(f"filters must be an object, not {filters!r}")
    for name, value in filters.items():
        # Numbers are checked where they are used; of the others a text would count as True.
        if isinstance(getattr(KEEP_ALL, name, None), bool) != isinstance(value, bool):
            raise UsageError(f"filters: {name} cannot be {value!r}")
    arm = Arm(**{**fields, "filters": PairFilters(**filters)})
    arm.objective  # noqa: B018  # for its errors
    return arm


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")
