"""Metrics of preference training: sums over groups, from which means over anything follow.

B groups of K responses to one prompt, best first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.ops.preference_losses import FusedLoss


class AtBegin(TrainerCallback):
    """Calls a function where a training begins, also one that begins again."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """For `transformers.Trainer`."""
        self._function()


def check_best_metric(wanted: str | None, names: Collection[str], evaluation: Any) -> None:
    """Raises UsageError for a `metric_for_best_model` that no evaluation has."""
    if wanted is None or evaluation is None:
        return
    names = {*names, "runtime", "samples_per_second", "steps_per_second"}
    if isinstance(evaluation, dict):
        names = {f"{key}_{name}" for key in evaluation for name in names}
    if wanted.removeprefix("eval_") not in names:
        raise UsageError(
            f"metric_for_best_model is {wanted!r}, and the evaluation has: "
            f"{', '.join(sorted(names))}"
        )


class PreferenceMeter:
    """Adds up batches. Its means weigh every group, or every token, the same.

    Args:
        objective: the loss, which says what its mean is over.
        router_loss: whether the model adds a router loss, which is then part of `loss`.
    """

    _NAMES = ("groups", "loss", "nll", "nll_tokens", "tokens", "logps/chosen")
    _PAIR_NAMES = ("logps/rejected", "margin", "ranking_accuracy", "active_pairs", "saved_tokens")
    _REWARD_NAMES = tuple(
        f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")
    )

    def __init__(self, objective: Objective, *, router_loss: bool = False) -> None:
        self._objective = objective
        self._columns = self._NAMES + (self._PAIR_NAMES if objective.group_size > 1 else ())
        self._columns += self._REWARD_NAMES if objective.needs_reference else ()
        self._columns += ("router_loss",) * router_loss
        self.reset()

    @property
    def names(self) -> set[str]:
        """Names of the metrics in a `summary`."""
        inner = {"groups", "nll_tokens", "tokens"}
        return {*self._columns, "tokens_per_second"} - inner

    def reset(self) -> None:
        """Forgets the batches and stops the clock."""
        self.total: Tensor | None = None
        self._started: float | None = None

    def start(self) -> None:
        """Starts the clock unless it runs."""
        if self._started is None:
            self._started = time.perf_counter()

    def skip(self, seconds: float) -> None:
        """Leaves out time spent on something else."""
        if self._started is not None:
            self._started += seconds

    def rows(
        self,
        out: FusedLoss,
        group_tokens: Tensor,  # (B, 2) of `PreferenceBatch`
        *,
        reference_logps: Tensor | None = None,  # (S,), plain sums
        router_loss: Tensor | None = None,  # (), of these groups together
    ) -> Tensor:  # (B, metrics) float32
        """The metrics of every group in a batch; rows may be summed in any order."""
        shape = (-1, self._objective.group_size)
        logps, counts = out.sums.view(shape), out.counts.view(shape)
        plain = logps * counts.clamp(min=1) ** self._objective.length_normalization
        columns = [
            torch.ones_like(logps[:, 0]),
            out.group_losses,
            -plain[:, 0],
            counts[:, 0],
            group_tokens[:, 0],
            logps[:, 0],
        ]
        if shape[1] > 1:
            chosen, rejected = logps[:, :1], logps[:, 1:]
            columns += [
                rejected.mean(1),
                (chosen - rejected).mean(1),
                (chosen > rejected).float().mean(1),
                out.active,
                group_tokens[:, 1] - group_tokens[:, 0],
            ]
        if self._objective.needs_reference:
            assert reference_logps is not None
            rewards = self._objective.beta * (plain - reference_logps.view(shape))
            columns += [
                rewards[:, 0],
                rewards[:, 1:].mean(1),
                (rewards[:, :1] - rewards[:, 1:]).mean(1),
                (rewards[:, :1] > rewards[:, 1:]).float().mean(1),
            ]
        if router_loss is not None:
            columns.append(router_loss.detach().expand(len(logps)))
        return torch.stack([column.float() for column in columns], dim=1)

    def add(self, rows: Tensor) -> None:
        """Adds what `rows` made."""
        total = rows.sum(0)
        self.total = total if self.total is None else self.total + total

    def summary(self, total: Tensor | None = None) -> dict[str, float]:
        """Means of what was added, or of `total` where it was summed over processes."""
        total = self.total if total is None else total
        assert total is not None
        assert self._started is not None
        sums = dict(zip(self._columns, total.tolist(), strict=True))
        shares = {}
        groups, nll_tokens = sums.pop("groups"), max(sums.pop("nll_tokens"), 1)
        loss, nll, tokens = sums.pop("loss"), sums.pop("nll") / nll_tokens, sums.pop("tokens")
        if "saved_tokens" in sums:
            saved = sums.pop("saved_tokens")
            shares["saved_tokens"] = saved / (saved + tokens)
        loss /= nll_tokens if self._objective.spec.is_likelihood else groups
        routing = sums.get("router_loss", 0.0) / groups
        return {
            "loss": loss + self._objective.sft_weight * nll + routing,
            "nll": nll,
            **{name: value / groups for name, value in sums.items()},
            **shares,
            "tokens_per_second": tokens / (time.perf_counter() - self._started),
        }
