"""Takes a Hugging Face causal LM apart: its backbone, its LM head, and what it does to logits.

The op replaces the head's product, so all that a model does between its last hidden state and its
logits has to be known. Where it is not, the model is refused by name: a wrong scale trains
without complaint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from plad_fast.errors import UsageError
from plad_fast.ops import linear_sequence_logprobs
from plad_fast.reference import reference_logits

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from plad_fast.ops import SequenceLogProbs
    from plad_fast.packing import PreferenceBatch

Result = TypeVar("Result")

# Config entry -> the model families (prefixes of `model_type`) that multiply or divide by it.
_MULTIPLIERS = {
    "logit_scale": ("cohere",),
    "lm_head_multiplier": ("falcon_h1",),
    "logits_scaling": ("hyperclovax",),
}
_DIVISORS = {"logits_scaling": ("granite", "minicpm3")}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class LMHead:
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    """None leaves the tanh out."""
    logit_scale: float


def find_head(model: nn.Module) -> LMHead:
    """The LM head of a causal LM, as the arguments the op takes.

    Call it where the weights are whole: for FSDP that is inside the wrapped forward (see
    `call_inside`). ZeRO-3 gathers the head's weight for the head's own forward only, so it is
    refused.

    Args:
        model: a transformers causal LM, or a PEFT model around one.

    Raises:
        UsageError: encoder-decoder models, heads that are not one plain `nn.Linear` (LoRA,
            quantised), weights that are sharded or not loaded, unknown logit scales.
    """
    lm = base_model(model)
    family = type(lm).__name__
    if getattr(lm.config, "is_encoder_decoder", False):
        raise UsageError(f"{family} is an encoder-decoder model; pass a decoder-only model")
    head = lm.get_output_embeddings()
    if head is None:
        raise UsageError(f"{family} has no LM head; load it with AutoModelForCausalLM")
    kind = type(head)
    if kind is not nn.Linear:
        raise UsageError(
            f"the LM head of {family} is a {kind.__module__}.{kind.__name__}, which the op "
            "does not know; it needs a plain nn.Linear: leave lm_head out of the LoRA target "
            "modules and out of quantisation"
        )
    for tensor in (head.weight, head.bias):
        _require_whole(tensor, family)
    config = lm.config.get_text_config()
    return LMHead(head.weight, head.bias, _softcap(config), _logit_scale(config))


def backbone_hidden(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    **inputs: Any,
) -> Tensor:  # (B, T, D)
    """The hidden states that the LM head would see, without running the head.

    Raises:
        UsageError: the model has no backbone apart from its head.
    """
    lm = base_model(model)
    backbone = lm.base_model
    if backbone is lm:  # Gemma 3 of transformers 4
        backbone = lm.get_decoder()
    if backbone is lm or backbone is None:
        raise UsageError(f"{type(lm).__name__} has no backbone apart from its LM head")
    output = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        return_dict=True,
        **inputs,
    )
    return output.last_hidden_state


def check_head(model: nn.Module) -> None:
    """Runs four tokens through the model and through `find_head`: the logits must agree.

    This settles what names in a config cannot, for architectures this library has never seen.
    The model must be whole, on its device, and not wrapped. It costs two forward passes.

    Raises:
        UsageError: they do not agree, or as in `find_head`.
    """
    head = find_head(model)
    input_ids = torch.arange(4, device=head.weight.device).remainder(len(head.weight))[None]
    with evaluating(model), torch.no_grad():
        expected = model(input_ids=input_ids).logits[0].float()
        hidden = backbone_hidden(model, input_ids)[0].to(head.weight.dtype)
        found = reference_logits(
            hidden, head.weight, head.bias, head.softcap, head.logit_scale
        ).float()
    if not expected.isfinite().all():
        raise UsageError(
            f"the logits of {type(base_model(model)).__name__} are not finite: its weights are "
            f"broken, or too large for {head.weight.dtype}; load it again, in bf16 or float32"
        )
    # A wrong scale or a left-out layer is off by far more than 16-bit rounding.
    if expected.shape != found.shape or not torch.allclose(
        found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())
    ):
        raise UsageError(
            f"{type(base_model(model)).__name__} does more to its logits than the fused loss "
            "knows (a scale, a further layer, a cut vocabulary); this model is not supported"
        )


def causal_lm_logprobs(
    model: nn.Module,
    batch: PreferenceBatch,
    *,
    length_normalization: float = 0.0,
    **options: Any,
) -> SequenceLogProbs:
    """Log-probability of every response in a batch under the model, differentiable.

    Args:
        model: a causal LM; see `find_head` for which.
        batch: from `PreferenceCollator`, on the model's device; a packed one needs
            `plad_fast.sharing.prepare(model)` once.
        length_normalization: alpha in sum / count ** alpha.
        **options: `temperature`, `impl` and so on of `linear_sequence_logprobs`.
    """
    return linear_sequence_logprobs(
        **head_arguments(model, batch), length_normalization=length_normalization, **options
    )


def head_arguments(model: nn.Module, batch: PreferenceBatch) -> dict[str, Any]:
    """Runs the backbone and gathers what both ops take of model and batch.

    Hidden states get the head's dtype, which they lack when a norm works in float32 or, under
    autocast, when the last layer does not; autocast itself is the op's business.
    """
    hidden = batch_hidden(model, batch)
    head = find_head(model)
    if "row_layout" in batch:
        rows = batch["row_layout"].predicting(hidden)
    else:
        rows = hidden.flatten(0, 1).index_select(0, batch["loss_rows"])
    return {
        "hidden": rows.to(head.weight.dtype),
        "weight": head.weight,
        "bias": head.bias,
        "targets": batch["targets"],
        "cu_seqlens": batch["cu_seqlens"],
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
    }


def batch_hidden(model: nn.Module, batch: PreferenceBatch) -> Tensor:  # (R, T, D)
    """Hidden states of a batch in any layout.

    Raises:
        UsageError: a packed batch for a model whose attention does not know packed rows.
    """
    if "row_layout" not in batch:
        return backbone_hidden(model, batch["input_ids"], batch["attention_mask"])
    from plad_fast.attention import is_enabled, packed_forward  # brings in transformers

    if not is_enabled(base_model(model)):
        raise UsageError(
            "the batch is packed and the model's attention does not know packed rows; call "
            "plad_fast.sharing.prepare(model) first, or collate with layout='padded'"
        )
    with packed_forward():
        return backbone_hidden(
            model,
            batch["input_ids"],
            position_ids=batch["position_ids"],
            row_layout=batch["row_layout"],
        )


def call_inside(
    wrapper: nn.Module, module: nn.Module, fn: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    """Calls `fn` as if it were the forward of `module`, through `wrapper`.

    DDP and FSDP prepare gradients and gather weights around their forward only: work done outside
    of it meets sharded weights, or leaves gradients unreduced. Forward hooks of `module` run too.

    Args:
        wrapper: DDP or FSDP around `module`, or `module` itself.
        module: the model inside; see `unwrap`.
        fn: what to run. Its result passes through the wrapper.
    """
    own_forward = vars(module).get("forward")
    module.forward = fn
    try:
        return wrapper(*args, **kwargs)
    finally:
        if own_forward is None:
            del module.forward
        else:
            module.forward = own_forward


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def unwrap(wrapper: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP or a DeepSpeed engine; a bare model is returned as it is."""
    while isinstance(inner := getattr(wrapper, "module", None), nn.Module):
        wrapper = inner
    return wrapper


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model of a PEFT model, with its adapters in place; else the model."""
    get_base_model = getattr(model, "get_base_model", None)
    base: Any = model if get_base_model is None else get_base_model()
    if not callable(getattr(base, "get_output_embeddings", None)):
        raise UsageError(f"{type(model).__name__} is not a transformers model; pass a causal LM")
    return base


def _require_whole(tensor: Tensor | None, family: str) -> None:
    if tensor is None:
        return
    if tensor.is_meta:
        raise UsageError(
            f"the LM head of {family} has no data (meta device); load the model without offloading"
        )
    # A DTensor says so by this attribute; a ZeRO-3 shard has no elements.
    if tensor.numel() == 0 or hasattr(tensor, "device_mesh"):
        raise UsageError(
            f"the LM head of {family} is sharded; compute the loss inside the wrapped forward "
            "(plad_fast.head.call_inside), and do not shard the head by tensor parallelism"
        )


def _softcap(config: PretrainedConfig) -> float | None:
    caps = [getattr(config, name, None) for name in _SOFTCAPS]
    return next((float(cap) for cap in caps if cap is not None), None)


def _logit_scale(config: PretrainedConfig) -> float:
    scale = 1.0
    for name in _MULTIPLIERS.keys() | _DIVISORS.keys():
        value = getattr(config, name, None)
        if value is None or value == 1:
            continue
        if config.model_type.startswith(_MULTIPLIERS.get(name, ())):
            scale *= value
        elif config.model_type.startswith(_DIVISORS.get(name, ())):
            scale /= value
        else:
            raise UsageError(
                f"config.{name} is {value}, and it is not known what {config.model_type} models "
                "do with it; this model is not supported"
            )
    return scale
