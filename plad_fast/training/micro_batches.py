"""Micro-batches within a token budget, and backward passes skipped where the gradient is zero.

A group that satisfies its hinge has no gradient, and a micro-batch of such groups alone needs no
backward pass. So groups that were inactive at their last visit are packed together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from plad_fast.data.packing import PADDED_LAYOUTS, count_tokens, token_counts
from plad_fast.training.processes import whole_in_every_process

if TYPE_CHECKING:
    from accelerate import Accelerator

    from plad_fast.data.packing import PreferenceBatch, PreferenceCollator

# The newest padded bins, in which further items are tried: older ones are as good as full.
_OPEN = 256


FILLER = -1
"""Number of a row that is none of the training set."""

Features = list[dict[str, Any]]


class Groups:
    """Rows as they are, hidden from what moves batches to devices: it would visit every token."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.filler = {**features[0], "index": FILLER}
        """Runs where other processes have more rows, and counts for nothing."""

    def keep(self, count: int) -> None:
        """Drops the rows after so many."""
        del self.features[max(count, 0) :]


def as_they_are(features: Features) -> dict[str, Groups]:
    """Collator of a device's batch: rows become tensors once they are packed into micro-batches."""
    return {"groups": Groups(features)}


class MicroBatches:
    """Makes the micro-batches of a device's batch, each within a budget of tokens.

    Args:
        collator: of a micro-batch.
        budget: tokens of a micro-batch, padding included; None for one micro-batch.
        accelerator: of the training.
    """

    def __init__(
        self, collator: PreferenceCollator, budget: int | None, accelerator: Accelerator
    ) -> None:
        self.collator = collator
        self._layout = collator.layout
        self._budget = budget
        self._accelerator = accelerator

    def pack(self, rows: Features, parts: Iterable[Sequence[int]]) -> list[list[int]]:
        """Numbers of the rows that run together; those of different parts never do.

        Every process gets the same number of micro-batches, the last ones empty if need be: all
        processes take part in a forward pass under FSDP, and under DDP in one of a model with
        buffers.
        """
        bins = []
        for part in parts:
            lengths = [token_counts(rows[i], self._layout) for i in part]
            packed = pack(lengths, self._budget, padded=self._layout in PADDED_LAYOUTS)
            bins += [[part[i] for i in indices] for indices in packed]
        if self._accelerator.num_processes > 1:
            count = torch.tensor([len(bins)], device=self._accelerator.device)
            bins = split_to(bins, int(self._accelerator.gather(count).max()))
        return bins

    def collate(self, groups: Groups, numbers: Sequence[int]) -> PreferenceBatch:
        """The batch of some rows, or of the filler, with their numbers in the training set if they
        have one."""
        chosen = [groups.features[number] for number in numbers] or [groups.filler]
        batch = self.collator(chosen)
        if "index" in chosen[0]:
            batch["index"] = [row["index"] for row in chosen]
        return batch

    def count_tokens(self, rows: Features) -> int:
        """Tokens that enter the model, without padding."""
        return sum(count_tokens(row, self._layout) for row in rows)


