"""The LM head of a Hugging Face model: everything between its last hidden state and its logits.

The op replaces the head's product, so all of it has to be known. Where it is not, the model is
refused by name: a wrong scale trains without complaint.

A head may be sharded over its rows by tensor parallelism, as a DTensor. FSDP2 leaves DTensors with
the same placement on its own mesh, whose ranks hold other data: taking its shards for the
vocabulary's would be wrong. The name of the mesh's dimension tells them apart, which is "tp" in
transformers and torchtitan. Under both, a weight is sharded in two dimensions, except inside the
wrapped forward, where that of tensor parallelism is left.

V vocabulary, D hidden, N tokens, r the ranks of a head's adapters together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plad_fast.errors import UsageError
from plad_fast.models.adapters import LowRank, base_model, effective_layer
from plad_fast.models.encoder_decoder import output_bias, output_scale
from plad_fast.models.wrappers import own_class

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

# Config entry -> the model families (prefixes of `model_type`) that multiply or divide by it.
_MULTIPLIERS = {
    "logit_scale": ("cohere",),
    "lm_head_multiplier": ("falcon_h1",),
    "logits_scaling": ("hyperclovax",),
    "output_multiplier": ("muse",),
}
_DIVISORS = {
    "logits_scaling": ("granite", "minicpm3"),
    "logits_mup_width_multiplier": ("inkling",),
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Models of text and more, which scale and cap as their text model would alone, and those that
# leave it out though their text model's config asks for it (prefixes of class names).
_AS_THEIR_TEXT_MODEL = (
    *("CohereCompass", "Gemma3n", "Gemma4", "Granite4Vision", "GraniteDocling"),
    *("HyperCLOVAXVision", "Inkling", "MistralLarge4", "Muse", "PaliGemma", "T5Gemma"),
)
_PLAIN = ("AyaVision", "Cohere2Vision", "Gemma3For")

_TENSOR_PARALLEL = "tp"


@dataclass(frozen=True)
class LMHead:
    """logits = softcap * tanh(logit_scale * (inputs(hidden) @ weight.T + bias) / softcap).

    An adapter on the head widens the product by its rank: `inputs` appends the columns that
    `weight` has more than the hidden size, in place of adding a (V, D) update to the weight.
    """

    weight: Tensor  # (V, D + r)
    bias: Tensor | None  # (V,)
    softcap: float | None
    """None leaves the tanh out."""
    logit_scale: float
    adapters: tuple[LowRank, ...] = ()
    group: ProcessGroup | None = None
    """Over whose ranks the rows lie, `weight` and `bias` being this rank's; None: all are here."""

    def inputs(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, D + r)
        """Hidden states as `weight` takes them, in its dtype.

        They lack it when a norm works in float32 or, under autocast, when the last layer does not;
        autocast itself is the op's business.
        """
        low = [adapter.inputs(hidden) for adapter in self.adapters]
        return torch.cat([columns.to(self.weight.dtype) for columns in (hidden, *low)], dim=-1)

    def arguments(self, hidden: Tensor) -> dict[str, Any]:  # (N, D)
        """What the ops take of a model; the vocabulary-parallel ones where there is a group."""
        return {
            **({} if self.group is None else {"group": self.group}),
            "hidden": self.inputs(hidden) if self.adapters else hidden.to(self.weight.dtype),
            "weight": self.weight,
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }


def find_head(model: nn.Module) -> LMHead:
    """The LM head of a causal or encoder-decoder LM, as the arguments the op takes.

    Call it where the weights are whole: for FSDP that is inside the wrapped forward (see
    `plad_fast.models.call_inside`), and for ZeRO-3, or a head that is sharded by itself, inside the
    head's own (see `plad_fast.models.through_head`).

    PEFT on the head is followed: a copy in `modules_to_save`, rows in `trainable_token_indices`,
    and plain LoRA, whose result is a new weight of shape (V, D + r) at every call. Its gradient is
    of that shape too: a head that is frozen but for LoRA costs the product that a frozen one saves.

    A head whose rows are sharded by tensor parallelism, on a mesh of one dimension, "tp", is one
    for the ops of `plad_fast.ops.vocab_parallel`: see `LMHead.group`.

    Args:
        model: a transformers causal or encoder-decoder LM, or a PEFT model around one.

    Raises:
        UsageError: heads that are not one plain `nn.Linear` (quantised,
            or under adapters other than those above), weights that are sharded or not loaded,
            unknown logit scales.
    """
    lm = base_model(model)
    family = own_class(lm).__name__
    head = lm.get_output_embeddings()
    if head is None:
        raise UsageError(f"{family} has no LM head; load it with AutoModelForCausalLM")
    layer = effective_layer(head, f"the LM head of {family}")
    weight, bias, group = _vocab_rows(layer.weight, layer.bias, f"the LM head of {family}")
    ups = [adapter.up for adapter in layer.adapters]
    for tensor in (*((weight, bias) if group is None else ()), *(up.weight for up in ups)):
        _require_whole(tensor, family)
    more = output_bias(lm)
    if group is not None and (ups or more is not None):
        raise UsageError(
            f"the LM head of {family} is sharded by tensor parallelism and has adapters or a "
            "further bias; leave lm_head out of the LoRA target modules"
        )
    if ups:
        weight = torch.cat([weight, *(up.weight.to(weight.dtype) for up in ups)], dim=1)
    further = [
        (adapter.scale * adapter.up.bias).to(weight.dtype)
        for adapter in layer.adapters
        if adapter.up.bias is not None
    ]
    for term in (*further, more):
        if term is not None:
            bias = term if bias is None else bias + term
    before = output_scale(lm)
    if bias is not None and before != 1:
        bias = bias / before  # it is added to what the head makes of scaled hidden states
    return LMHead(weight, bias, _softcap(lm), _logit_scale(lm) * before, layer.adapters, group)


