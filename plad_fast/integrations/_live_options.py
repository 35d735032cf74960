"""The options of a TRL trainer's loss as they are at present: TRL reads them anew at every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from plad_fast.integrations._head_loss import HeadLoss

Translated = tuple[str, Mapping[str, Any], float]

_ATTRIBUTES = {"loss_type": "loss_types"}
"""Names of options and those of the trainer's attributes, where these differ."""


def present_options(trainer: Any, names: Collection[str]) -> dict[str, Any]:
    """Values of options: the trainer's own where it keeps one, else those of its arguments."""
    own = vars(trainer)
    found = {}
    for name in names:
        attribute = _ATTRIBUTES.get(name, name)
        attribute = attribute if attribute in own else name
        found[name] = own[attribute] if attribute in own else getattr(trainer.args, name)
    return found


@dataclass
class LiveLoss:
    """A trainer's loss, translated again where the trainer's options have changed.

    Args:
        translate: options of TRL's trainer to the loss, its options and `sft_weight`.
        names: of the options.
        head_loss: how the loss is computed; its loss is found here.
    """

    translate: Callable[[Mapping[str, Any]], Translated]
    names: Collection[str]
    head_loss: HeadLoss
    _seen: dict[str, Any] = field(default_factory=dict)

    def of(self, trainer: Any) -> HeadLoss:
        """Raises UsageError for options that do not work here."""
        options = present_options(trainer, self.names)
        if options != self._seen:
            loss, own, sft_weight = self.translate(options)
            self.head_loss = replace(self.head_loss, loss=loss, options=own, sft_weight=sft_weight)
            self._seen = copy.deepcopy(options)
        return self.head_loss
