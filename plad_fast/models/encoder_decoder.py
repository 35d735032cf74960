"""Encoder-decoder language models: the encoder reads a prompt, the decoder writes each response.

The encoder runs once for a prompt, whatever the number of its responses: each of them attends the
same encoded prompt, and the gradients of all reach the encoder as one.

B prompts of K responses, S = B * K; T tokens of a prompt, R of a response; D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# T5 and its kin (by `model_type`), which multiply the decoder's output by d_model ** -0.5 if their
# embeddings are tied. "t5" and "longt5" of transformers 5 say so in `scale_decoder_outputs`.
_SCALED_IF_TIED = ("t5", "longt5", "mt5", "umt5", "switch_transformers")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model, or the one inside PEFT, has an encoder that reads the prompt."""
    return bool(getattr(base_model(model).config, "is_encoder_decoder", False))


def decoder_start_token(model: nn.Module) -> int | None:
    """The token before a response in the decoder; None if the model has no encoder."""
    if not is_encoder_decoder(model):
        return None
    lm = base_model(model)
    tokens = [
        getattr(lm.config, "decoder_start_token_id", None),
        getattr(lm.generation_config, "decoder_start_token_id", None),
        # T5Gemma names none and starts with the BOS token of its decoder.
        getattr(getattr(lm.config, "decoder", None), "bos_token_id", None),
    ]
    for token in tokens:
        if token is not None:
            return int(token)
    raise UsageError(
        f"{type(lm).__name__} has no decoder_start_token_id, the token before a response; set it "
        "in model.config (T5: the pad token; models of many languages: that of the language)"
    )


def decoder_hidden(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T)
    decoder_input_ids: Tensor,  # (S, R)
    decoder_attention_mask: Tensor,  # (S, R)
) -> Tensor:  # (S, R, D)
    """The decoder's last hidden states; S / B neighbours share one pass of the encoder.

    They are those before T5's scale, which `find_head` gives as the head's `logit_scale`.

    Raises:
        UsageError: the model reads no text, or has no encoder and decoder apart from its head.
    """
    lm = base_model(model)
    family = type(lm).__name__
    if lm.main_input_name != "input_ids":
        raise UsageError(f"the encoder of {family} reads {lm.main_input_name}; pass one of text")
    encoder, decoder = lm.get_encoder(), lm.get_decoder()
    if lm in (encoder, decoder) or encoder is None or decoder is None:
        raise UsageError(f"{family} has no encoder and decoder apart from its LM head")
    encoded = encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)[0]
    group_size = len(decoder_input_ids) // len(input_ids)
    output = decoder(
        input_ids=decoder_input_ids,
        # Given though causal: some decoders else take every pad token for padding, also the first.
        attention_mask=decoder_attention_mask,
        encoder_hidden_states=_for_each_response(encoded, group_size),
        encoder_attention_mask=_for_each_response(attention_mask, group_size),
        use_cache=False,
        return_dict=True,
    )
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise UsageError(
            f"{family} has no decoder apart from its LM head; this model is not supported"
        )
    return hidden


def output_scale(lm: PreTrainedModel) -> float:
    """The factor of T5 and its kin on the decoder's output before the head; others: 1."""
    config = lm.config
    if not is_encoder_decoder(lm) or config.model_type not in _SCALED_IF_TIED:
        return 1.0
    scales = getattr(config, "scale_decoder_outputs", None)
    if scales is None:
        scales = config.tie_word_embeddings and not _is_mt5_of_transformers_5(lm)
    return float(config.d_model**-0.5) if scales else 1.0


def output_bias(lm: PreTrainedModel) -> Tensor | None:  # (V,)
    """The buffer that BART and its kin add to the logits; others: None."""
    bias = getattr(lm, "final_logits_bias", None)
    return bias[0] if is_encoder_decoder(lm) and isinstance(bias, Tensor) else None


def _is_mt5_of_transformers_5(lm: PreTrainedModel) -> bool:
    """It ties without a scale."""
    import transformers

    return lm.config.model_type == "mt5" and int(transformers.__version__.split(".")[0]) >= 5


def _for_each_response(prompts: Tensor, group_size: int) -> Tensor:  # (B, ...) -> (S, ...)
    # The backward is a sum in fixed order; that of an index has atomics on CUDA.
    return prompts.unsqueeze(1).expand(-1, group_size, *prompts.shape[1:]).flatten(0, 1)
