"""A smaller student: some of a teacher's layers.

The usual way to start a small student from its teacher: keep evenly spaced layers with their
weights, embeddings and head (DistilBERT, arXiv 1910.01108, section 3). Of an encoder-decoder model
these are layers of the decoder, where generation spends its time (shrink and fine-tune, arXiv
2010.13002).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Lists in a config that may by chance be as long as the model is deep.
_NOT_PER_LAYER = frozenset({"architectures", "bos_token_id", "eos_token_id", "pad_token_id"})
_LAYER_NUMBERS = ("layer_idx", "layer_id")
# Set by use of a model rather than by its config.
_RUNTIME_STATE = frozenset({"training", "gradient_checkpointing", "is_quantized", "name_or_path"})
# How configs of encoder-decoder models name the number of the decoder's layers.
_DEPTHS = ("decoder_layers", "num_decoder_layers")


def depth(model: PreTrainedModel) -> int:
    """The number of a model's layers; of an encoder-decoder model, its decoder's."""
    return len(_find_layers(model)[1])


def drop_layers(teacher: PreTrainedModel, keep: int | Sequence[int]) -> PreTrainedModel:
    """A student made of some of the teacher's layers, and of its embeddings, final norm and head.

    The student shares no storage with the teacher, which is left as it is. Tied weights stay tied.
    `save_pretrained` and `from_pretrained` give back the same student.

    Args:
        teacher: a model whose layers, or its decoder's, lie in one `nn.ModuleList` (nearly all).
        keep: how many layers, evenly spaced with the first and the last among them; or the
            indices of the layers to keep, in increasing order. Layers of the decoder, if the
            model has an encoder.

    Raises:
        UsageError: no such layers, or an architecture whose depth cannot be changed this way.
    """
    name, layers = _find_layers(teacher)
    kept = _kept_indices(keep, len(layers))
    # The deep copy meets a stand-in for every dropped layer, so their weights are never copied.
    stand_in = nn.Identity()
    dropped = {id(layer): stand_in for i, layer in enumerate(layers) if i not in set(kept)}
    student = copy.deepcopy(teacher, dropped)
    survivors = [layer for layer in student.get_submodule(name) if layer is not stand_in]
    student.set_submodule(name, nn.ModuleList(survivors))
    for index, layer in enumerate(survivors):
        for module in layer.modules():
            for attribute in _LAYER_NUMBERS:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, index)
    if student.config.is_encoder_decoder:
        setattr(student.config, _depth_name(student), len(survivors))
    else:
        _shrink_config(student.config.get_text_config(), kept, len(layers))
    _require_rebuildable(student)
    return student


def _depth_name(model: PreTrainedModel) -> str:
    names = [name for name in _DEPTHS if name in vars(model.config)]
    if len(names) != 1:
        raise UsageError(
            f"it is not known where the config of {type(model).__name__} has the depth of its "
            "decoder; choose another student"
        )
    return names[0]


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and layers of a model, or of its decoder if it has an encoder."""
    if model.config.is_encoder_decoder:
        depth, inside = getattr(model.config, _depth_name(model)), model.get_decoder()
    else:
        depth, inside = model.config.get_text_config().num_hidden_layers, model
    members = set(inside.modules())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and module in members
    ]
    # The outermost list is the stack; a list of that length inside a layer (experts) is not.
    outermost = [
        (name, module)
        for name, module in found
        if not any(name.startswith(f"{other}.") for other, _ in found)
    ]
    if len(outermost) != 1:
        raise UsageError(
            f"cannot tell which of the {len(outermost)} module lists of {type(model).__name__} are "
            f"its {depth} layers; choose another student"
        )
    return outermost[0]


def _kept_indices(keep: int | Sequence[int], depth: int) -> list[int]:
    if isinstance(keep, int):
        if not 1 <= keep <= depth:
            raise UsageError(f"cannot keep {keep} layers of {depth}; choose from 1 to {depth}")
        if keep == 1:
            return [0]
        gaps = keep - 1
        return [(2 * index * (depth - 1) + gaps) // (2 * gaps) for index in range(keep)]
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= depth:
        raise UsageError(
            f"layers to keep must be increasing indices from 0 to {depth - 1}, at least one and "
            f"none twice; got {kept}"
        )
    return kept


def _shrink_config(config: PretrainedConfig, kept: Sequence[int], depth: int) -> None:
    for name, value in list(vars(config).items()):
        per_layer = isinstance(value, (list, tuple)) and len(value) == depth
        if per_layer and name not in _NOT_PER_LAYER:
            setattr(config, name, type(value)(value[index] for index in kept))
    config.num_hidden_layers = len(kept)


def _require_rebuildable(student: PreTrainedModel) -> None:
    """Refuses a student which its config would not rebuild as it is.

    Some architectures derive a layer's kind or scale from its index, or from config entries that
    are not plain per-layer lists: loaded again, such a student would be another model.
    """
    with torch.device("meta"):
        rebuilt = type(student)(copy.deepcopy(student.config))
    ours, theirs = ({(n, w.shape) for n, w in m.state_dict().items()} for m in (student, rebuilt))
    differing = {name for name, _ in ours ^ theirs}
    if not differing:
        own, other = _settings(student), _settings(rebuilt)
        differing = {name for name in own.keys() & other.keys() if own[name] != other[name]}
    if differing:
        raise UsageError(
            f"{type(student).__name__} cannot lose these layers: saved and loaded again, its "
            f"{min(differing)} would differ; keep other layers, or choose another student"
        )


def _settings(model: nn.Module) -> dict[str, Any]:
    """The plain values by which modules of one shape may still differ (window, scale, kind)."""
    return {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
        and not attribute.startswith("_")
        and attribute not in _RUNTIME_STATE
    }
