"""What runs together: groups in micro-batches, those without a gradient apart.

Under a hinge a group that is satisfied has no gradient. A micro-batch of such groups alone needs
no backward at all, so groups that had none at their last visit are packed together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


def split_to(bins: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Halves bins, the fullest first, until there are `count`, which must not exceed the items."""
    result = [list(indices) for indices in bins]
    while len(result) < count:
        fullest = max(range(len(result)), key=lambda i: len(result[i]))
        half = len(result[fullest]) // 2
        assert half, "more micro-batches than groups"
        result[fullest : fullest + 1] = [result[fullest][:half], result[fullest][half:]]
    return result


class Satisfied(TrainerCallback, ExportableState):
    """Rows of the training set whose loss had no gradient at their last visit.

    As a callback it is kept in a checkpoint's trainer state and comes back from there, so that a
    resumed run packs as one that was never stopped.
    """

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def note(self, rows: Iterable[int], active: Iterable[bool]) -> None:
        """Takes note of visited rows."""
        for row, has_gradient in zip(rows, active, strict=True):
            (self.rows.discard if has_gradient else self.rows.add)(row)

    def state(self) -> dict[str, Any]:
        """For `ExportableState`; one line of JSON, not one a row."""
        return {"args": {}, "attributes": {"listed": ",".join(map(str, sorted(self.rows)))}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A fresh run starts with none, a resumed one with those of its checkpoint."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        listed = ""
        if state.global_step and saved:
            listed = saved["attributes"]["listed"]
        self.rows = {int(row) for row in listed.split(",") if row}


class KnownGradients:
    """Parameters that the backwards of a training reach.

    An optimizer passes over a parameter without a gradient, but moves one whose gradient is zero:
    momentum and weight decay go on. A step with skipped backwards gets the zeros that these would
    have left. (Not known is which experts a skipped micro-batch routes to, where each is a module
    of its own, as in transformers 4.)
    """

    def __init__(self) -> None:
        self._found: dict[nn.Parameter, None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def remember(self, model: nn.Module) -> None:
        """To be called after every backward that was run."""
        self._found.update(dict.fromkeys(p for p in model.parameters() if p.grad is not None))

    def fill(self) -> None:
        """Zeros where a step left no gradient; a parameter frozen meanwhile gets none."""
        for parameter in self._found:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
