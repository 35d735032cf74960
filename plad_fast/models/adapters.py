"""PEFT seen through: the transformers model inside, what an adapted linear layer computes, and
saved adapters as part of their base model's weights."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plad_fast.data.rows import TokenLimits
from plad_fast.errors import UsageError, reported_as
from plad_fast.models.wrappers import own_class

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Inits of LoRA (how they begin) that put a part of a layer's weight into the adapter.
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ADAPTED = frozenset(
    ("peft.BaseTunerLayer", "peft.AuxiliaryTrainingWrapper", "peft.ModulesToSaveWrapper")
)
_MERGED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ADVICE = "leave lm_head out of the target modules and out of quantisation"


@dataclass(frozen=True)
class LowRank:
    """An adapter that adds scale * up(down(dropout(x))) to a layer's output."""

    down: nn.Linear  # (r, D)
    up: nn.Linear  # (V, r)
    dropout: nn.Module
    scale: float

    def inputs(self, x: Tensor) -> Tensor:  # (N, D) -> (N, r)
        """The factor of `up`'s weight, with the scale in it."""
        return self.down(self.dropout(x.to(self.down.weight.dtype))) * self.scale


@dataclass(frozen=True)
class Layer:
    """A linear layer as it acts now: x @ weight.T + bias, plus what its adapters add."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[LowRank, ...] = ()


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model of a PEFT model, with its adapters in place; else the model.

    An adapter that acts in PEFT's own forward, around the model and not in its layers, is refused.
    """
    get_base_model = getattr(model, "get_base_model", None)
    base: Any = model if get_base_model is None else get_base_model()
    if not callable(getattr(base, "get_output_embeddings", None)):
        raise UsageError(f"{type(model).__name__} is not a transformers model; pass a causal LM")
    if get_base_model is not None:
        _require_in_layers(model)
    return base


def vocabulary_size(model: nn.Module) -> int:
    """The number of tokens in a model's input embeddings, also under adapters or sharded."""
    return _rows_of(base_model(model).get_input_embeddings(), "num_embeddings")


def token_limits(model: nn.Module) -> TokenLimits:
    """The token ids that a model can take, and how many of them in a row."""
    base: Any = base_model(model)
    embeddings, head = vocabulary_size(base), base.get_output_embeddings()
    outputs = embeddings  # of a head that `find_head` will not know
    if hasattr(head, "out_features") or hasattr(head, "weight"):
        outputs = _rows_of(head, "out_features")
    # The decoder of an encoder-decoder model may have embeddings of its own.
    shared = not getattr(base.config, "is_encoder_decoder", False)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return TokenLimits(embeddings, min(embeddings, outputs) if shared else outputs, positions)


def steady_length(model: nn.Module) -> float:
    """Tokens up to which a sequence has the same rotary frequencies in any batch.

    Beyond, LongRoPE (and dynamic NTK, beyond the positions of the model) takes other ones for all
    rows of a batch, as its longest row wants them.
    """
    base: Any = base_model(model)
    config = base.config.get_text_config()
    of_all = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [of_all, *(value for value in of_all.values() if isinstance(value, dict))]
    of_model = (
        getattr(config, "original_max_position_embeddings", None)
        or getattr(config, "max_position_embeddings", None)
        or math.inf
    )
    limits: list[float] = [
        rope.get("original_max_position_embeddings") or of_model
        for rope in each
        if rope.get("rope_type", rope.get("type")) in ("longrope", "su", "dynamic")
    ]
    return min(limits, default=math.inf)


def warn_of_length(model: nn.Module, longest: int, name: str) -> None:
    """Tells where the numbers of `name`, with a sequence this long, depend on their batches."""
    if longest > (steady := steady_length(model)):
        logger.warning(
            "%s have a sequence of %d tokens: beyond %d this model has other rotary frequencies, "
            "for all of a batch, so that log-probabilities depend on what else is in it; set "
            "max_length=%d or less",
            *(name, longest, steady, steady),
        )


