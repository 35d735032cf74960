"""What runs together: groups packed to a budget of tokens, those without a gradient apart.

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


def pack(
    lengths: Sequence[int | tuple[int, ...]], budget: int | None, *, padded: bool = False
) -> list[list[int]]:
    """Indices of the lengths in bins that stay within the budget; first fit, longest first.

    A bin takes the sum of its lengths or, padded, its longest as often as it has items. A length
    of several parts is their sum, and each part is padded on its own. A length over the budget has
    a bin of its own. In a bin, and by their first indices among each other, items keep their order.
    No budget means one bin.
    """
    if budget is None:
        return [list(range(len(lengths)))] if lengths else []
    parts = [(length,) if isinstance(length, int) else length for length in lengths]
    bins: list[list[int]] = []
    taken: list[tuple[int, ...]] = []  # by each bin: of an item if padded, else of all
    for index in sorted(range(len(parts)), key=lambda i: -sum(parts[i])):
        for place, indices in enumerate(bins):
            both = zip(taken[place], parts[index], strict=True)
            grown = tuple(max(pair) if padded else sum(pair) for pair in both)
            if sum(grown) * (len(indices) + 1 if padded else 1) <= budget:
                indices.append(index)
                taken[place] = grown
                break
        else:
            bins.append([index])
            taken.append(parts[index])
    return sorted(sorted(indices) for indices in bins)


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
