"""Adapters that PEFT saved, made part of the weights of their base model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from plad_fast.errors import UsageError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merged_adapters(source: str | os.PathLike[str], model: PreTrainedModel) -> PreTrainedModel:
    """The model with the adapters in `source` merged into it, as ordinary weights.

    Args:
        source: folder or hub id of the adapters.
        model: their base, which is changed.

    Raises:
        UsageError: they are of a kind that cannot be merged, do not fit the model, or are on a
            layer whose weights are another one's too.
    """
    from peft import PeftModel

    advice = (
        "merge them yourself, with peft's merge_and_unload, and pass the folder that "
        "save_pretrained writes"
    )
    try:
        adapted = PeftModel.from_pretrained(model, os.fspath(source))
        if _on_some_of_tied_weights(adapted.get_base_model()):
            raise UsageError(
                f"the adapters of {os.fspath(source)!r} are on an LM head or on embeddings whose "
                "weights are those of another layer, which merging would change as well; untie "
                f"them in the base model, or {advice}"
            )
        merged = adapted.merge_and_unload()
        if untied := _no_longer_tied(merged):
            raise UsageError(
                f"the adapters of {os.fspath(source)!r} make {untied[0]!r} differ from the weight "
                "that it is tied to, and a saved model would be loaded with one of the two; untie "
                "them in the base model, or train both alike (ensure_weight_tying of peft)"
            )
    except UsageError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever PEFT makes of a foreign or a damaged file
        raise UsageError(
            f"cannot merge the adapters of {os.fspath(source)!r} into their base model; {advice} "
            f"(peft says: {reason_of(error)})"
        ) from error
    merged.requires_grad_(True)  # PEFT froze them
    return merged.eval()


def _on_some_of_tied_weights(model: PreTrainedModel) -> bool:
    """Whether merging would change a weight that a layer without these adapters has, too."""
    modules: list[Any] = list(model.modules())
    replaced = {id(part.original_module) for part in modules if hasattr(part, "modules_to_save")}
    adapters = {id(part.base_layer): part for part in modules if hasattr(part, "base_layer")}
    changes: dict[int, set[int | None]] = {}  # of each weight, by the adapters of its layers
    for part in modules:
        weight = part._parameters.get("weight")
        if weight is None or id(part) in replaced:
            continue
        adapter = adapters.get(id(part))
        # Rows of tokens that are trained at one place and followed at another are those of both.
        adapter = getattr(adapter, "tied_adapter", None) or adapter
        changes.setdefault(id(weight), set()).add(adapter and id(adapter))
    return any(len(different) > 1 for different in changes.values())


def _no_longer_tied(model: PreTrainedModel) -> list[str]:
    """Weights that loading would tie to another one, from which they differ."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    tied: Any = getattr(model, "all_tied_weights_keys", None)
    if tied is None:  # transformers 4 lists the names alone
        first: Any = model.get_input_embeddings()
        sources = [name for name, weight in weights.items() if weight is first.weight][:1]
        tied = {name: sources[0] for name in model._tied_weights_keys or () if sources}
    head = model.get_output_embeddings()
    untied = not model.config.tie_word_embeddings
    free = {f"{name}.weight" for name, part in model.named_modules() if untied and part is head}
    return [
        name
        for name, source in tied.items()
        if name in weights
        and source in weights
        and name not in free
        and not torch.equal(weights[name], weights[source])
    ]
