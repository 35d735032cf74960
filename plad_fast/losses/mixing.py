"""A weighted sum of losses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plad_fast.errors import UsageError
from plad_fast.losses.registry import LossSpec, check_option_kinds, get_loss, register_loss
from plad_fast.losses.terms import check_weight
from plad_fast.validation import check_number


@register_loss("mixture", length_normalized=False)
def mixture(
    logps: Tensor,  # (B, K)
    *,
    reference_logps: Tensor,  # (B, K)
    counts: Tensor,  # (B, K)
    parts: Mapping[str, Mapping[str, Any]],
) -> Tensor:  # (B,)
    """Sum over parts of weight times loss, each of plain sums whatever the length normalisation.

    parts: {"dpo": {"weight": 0.8, "beta": 0.1}, "bco_pair": {"weight": 0.2}}: registered losses by
    name, each with a weight (1 if left out) and options of its own. What needs scores, and means
    over tokens, cannot be a part: the likelihood of the best responses is `sft_weight`. So
    weighted are MPO, Wang et al. 2024, arXiv 2411.10442, section 3.2, and TRL's `loss_weights`.
    """
    if not isinstance(parts, Mapping) or not parts:
        raise UsageError(f'parts must be like {{"dpo": {{"weight": 0.8}}}}, got {parts!r}')
    tensors = {"counts": counts, "reference_logps": reference_logps}
    total = logps.new_zeros(len(logps))
    for name, given in parts.items():
        spec = _part(name)
        if not isinstance(given, Mapping):
            raise UsageError(f"parts[{name!r}] must map names of options to values, got {given!r}")
        options = {key: value for key, value in given.items() if key != "weight"}
        _check_options(spec, options)
        weight = given.get("weight", 1.0)
        check_number(f"the weight of {name!r} in parts", weight)
        check_weight(f"the weight of {name!r} in parts", weight)
        constants = {key: tensors[key] for key in spec.takes if key in tensors}
        total = total + weight * spec.fn(logps, **constants, **options)
    return total


def _part(name: str) -> LossSpec:
    if not isinstance(name, str):
        raise UsageError(f"parts must name registered losses, got {name!r}")
    if name == "mixture":
        raise UsageError("parts of a mixture cannot be mixtures; give all parts to one")
    spec = get_loss(name)
    if spec.mean_over == "tokens":
        raise UsageError(f"{name!r} is a mean over tokens and no part of a mixture; set sft_weight")
    if spec.needs_scores:
        raise UsageError(f"{name!r} needs scores and cannot be a part of a mixture")
    return spec


def _check_options(spec: LossSpec, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in spec.options:
            known = ", ".join(["weight", *spec.options])
            raise UsageError(f"{spec.name!r} in parts has no option {name!r}; it has: {known}")
    for name, default in spec.options.items():
        if default is inspect.Parameter.empty and name not in options:
            raise UsageError(f"{spec.name!r} in parts needs the option {name!r}")
    if not torch.compiler.is_compiling():
        check_option_kinds(spec, options)