def _rows_of(layer: Any, name: str) -> int:
    """The size of an embedding or a head, by the attribute that says so where it is not adapted."""
    while not hasattr(layer, name):
        inner = getattr(layer, "base_layer", getattr(layer, "original_module", None))
        if inner is None:
            return len(layer.weight)
        layer = inner
    return int(getattr(layer, name))


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base of an adapted model meanwhile: adapters off, and what was saved beside them too.

    Args:
        model: a PEFT model, or one to which transformers' own `add_adapter` or `load_adapter` gave
            its adapters; one that is not the original model without them is refused.
    """
    disable = getattr(model, "disable_adapter", None)
    if disable is None and not getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            f"{type(model).__name__} is not a PEFT model and has no adapters to switch off; pass "
            "a reference_model, or None for the model as it is before training"
        )
    _require_original_base(model)
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with _disabled_layers(model) if disable is None else disable():
            yield
    finally:
        for parameter, requires_grad in wanted:  # PEFT switches on all of an adapter
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _disabled_layers(model: nn.Module) -> Iterator[None]:
    # Layer by layer: transformers' `enable_adapters` does not undo all of its `disable_adapters`.
    layers: list[Any] = [module for module in model.modules() if _names(type(module)) & _ADAPTED]
    layers = [layer for layer in layers if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _require_original_base(model: nn.Module) -> None:
    settings: Any = getattr(model, "peft_config", None) or {}
    for adapter, config in settings.items():
        init = str(getattr(config, "init_lora_weights", ""))
        if init.lower().startswith(_MOVE_THE_BASE):
            raise UsageError(
                f"adapter {adapter!r} was made with init_lora_weights={init!r}, which changes the "
                "weights of the base: with its adapters off the model is not the original one; "
                "set reference_model=None for the model as it is before training, or pass the "
                "original model"
            )


def effective_layer(head: nn.Module, name: str) -> Layer:
    """The product that an `nn.Linear`, or PEFT's wrapper of one, computes at present.

    Args:
        name: what to call it in messages.
    """
    module: Any = head
    kinds, inner = _names(type(head)), getattr(head, "base_layer", None)
    if own_class(head) is nn.Linear:
        return Layer(module.weight, module.bias)
    if "peft.ModulesToSaveWrapper" in kinds:
        active = _active(module, module.modules_to_save)
        copy = module.modules_to_save[active[0]] if active else module.original_module
        return effective_layer(copy, name)
    if "peft.TrainableTokensWrapper" in kinds:
        return effective_layer(module.token_adapter, name)
    if inner is not None and own_class(inner) is nn.Linear:
        if "peft.TrainableTokensLayer" in kinds:
            active = _active(module, module.trainable_tokens_delta)
            # Not `active_adapters` itself: a layer may have no rows of some of them.
            weight = module.get_merged_weights(active) if active else inner.weight
            return Layer(weight, inner.bias)
        if "peft.LoraLayer" in kinds:
            return _with_lora(module, name)
    kind, around = type(head), "" if inner is None else f" around a {type(inner).__name__}"
    raise UsageError(
        f"{name} is a {kind.__module__}.{kind.__name__}{around}, which the op does not know; it "
        f"needs a plain nn.Linear: {_ADVICE}"
    )


def _with_lora(module: Any, name: str) -> Layer:
    base = module.base_layer
    if module.merged and module.disable_adapters:
        module.unmerge()  # as its own forward does
    adapters = []
    for adapter in [] if module.merged else _active(module, module.lora_A):
        variant = getattr(module, "lora_variant", {}).get(adapter)
        kind = type(variant).__name__ if variant is not None else own_class(module).__name__
        if variant is None and getattr(module, "use_dora", {}).get(adapter):
            kind = "DoRA"
        if kind != "Linear":  # a subclass adds to the forward
            raise UsageError(
                f"{name} is under {kind}, which is more than the plain LoRA that the op knows; "
                f"use plain LoRA there, or {_ADVICE}"
            )
        down, up, dropout = (
            part[adapter] for part in (module.lora_A, module.lora_B, module.lora_dropout)
        )
        adapters.append(LowRank(down, up, dropout, float(module.scaling[adapter])))
    return Layer(base.weight, base.bias, tuple(adapters))


def _active(module: Any, known: Any) -> Sequence[str]:
    """The adapters that act in a layer: of those in use, the ones that it has."""
    if module.disable_adapters:
        return []
    return [adapter for adapter in module.active_adapters if adapter in known]


@torch.compiler.assume_constant_result  # torch 2.8 cannot trace the name of a class's module
def _names(kind: type) -> frozenset[str]:
    """Of a class and its bases, as package.Class: PEFT need not be installed to know them."""
    return frozenset(f"{x.__module__.partition('.')[0]}.{x.__name__}" for x in kind.__mro__)


def require_whole_loss(model: nn.Module) -> None:
    """Raise a UsageError if PEFT's own forward adds a term to the loss of an adapter in use."""
    for config in _settings_in_use(model):
        for name in ("orth_reg_weight", "auxiliary_loss_weight"):  # AdaLoRA, ShadowPEFT
            if weight := getattr(config, name, 0.0):
                raise UsageError(
                    f"{type(config).__name__} has {name}={weight}, the weight of a term that PEFT "
                    "adds to a model's own loss, which is not the one trained here; make it with "
                    f"{name}=0.0, or use LoRA"
                )


