"""Sees through PEFT: the transformers model inside, and what an adapted linear layer computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plad_fast.data.rows import TokenLimits
from plad_fast.errors import UsageError
from plad_fast.models.wrappers import own_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Inits of LoRA (how they begin) that put a part of a layer's weight into the adapter.
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ADAPTED = frozenset(
    ("peft.BaseTunerLayer", "peft.AuxiliaryTrainingWrapper", "peft.ModulesToSaveWrapper")
)
_ADVICE = "leave lm_head out of the target modules and out of quantisation"


@dataclass(frozen=True)
class LowRank:
    """An adapter that adds scale * up(down(dropout(x))) to a layer's output."""

    down: nn.Linear  # (r, D)
    up: nn.Linear  # (V, r)
    dropout: nn.Module
    scale: float

    def inputs(self, x: Tensor) -> Tensor:  # (N, D) -> (N, r)
        """What `up`'s weight is multiplied by, with the scale in it."""
        return self.down(self.dropout(x.to(self.down.weight.dtype))) * self.scale


@dataclass(frozen=True)
class Layer:
    """A linear layer as it acts now: x @ weight.T + bias, plus what its adapters add."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[LowRank, ...] = ()


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model of a PEFT model, with its adapters in place; else the model.

    Raises:
        UsageError: another kind of model, or an adapter that acts in PEFT's own forward, around
            the model and not in its layers.
    """
    get_base_model = getattr(model, "get_base_model", None)
    base: Any = model if get_base_model is None else get_base_model()
    if not callable(getattr(base, "get_output_embeddings", None)):
        raise UsageError(f"{type(model).__name__} is not a transformers model; pass a causal LM")
    if get_base_model is not None:
        _require_in_layers(model)
    return base


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens a model's input embeddings have, also under adapters or sharded."""
    return _rows_of(base_model(model).get_input_embeddings(), "num_embeddings")


def token_limits(model: nn.Module) -> TokenLimits:
    """Which token ids a model can take, and how many of them in a row."""
    base: Any = base_model(model)
    embeddings, head = vocabulary_size(base), base.get_output_embeddings()
    outputs = embeddings  # of a head that `find_head` will not know
    if hasattr(head, "out_features") or hasattr(head, "weight"):
        outputs = _rows_of(head, "out_features")
    # The decoder of an encoder-decoder model may have embeddings of its own.
    shared = not getattr(base.config, "is_encoder_decoder", False)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return TokenLimits(embeddings, min(embeddings, outputs) if shared else outputs, positions)


def _rows_of(layer: Any, name: str) -> int:
    """The size of an embedding or a head, by the attribute that says so where it is not adapted."""
    while not hasattr(layer, name):
        inner = getattr(layer, "base_layer", None)
        if inner is None:
            inner = getattr(layer, "original_module", None)
        if inner is None:
            return len(layer.weight)
        layer = inner
    return int(getattr(layer, name))


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base of an adapted model meanwhile: adapters off, and what was saved beside them too.

    Args:
        model: a PEFT model, or one to which transformers' own `add_adapter` or `load_adapter` gave
            its adapters.

    Raises:
        UsageError: the model has no adapters, or is not the original one without them.
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
    layers: list[Any] = [module for module in model.modules() if _names(module) & _ADAPTED]
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
    """What an `nn.Linear`, or PEFT's wrapper of one, computes at present.

    Args:
        name: what to call it in messages.

    Raises:
        UsageError: it is something else, or under an adapter that is not known.
    """
    kinds = _names(head)
    if isinstance(head, nn.Linear) and own_class(head) is nn.Linear:
        return Layer(head.weight, head.bias)
    module: Any = head
    if kinds >= {"peft.ModulesToSaveWrapper"}:
        active = _active(module, module.modules_to_save)
        return effective_layer(
            module.modules_to_save[active[0]] if active else module.original_module, name
        )
    if kinds >= {"peft.TrainableTokensWrapper"}:
        return effective_layer(module.token_adapter, name)
    if kinds >= {"peft.TrainableTokensLayer"} and own_class(module.base_layer) is nn.Linear:
        active = _active(module, module.trainable_tokens_delta)
        base = module.base_layer
        # Not `active_adapters` itself: a layer may have no rows of some of them.
        weight = module.get_merged_weights(active) if active else base.weight
        return Layer(weight, base.bias)
    if kinds >= {"peft.LoraLayer"} and own_class(module.base_layer) is nn.Linear:
        return _with_lora(module, name)
    kind = type(head)
    inner = getattr(head, "base_layer", None)
    around = "" if inner is None else f" around a {type(inner).__name__}"
    raise UsageError(
        f"{name} is a {kind.__module__}.{kind.__name__}{around}, which the op does not know; it "
        f"needs a plain nn.Linear: {_ADVICE}"
    )


def _with_lora(module: Any, name: str) -> Layer:
    base = module.base_layer
    if module.merged and module.disable_adapters:
        module.unmerge()  # as its own forward does
    active = [] if module.merged else _active(module, module.lora_A)
    for adapter in active:
        variant = getattr(module, "lora_variant", {}).get(adapter)
        kind = None if variant is None else type(variant).__name__
        if getattr(module, "use_dora", {}).get(adapter):
            kind = kind or "DoRA"
        if (
            kind is None and own_class(module).__name__ != "Linear"
        ):  # a subclass adds to the forward
            kind = own_class(module).__name__
        if kind is not None:
            raise UsageError(
                f"{name} is under {kind}, which is more than the plain LoRA that the op knows; "
                f"use plain LoRA there, or {_ADVICE}"
            )
    return Layer(
        base.weight,
        base.bias,
        tuple(
            LowRank(
                module.lora_A[adapter],
                module.lora_B[adapter],
                module.lora_dropout[adapter],
                float(module.scaling[adapter]),
            )
            for adapter in active
        ),
    )


def _active(module: Any, known: Any) -> Sequence[str]:
    """The adapters that act in a layer: of those in use, the ones that it has."""
    if module.disable_adapters:
        return []
    return [adapter for adapter in module.active_adapters if adapter in known]


def _names(module: nn.Module) -> frozenset[str]:
    """Of a module's classes, as package.Class: PEFT need not be installed to know them."""
    return _names_of(type(module))


@torch.compiler.assume_constant_result  # torch 2.8 cannot trace the name of a class's module
def _names_of(kind: type) -> frozenset[str]:
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