def split_to(bins: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Halves bins, the fullest first, until there are `count`; what the items do not fill stays
    empty, at the end."""
    result = [list(indices) for indices in bins]
    while len(result) < count:
        fullest = max(range(len(result)), key=lambda i: len(result[i]), default=0)
        half = len(result[fullest]) // 2 if result else 0
        if not half:
            return result + [[] for _ in range(count - len(result))]
        result[fullest : fullest + 1] = [result[fullest][:half], result[fullest][half:]]
    return result


class InactiveRows(TrainerCallback, ExportableState):
    """Rows of the training set whose loss had no gradient at their last visit.

    As a callback it is kept in a checkpoint's trainer state and comes back from there, so that a
    resumed run packs as one that was never stopped.
    """

    def __init__(self) -> None:
        self.numbers: set[int] = set()

    def state(self) -> dict[str, Any]:
        """For `ExportableState`; one line of JSON, not one a row."""
        return {"args": {}, "attributes": {"listed": ",".join(map(str, sorted(self.numbers)))}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A fresh run starts with none, a resumed one with those of its checkpoint."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        listed = saved["attributes"]["listed"] if state.global_step and saved else ""
        self.numbers = {int(row) for row in listed.split(",") if row}


class BackwardSkipper:
    """Skips the backward pass of a micro-batch whose gradient is exactly zero.

    An optimizer ignores a parameter without a gradient, but moves one whose gradient is zero:
    momentum and weight decay go on. So after skipped backward passes a step gets the zeros that
    they would have left, in every parameter that the training has reached. (The experts that a
    skipped micro-batch routes to are not known where each is a module of its own, as in
    transformers 4.)

    Args:
        accelerator: of the training.
        may_be_inactive: whether the loss can leave a group without a gradient.
        wanted: whether to skip; packing is the same if not, so that skipping changes no bit.
    """

    def __init__(self, accelerator: Accelerator, *, may_be_inactive: bool, wanted: bool) -> None:
        self._accelerator = accelerator
        self._applies = may_be_inactive and whole_in_every_process(accelerator)
        self._wanted = wanted
        self.rows = InactiveRows()
        self.begin([])

    def begin(self, callbacks: Iterable[TrainerCallback]) -> None:
        """Starts a training, with nothing of one before it.

        Of the trainer's callbacks one restored from a checkpoint may have taken the place of ours.
        """
        self.rows = next((cb for cb in callbacks if isinstance(cb, InactiveRows)), self.rows)
        self._reached: dict[nn.Parameter, None] = {}
        self._counts = [0, 0]  # micro-batches since the last log, and those without a backward
        self._allowed = self._skipped = False

    def parts(self, rows: Features) -> list[list[int]]:
        """Numbers of the rows that were inactive at their last visit, and of the others."""
        known = self.rows.numbers if self._applies else set()
        inactive = [row.get("index") in known for row in rows]
        return [
            [i for i, found in enumerate(inactive) if found is is_in] for is_in in (True, False)
        ]

    @contextlib.contextmanager
    def micro_batch(self, model: nn.Module, *, reduces: bool) -> Iterator[None]:
        """Around forward and backward of one, of a model that is not wrapped.

        A backward that `reduces` adds up the gradients of all processes, and must run.
        """
        self._allowed = self._wanted and not reduces and bool(self._reached)
        yield
        self._reached.update(dict.fromkeys(p for p in model.parameters() if p.grad is not None))

    def end_step(self) -> None:
        """Fills in zeros where skipped backwards would have; a frozen parameter gets none."""
        if self._skipped:
            for parameter in self._reached:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self._skipped = False

    def loss_to_run(self, loss: Tensor, active: Tensor, rows: Sequence[int]) -> Tensor:  # ()
        """The loss to run the backward pass on: detached from the model where it is skipped.

        Every process notes the activity of all groups: the next epoch distributes the rows anew.

        Args:
            active: (B,) whether a group has a gradient.
            rows: (B,) numbers of the groups in the training set.
        """
        if not self._applies:
            return loss
        notes = torch.stack([torch.tensor(rows, device=active.device), active.long()], 1)
        if self._accelerator.num_processes > 1:
            notes = self._accelerator.pad_across_processes(notes, pad_index=-1)
            notes = self._accelerator.gather(notes)
            notes = notes[notes[:, 0] >= 0]
        numbers, flags = notes.T.tolist()
        for number, has_gradient in zip(numbers, flags, strict=True):
            (self.rows.numbers.discard if has_gradient else self.rows.numbers.add)(number)
        self._counts[0] += 1
        # What counts is the gradient in any process: they run a backward together.
        if any(flags) or not self._allowed:
            return loss
        self._counts[1] += 1
        self._skipped = True
        return loss.detach() + torch.zeros_like(loss, requires_grad=True)

    def metrics(self) -> dict[str, float]:
        """`skipped_backwards` since the last call, over all processes."""
        if not (self._applies and self._wanted):
            return {}
        counts = torch.tensor(self._counts, device=self._accelerator.device)
        ran, skipped = self._accelerator.reduce(counts, "sum").tolist()
        self._counts = [0, 0]
        return {"skipped_backwards": skipped / max(ran, 1)}


def pack(
    lengths: Sequence[int | tuple[int, ...]], budget: int | None, *, padded: bool = False
) -> list[list[int]]:
    """Indices of the lengths in bins that stay within the budget; first fit, longest first.

    A bin takes the sum of its lengths or, padded, its longest as often as it has items. A length
    of several parts is their sum, and each part is padded on its own. A length over the budget has
    a bin of its own. In a bin, and by their first indices among each other, items keep their order.
    No budget means one bin.
    """
    if budget is None or not lengths:
        return [list(range(len(lengths)))] if lengths else []
    parts = np.array([(length,) if isinstance(length, int) else length for length in lengths])
    totals = parts.sum(1)
    tallest = np.zeros_like(parts)  # of the items of a bin
    taken, counts = np.zeros_like(totals), np.zeros_like(totals)
    bins: list[list[int]] = []
    for index in np.argsort(-totals, kind="stable").tolist():
        first = max(len(bins) - _OPEN, 0) if padded else 0
        open_bins = slice(first, len(bins))
        if padded:
            longest = np.maximum(tallest[open_bins], parts[index]).sum(1)
            grown = longest * (counts[open_bins] + 1)
        else:
            grown = taken[open_bins] + totals[index]
        fits = grown <= budget
        number = first + int(fits.argmax()) if fits.any() else len(bins)
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        tallest[number] = np.maximum(tallest[number], parts[index])
        taken[number] += totals[index]
        counts[number] += 1
    return sorted(sorted(indices) for indices in bins)