def _settings_in_use(model: Any) -> list[Any]:
    settings = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapters", None) or list(settings)
    if callable(active):  # of transformers' own models
        active = list(settings)
    return [settings.get(adapter) for adapter in ([active] if isinstance(active, str) else active)]


def _require_in_layers(model: Any) -> None:
    for config in _settings_in_use(model):
        kind = str(getattr(getattr(config, "peft_type", None), "value", ""))
        if getattr(config, "is_prompt_learning", False) or kind in ("XLORA", "POLY"):
            raise UsageError(
                f"PEFT's {kind or type(config).__name__} acts around the model, not in its layers, "
                "and the fused loss runs the model itself; use LoRA or another adapter of layers"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UsageError(
                "PEFT's activated LoRA looks for its tokens in PEFT's own forward, which the fused "
                "loss does not run; use plain LoRA"
            )


def pad_token_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Some token that the model has an embedding for: it is masked wherever it stands."""
    ids, known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0), vocabulary_size(model)
    return next(token for token in ids if token is not None and 0 <= token < known)


def merged_adapters(source: str | os.PathLike[str], model: PreTrainedModel) -> PreTrainedModel:
    """The model with the adapters in `source` merged into it, as ordinary weights.

    Args:
        source: folder or hub id of the adapters.
        model: their base, which is changed.
    """
    from peft import PeftModel

    adapters = os.fspath(source)
    advice = (
        "merge them yourself, with peft's merge_and_unload, and pass the folder that "
        "save_pretrained writes"
    )
    problem = f"cannot merge the adapters of {adapters!r} into their base model; {advice}"
    with reported_as(problem, "peft"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own calls
        adapted = PeftModel.from_pretrained(model, adapters)
        if _on_some_of_tied_weights(adapted.get_base_model()):
            raise UsageError(
                f"the adapters of {adapters!r} are on an LM head or on embeddings whose weights "
                "are those of another layer, which merging would change as well; untie them in "
                f"the base model, or {advice}"
            )
        merged = adapted.merge_and_unload()
        if untied := _no_longer_tied(merged):
            raise UsageError(
                f"the adapters of {adapters!r} make {untied[0]!r} differ from the weight that it "
                "is tied to, and a saved model would be loaded with one of the two; untie them in "
                "the base model, or train both alike (ensure_weight_tying of peft)"
            )
    merged.requires_grad_(True)  # PEFT froze them
    return merged.eval()


def merge_for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Adds plain LoRA in place to the weights that it is on, so that a layer costs one product
    instead of three. Left apart are adapters of other kinds, adapters with a bias on layers without
    one, and those on quantised weights and on weights that another layer shares.

    Args:
        model: in evaluation mode. It can no longer train these adapters.

    Returns:
        The model given, whose outputs change by rounding.
    """
    if not getattr(model, "peft_config", None):
        return model
    from peft.tuners.lora import Linear

    parts: list[Any] = list(model.modules())
    holders = Counter(id(weight) for part in parts for weight in part._parameters.values())
    layers: list[Any] = [part for part in parts if type(part) is Linear]
    for layer in layers:
        base = layer.get_base_layer()
        has_variant = any(getattr(layer, "lora_variant", {})) or any(layer.use_dora.values())
        has_own_bias = base.bias is None and any(getattr(layer, "lora_bias", {}).values())
        is_own = base.weight.dtype in _MERGED and holders[id(base.weight)] == 1
        if is_own and not (has_variant or has_own_bias):
            layer.merge()
    return model


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
