"""Random models of a few thousand weights, one for each way an architecture attends.

Windows are shorter than the prompts of the tests, caps are low enough to bite, and the vectors
that are created as zeros and ones (biases, norms, sinks) are moved: what a test cannot see there
it would not see at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB = 97
WINDOW = 4

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EVERY_OTHER = ["sliding_attention", "full_attention", "sliding_attention"]


def _causal_lm(family: str, /, *, without: tuple[str, ...] = (), **options: Any) -> Any:
    """`family`ForCausalLM from a config of that family: Llama's entries, less `without`."""
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    entries = {key: value for key, value in _LLAMA_LIKE.items() if key not in without}
    config = getattr(transformers, config_name)(**{**entries, **options})
    return getattr(transformers, f"{family}ForCausalLM")(config)


def longrope_llama(length: int, **options: Any) -> Any:
    """A Llama with other rotary frequencies in batches that have a row of more than that."""
    rope = {"rope_type": "longrope", "factor": 2.0}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    own = {"original_max_position_embeddings": length}
    if transformers.__version__ >= "5":
        rope |= {**own, "rope_theta": 10000.0}
        return _causal_lm("Llama", rope_parameters={**rope, **factors}, **options)
    return _causal_lm("Llama", **own, rope_scaling={**rope, **factors}, **options)


def _of_gpt2_kind(family: str, /, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options
    )
    return getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(
        config
    )


SHARED: dict[str, Callable[[], Any]] = {
    "llama": lambda: _causal_lm("Llama"),
    "qwen2": lambda: _causal_lm("Qwen2"),
    "qwen2_window": lambda: _causal_lm(
        "Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: _causal_lm("Qwen3", head_dim=8),
    "gemma2": lambda: _causal_lm(
        "Gemma2",
        head_dim=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=4,
    ),
    "gemma3": lambda: _causal_lm(
        "Gemma3", head_dim=8, sliding_window=WINDOW, layer_types=_EVERY_OTHER
    ),
    "mistral": lambda: _causal_lm("Mistral", sliding_window=WINDOW),
    "gpt_neox": lambda: _causal_lm("GPTNeoX", without=("num_key_value_heads",), rotary_pct=0.5),
    "gpt2": lambda: _of_gpt2_kind(
        "GPT2",
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=256,
        initializer_range=0.3,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
    "phi3": lambda: _causal_lm("Phi3", sliding_window=WINDOW),
    "gpt_oss": lambda: _causal_lm(
        "GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
}
"""Models that take packed rows and shared prompts."""

PADDED: dict[str, Callable[[], Any]] = {
    "gpt_neo": lambda: _of_gpt2_kind(
        "GPTNeo",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=128,
        initializer_range=0.3,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
    ),
    "mamba": lambda: _of_gpt2_kind("Mamba", hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent_gemma": lambda: _causal_lm(
        "RecurrentGemma", lru_width=32, attention_window_size=WINDOW, head_dim=8
    ),
    "bloom": lambda: _of_gpt2_kind("Bloom", hidden_size=32, n_layer=2, n_head=4),
    "falcon_alibi": lambda: _of_gpt2_kind(
        "Falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}
"""Models that bypass the attention interface, recur, or have ALiBi."""


def make_model(name: str) -> Any:
    """The model of that name with the same weights every time, in training mode."""
    make = SHARED.get(name) or PADDED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.train()
