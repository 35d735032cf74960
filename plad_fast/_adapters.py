"""Adapters that PEFT saved, made part of the weights of their base model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merged_adapters(source: str | os.PathLike[str], model: PreTrainedModel) -> PreTrainedModel:
    """The model with the adapters in `source` merged into it, as ordinary weights.

    Args:
        source: folder or hub id of the adapters.
        model: their base, which is changed.

    Raises:
        UsageError: they are of a kind that cannot be merged, do not fit the model, or are on a head
            or on embeddings whose weights are the other's too.
    """
    from peft import PeftModel

    advice = (
        "merge them yourself, with peft's merge_and_unload, and pass the folder that "
        "save_pretrained writes"
    )
    try:
        adapted = PeftModel.from_pretrained(model, os.fspath(source))
        if _on_one_end_of_tied_weights(adapted.get_base_model()):
            raise UsageError(
                f"the adapters of {os.fspath(source)!r} are on an LM head or on embeddings whose "
                "weights are those of the other, which merging would change as well; untie the two "
                f"in the base model, or {advice}"
            )
        merged = adapted.merge_and_unload()
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise UsageError(
            f"cannot merge the adapters of {os.fspath(source)!r} into their base model; {advice} "
            f"(peft says: {error})"
        ) from error
    merged.requires_grad_(True)  # PEFT froze them
    return merged.eval()


def _on_one_end_of_tied_weights(model: PreTrainedModel) -> bool:
    ends = [model.get_output_embeddings(), model.get_input_embeddings()]
    bases = [getattr(end, "base_layer", end) for end in ends]
    weights = [getattr(base, "weight", None) for base in bases]
    return weights[0] is weights[1] is not None and ends != bases
