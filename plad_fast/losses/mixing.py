"""A weighted sum of losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plad_fast.checks import check_length_normalization, check_weight
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.registry import LossSpec, available, get_loss, register_loss

_OF_A_PART = ("weight", "length_normalization")


def _a_part_needs_it(options: Mapping[str, Any]) -> bool:
    parts = options.get("parts")
    if not isinstance(parts, Mapping):  # which the loss itself refuses
        return False
    return any(name in available() and get_loss(name).needs_reference for name in parts)


@register_loss("mixture", length_normalized=False, reference_if=_a_part_needs_it)
def mixture(
    logps: Tensor,  # (B, K), plain sums
    *,
    counts: Tensor,  # (B, K)
    reference_logps: Tensor | None = None,  # (B, K), plain sums
    parts: Mapping[str, Mapping[str, Any]],
) -> Tensor:  # (B,)
    """Sum over parts of weight times loss, each length-normalised as it is when alone.

    parts: {"dpo": {"weight": 0.8, "beta": 0.1}, "bco_pair": {"weight": 0.2}}: registered losses by
    name, each with a weight (1 if left out), a `length_normalization` (the loss's own if left out)
    and options of its own. What needs scores, and means over tokens, cannot be a part: the
    likelihood of the best responses is `sft_weight`. Parts that can go without scores do. Reference
    log-probabilities are needed if a part needs them. So weighted are MPO, Wang et al. 2024, arXiv
    2411.10442, section 3.2, and TRL's `loss_weights`.
    """
    if not isinstance(parts, Mapping) or not parts:
        raise UsageError(f'parts must be like {{"dpo": {{"weight": 0.8}}}}, got {parts!r}')
    total = logps.new_zeros(len(logps))
    for name, given in parts.items():
        spec = _part(name)
        if not isinstance(given, Mapping):
            raise UsageError(f"parts[{name!r}] must map names of options to values, got {given!r}")
        options = {key: value for key, value in given.items() if key not in _OF_A_PART}
        spec.check_options(options, beside=_OF_A_PART)
        weight = given.get("weight", 1.0)
        check_weight(f"the weight of {name!r} in parts", weight)
        alpha = given.get("length_normalization", spec.length_normalization)
        check_length_normalization(alpha)
        if not spec.length_normalized and "length_normalization" in given:
            raise UsageError(
                f"{name!r} in parts takes no length_normalization: it normalises by itself"
            )
        if spec.needs_reference and reference_logps is None:
            raise UsageError(f"{name!r} in parts needs reference_logps")
        part = Objective(spec, logps.shape[1], options, length_normalization=alpha)
        total = total + weight * part.group_losses(logps, counts, None, reference_logps)
    return total


def _part(name: str) -> LossSpec:
    if not isinstance(name, str):
        raise UsageError(f"parts must name registered losses, got {name!r}")
    if name == "mixture":
        raise UsageError("parts of a mixture cannot be mixtures; give all parts to one")
    spec = get_loss(name)
    if spec.is_likelihood:
        raise UsageError(f"{name!r} is a mean over tokens and no part of a mixture; set sft_weight")
    if spec.needs_scores:
        raise UsageError(f"{name!r} needs scores and cannot be a part of a mixture")
    return spec