def _require_whole(tensor: Tensor | None, family: str) -> None:
    if tensor is None:
        return
    if tensor.is_meta:
        raise UsageError(
            f"the LM head of {family} has no data (meta device); load the model without offloading"
        )
    if tensor.numel() == 0 or _is_dtensor(tensor):  # a ZeRO-3 shard has no elements
        raise UsageError(
            f"the LM head of {family} is sharded; compute the loss inside the wrapped forward "
            "(models.call_inside) and the head's own (models.through_head); for tensor parallelism "
            f"name the one dimension of its mesh {_TENSOR_PARALLEL!r}"
        )


def _softcap(lm: PreTrainedModel) -> float | None:
    config = lm.config.get_text_config()
    for name in _SOFTCAPS:
        cap = getattr(config, name, None)
        if cap is not None and _heeds(lm, name, cap):
            return float(cap)
    return None


def _logit_scale(lm: PreTrainedModel) -> float:
    config = lm.config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS.keys() | _DIVISORS.keys():
        value = getattr(config, name, None)
        if value is None or value == 1 or not _heeds(lm, name, value):
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


def _heeds(lm: PreTrainedModel, name: str, value: Any) -> bool:
    """Whether the model does what an entry of its text config says."""
    family = own_class(lm).__name__
    if lm.config is lm.config.get_text_config() or family.startswith(_AS_THEIR_TEXT_MODEL):
        return True
    if family.startswith(_PLAIN):
        return False
    raise UsageError(
        f"the text config's {name} is {value}, and it is not known what {family} does with it; "
        "this model is not supported"
    )


def is_tensor_parallel(tensor: Any, what: str = "the LM head") -> bool:
    """Whether a tensor is sharded by tensor parallelism alone.

    One that is sharded by FSDP too is refused: the head's own forward, which takes tensors apart
    for tensor parallelism as well, cannot undo that.
    """
    names = tensor.device_mesh.mesh_dim_names or () if _is_dtensor(tensor) else ()
    if len(names) > 1 and _TENSOR_PARALLEL in names:
        raise UsageError(
            f"{what} is sharded over the dimensions {names} of a mesh: call this inside the "
            "wrapped forward (plad_fast.models.call_inside), and let fully_shard take the head "
            "with the whole model, not by itself"
        )
    return names == (_TENSOR_PARALLEL,)


def _vocab_rows(
    weight: Tensor, bias: Tensor | None, what: str
) -> tuple[Tensor, Tensor | None, ProcessGroup | None]:
    """This rank's rows of a head sharded by tensor parallelism, and the group that has them all.

    Gradients come back as DTensors. Another weight is returned as it is.
    """
    if not is_tensor_parallel(weight, what):
        return weight, bias, None
    from torch.distributed.tensor import Shard

    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    local: list[Any] = []
    for tensor in (weight, bias):
        if tensor is None:
            local.append(None)
            continue
        (placement,) = getattr(tensor, "placements", ("of one device",))
        # A subclass of Shard splits in another order.
        if type(placement) is not Shard or placement.dim % tensor.ndim != 0:
            raise UsageError(
                f"{what} has a weight or bias with placement {placement}; vocabulary-parallel "
                "losses need both sharded by rows (Shard(0), which ColwiseParallel gives)"
            )
        local.append(tensor.to_local(grad_placements=[Shard(0)]))  # type: ignore[attr-defined]
    if bias is not None and bias.device_mesh != mesh:  # type: ignore[attr-defined]
        raise UsageError(f"weight and bias of {what} lie on different meshes")
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise UsageError(f"the mesh of {what} must list its ranks in ascending order, got {ranks}")
    return local[0], local[1], mesh.get_group()


def whole_hidden(
    hidden: Tensor,  # (R, T, D)
    tokens: Tensor,  # (R, T)
) -> Tensor:  # (R, T, D)
    """Hidden states of all tokens as a plain tensor; those sharded over the sequence are gathered.

    Its gradient must be whole on every rank, as it is by default of the vocabulary-parallel ops.
    """
    if hidden.shape[:2] != tokens.shape:
        raise UsageError(
            f"the hidden states have {tuple(hidden.shape[:2])} tokens, the batch "
            f"{tuple(tokens.shape)}; if they are sharded over the sequence, let the last norm take "
            "and return DTensors (SequenceParallel(use_local_output=False))"
        )
    if not _is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import Replicate, Shard

    whole = hidden.placements[0]  # type: ignore[attr-defined]
    parallel = is_tensor_parallel(hidden, "the model's hidden states")
    if not parallel or whole not in (Replicate(), Shard(1)):
        raise UsageError(
            f"the hidden states have placement {whole} on a mesh of dimensions "
            f"{hidden.device_mesh.mesh_dim_names}; "  # type: ignore[attr-defined]
            f"vocabulary-parallel losses take one dimension, {_TENSOR_PARALLEL!r}, and "
            "Replicate(), or Shard(1), over the sequence"
        )
    everywhere = hidden.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
    return everywhere.to_local(grad_placements=[Replicate()])


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")  # without loading torch.distributed.tensor
