"""A Hugging Face language model run up to its LM head, and the op in place of the head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model
from plad_fast.models.encoder_decoder import decoder_hidden, is_encoder_decoder
from plad_fast.models.lm_head import find_head, is_tensor_parallel, whole_hidden
from plad_fast.models.wrappers import call_inside
from plad_fast.ops.logprobs import linear_sequence_logprobs
from plad_fast.ops.reference import reference_logits
from plad_fast.ops.vocab_parallel.api import vocab_parallel_sequence_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plad_fast.data.packing import PreferenceBatch
    from plad_fast.ops.logprobs import SequenceLogProbs

Result = TypeVar("Result")


def backbone_hidden(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    **inputs: Any,
) -> Tensor:  # (B, T, D)
    """The hidden states that the LM head would see, without running the head.

    Raises:
        UsageError: the model has no backbone apart from its head, or an encoder; see
            `plad_fast.models.encoder_decoder.decoder_hidden`.
    """
    lm = base_model(model)
    if is_encoder_decoder(lm):
        raise UsageError(
            f"{type(lm).__name__} is an encoder-decoder model, which reads prompt and response "
            "apart; use plad_fast.models.encoder_decoder.decoder_hidden"
        )
    output = find_backbone(lm)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        return_dict=True,
        **inputs,
    )
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise UsageError(
            f"the backbone of {type(lm).__name__} returns no hidden states; this model is not "
            "supported"
        )
    return hidden


def find_backbone(lm: PreTrainedModel) -> nn.Module:
    """The part of a causal LM whose last hidden states its LM head reads."""
    backbone = lm.base_model
    if backbone is lm:  # Gemma 3 of transformers 4
        backbone = lm.get_decoder()
    if backbone is lm:  # Llama 4, whose text model alone has another name than its prefix says
        backbone = getattr(lm, "model", None)
    if backbone is lm or not isinstance(backbone, nn.Module):
        raise UsageError(f"{type(lm).__name__} has no backbone apart from its LM head")
    return backbone


def check_architecture(model: nn.Module) -> None:
    """Runs four tokens through the model and through `find_head`: the logits must agree.

    Nor may padding change hidden states, or tokens see those that come after them.

    This settles what names in a config cannot, for architectures this library has never seen.
    The model must be whole, on its device, and not wrapped. It costs a few forward passes.

    Raises:
        UsageError: they do not agree, or as in `find_head`.
    """
    head, family = find_head(model), type(base_model(model)).__name__
    if head.group is not None:
        raise UsageError(
            f"the LM head of {family} is sharded by tensor parallelism, which trainers lack, "
            "but plad_fast.models.causal_lm_logprobs and the ops of plad_fast.ops.vocab_parallel"
        )
    input_ids = torch.arange(4, device=head.weight.device).remainder(len(head.weight))[None]

    def logits() -> Tensor:  # (4, V)
        return model(**_inputs(model, input_ids)).logits[0].float()

    try:
        with evaluating(model), torch.no_grad():
            if is_encoder_decoder(model):  # its halves say best what they lack
                hidden, expected = _hidden(model, input_ids)[0], logits()
            else:
                expected, hidden = logits(), _hidden(model, input_ids)[0]
            _require_causal(model, input_ids)
            arguments = head.arguments(hidden)
            found = reference_logits(**arguments).float()
    except UsageError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # one asks for pixels, say
        raise UsageError(
            f"{family} does not run on token ids alone ({type(error).__name__}: {error}); this "
            "model is not supported"
        ) from error
    if not expected.isfinite().all():
        raise UsageError(
            f"the logits of {family} are not finite: its weights are broken, or too large for "
            f"{head.weight.dtype}; load it again, in bf16 or float32"
        )
    if _agree(found, expected):
        return
    without_bias = reference_logits(**{**arguments, "bias": None}).float()
    if head.bias is not None and _agree(without_bias, expected):
        raise UsageError(
            f"{family} has a bias in its head, and its logits go without, as PEFT's trainable "
            "tokens leave it out: the loss would be of another model than the one you began with; "
            "leave lm_head out of trainable_token_indices, or untie the head from the embeddings"
        )
    raise UsageError(
        f"{family} does more to its logits than the fused loss knows (a scale, a further layer, a "
        "cut vocabulary); this model is not supported"
    )


def _agree(found: Tensor, expected: Tensor) -> bool:
    # A wrong scale or a left-out layer is off by far more than 16-bit rounding.
    return expected.shape == found.shape and torch.allclose(
        found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())
    )


def _inputs(model: nn.Module, input_ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    """Arguments of a forward; an encoder reads the last row, and the decoder answers with each."""
    if not is_encoder_decoder(model):
        return {"input_ids": input_ids, "attention_mask": mask}
    mask = torch.ones_like(input_ids) if mask is None else mask  # or some take pads for padding
    return {
        "input_ids": input_ids[-1:],
        "attention_mask": mask[-1:],
        "decoder_input_ids": input_ids,
        "decoder_attention_mask": mask,
    }


def _hidden(model: nn.Module, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    run = decoder_hidden if is_encoder_decoder(model) else backbone_hidden
    return run(model, **_inputs(model, input_ids, mask))


def _require_causal(model: nn.Module, input_ids: Tensor) -> None:  # (1, 4)
    """Two tokens alone, before others, and before padding: the same hidden states."""
    alone, twice = _hidden(model, input_ids[:, :2])[0], input_ids.repeat(2, 1)
    mask = torch.ones_like(twice)
    mask[1, 2:] = 0
    for row in _hidden(model, twice, mask):
        # In the mean, and roughly: rounding differs with the shape, and may choose other experts.
        if (row[:2] - alone).abs().mean() > 0.1 * alone.abs().mean():
            raise UsageError(
                f"{type(base_model(model)).__name__} lets tokens see padding, or those that come "
                "after them; it is not a causal model, and is not supported"
            )


def causal_lm_logprobs(
    model: nn.Module,
    batch: PreferenceBatch,
    *,
    length_normalization: float = 0.0,
    **options: Any,
) -> SequenceLogProbs:
    """Log-probability of every response in a batch under the model, differentiable.

    A head whose rows are sharded by tensor parallelism stays so, and every rank gets the result:
    `plad_fast.ops.vocab_parallel.api.vocab_parallel_sequence_logprobs` is used in place of
    `linear_sequence_logprobs`.

    Args:
        model: a causal or encoder-decoder LM; see `find_head` for which.
        batch: from `PreferenceCollator`, on the model's device; a packed one needs
            `plad_fast.models.sharing.prepare(model)` once.
        length_normalization: alpha in sum / count ** alpha.
        **options: `temperature`, `impl` and so on of `linear_sequence_logprobs`.
    """

    def op(**arguments: Any) -> SequenceLogProbs:
        function: Callable[..., SequenceLogProbs] = linear_sequence_logprobs
        if "group" in arguments:
            function = vocab_parallel_sequence_logprobs
        return function(**arguments, length_normalization=length_normalization, **options)

    return through_head(model, batch, op)


def through_head(model: nn.Module, batch: PreferenceBatch, op: Callable[..., Result]) -> Result:
    """Runs the backbone, and `op` in place of the head's forward.

    What shards the head apart from the model around it (ZeRO-3, a `fully_shard` of its own) has it
    whole in that forward only, and in the backward through what that forward returns. The forward
    of a head that tensor parallelism shards splits its input and joins its output, and is left out.

    Args:
        model: a causal or encoder-decoder LM, not wrapped; see `call_inside`.
        batch: from `PreferenceCollator`, on the model's device.
        op: called with what `head_arguments` returns.
    """
    rows = _predicting_rows(model, batch)
    head = base_model(model).get_output_embeddings()

    def forward(rows: Tensor) -> Result:
        return op(**_arguments(model, rows, batch))

    if head is None or is_tensor_parallel(getattr(head, "weight", None)):
        return forward(rows)
    return call_inside(head, head, forward, rows)


def head_arguments(model: nn.Module, batch: PreferenceBatch) -> dict[str, Any]:
    """Runs the backbone and gathers what both ops take of model and batch.

    For heads that are whole by themselves, see `through_head`. For one that is sharded by tensor
    parallelism there is a `group` too, and the ops are those of `plad_fast.ops.vocab_parallel.api`.
    """
    return _arguments(model, _predicting_rows(model, batch), batch)


def _predicting_rows(model: nn.Module, batch: PreferenceBatch) -> Tensor:  # (N, D)
    tokens = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]
    hidden = whole_hidden(batch_hidden(model, batch), tokens)
    if "row_layout" in batch:
        return batch["row_layout"].predicting(hidden)
    return hidden.flatten(0, 1).index_select(0, batch["loss_rows"])


def _arguments(model: nn.Module, rows: Tensor, batch: PreferenceBatch) -> dict[str, Any]:
    return {
        **find_head(model).arguments(rows),
        "targets": batch["targets"],
        "cu_seqlens": batch["cu_seqlens"],
    }


def batch_hidden(model: nn.Module, batch: PreferenceBatch) -> Tensor:  # (R, T, D)
    """Hidden states of a batch in any layout."""
    family = type(base_model(model)).__name__
    if is_encoder_decoder(model) != ("decoder_input_ids" in batch):
        raise UsageError(
            f"the batch and {family} do not go together: layout "
            "'encoder_decoder' is for encoder-decoder models, which take no other; collate with "
            "what plad_fast.models.sharing.prepare(model) returns"
        )
    if "decoder_input_ids" in batch:
        answers = batch["decoder_input_ids"], batch["decoder_attention_mask"]
        return decoder_hidden(model, batch["input_ids"], batch["attention_mask"], *answers)
    if "row_layout" not in batch:
        return backbone_hidden(model, batch["input_ids"], batch["attention_mask"])
    from plad_fast.models.attention.register import (  # brings in transformers
        is_enabled,
        packed_forward,
    )

    if not is_enabled(base_model(model)):
        raise UsageError(
            "the batch is packed and the model's attention does not know packed rows; call "
            "plad_fast.models.sharing.prepare(model) first, or collate with layout='padded'"
        )
    with packed_forward():
        return backbone_hidden(
            model,
            batch["input_ids"],
            position_ids=batch["position_ids"],
            row_layout=batch["row_layout"],
        )


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
