"""Switches dropout off in a model that trains."""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Sets every probability of dropout in the model to 0, for good; its config keeps them.

    They are those of dropout layers, also of adapters, and those that modules of transformers hold
    as numbers (`attention_dropout`, `layerdrop`). One that a model reads off its config in every
    forward, as Falcon does, stays.
    """
    for module in model.modules():
        names = [name for name in vars(module) if "dropout" in name or "layerdrop" in name]
        names += ["p"] if "dropout" in type(module).__name__.lower() else []
        for name in names:
            # Not a bool, nor a count.
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
