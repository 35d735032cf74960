"""The settings of a training that can be told wrong before a model or a row is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plad_fast._places import shown
from plad_fast.errors import UsageError
from plad_fast.losses import get_loss, read_loss_args
from plad_fast.objective import Objective
from plad_fast.pair_settings import flag

PRECISIONS = ("auto", "float32", "bfloat16")

_COUNTS = ("batch_size", "micro_batch_size", "max_tokens_per_batch", "saves_per_stage")
_POSITIVE = ("epochs", "learning_rate")
_NOT_NEGATIVE = ("sft_weight", "length_normalization")
_OF_PREFERENCES = ("sft_weight", "length_normalization")
# Losses to which their papers add the likelihood of the chosen response, and those that rank by
# nats per token.
_WITH_LIKELIHOOD = ("plad_ranking", "plad_margin", "plad_listwise", "slic", "cpo", "orpo")
_PER_TOKEN = ("plad_ranking", "plad_margin", "plad_listwise")


def recipe_terms(
    loss: str, sft_weight: float | None, length_normalization: float | None
) -> tuple[float, float]:
    """(sft_weight, length_normalization), with those of the recipe where there is None.

    The weight is 1 for PLaD's losses and for SLiC, CPO and ORPO, which have the likelihood as a
    term, else 0. Alpha is 1 for PLaD's losses, and where a loss takes means over tokens whatever
    alpha is, so that its metrics count what it ranks by; else 0: "dpo" is DPO.
    """
    spec = get_loss(loss)
    if sft_weight is None:
        sft_weight = float(loss in _WITH_LIKELIHOOD)
    if length_normalization is None:
        own_means = (
            not spec.length_normalized
            and "length_normalization" not in spec.takes  # which hands it on to its parts
            and spec.mean_over != "tokens"
        )
        length_normalization = float(loss in _PER_TOKEN or own_means)
    return sft_weight, length_normalization


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

    loss, beta = given["loss"], given.get("beta")
    spec = get_loss(loss)
    if "beta" in given:
        require("beta", "must be at least 0", given["beta"] >= 0)
        if "beta" not in spec.options:
            raise UsageError(f"--loss {loss} has no beta; leave --beta out")
    if spec.mean_over == "tokens":
        for name in _OF_PREFERENCES:
            if given.get(name):
                raise UsageError(
                    f"{flag(name)} has no part in --loss {loss}, which is the likelihood itself; "
                    "leave it out"
                )
    options = read_loss_args(loss, given.get("loss_args"), beta=beta) or {}
    if beta is not None:
        options["beta"] = beta
    Objective.bind(loss, group_size=2, has_scores=True, has_reference=True, **options)
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
