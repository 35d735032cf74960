"""Tiny random models of any language-model class of transformers, from shrunken default configs.

Configs call the same things by the same few names: what shrinks is a table of them. Families whose
sizes depend on each other in their own way have a line of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

VOCAB = 101
_WIDTH, _HEADS, _KV_HEADS, _HEAD_DIM, _LAYERS, _INNER, _STATE = 32, 4, 2, 8, 2, 48, 4

_NAMES: list[tuple[Any, tuple[str, ...]]] = [
    (
        VOCAB,
        ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"),
    ),
    (
        _WIDTH,
        (
            *("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "emb_dim"),
            *("word_embed_proj_dim", "lru_width", "attention_hidden_size", "embedding_dim"),
            *("input_embedding_size", "output_embedding_size", "mamba_d_ssm", "out_hidden_size"),
            *(
                "projection_dim",
                "backbone_hidden_size",
                "pronunciation_embed_dim",
                "shape_embed_dim",
            ),
            *("conv_dim", "router_hidden_size", "hidden_size_per_layer_input", "ple_embed_dim"),
        ),
    ),
    (
        _HEADS,
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "attention_heads", "num_decoder_attention_heads"),
            *("num_encoder_attention_heads", "mamba_n_heads", "n_mamba_heads", "index_n_heads"),
            *("linear_num_value_heads", "linear_num_heads", "mamba_num_heads"),
            *("swa_num_attention_heads", "num_query_groups"),
        ),
    ),
    (
        _KV_HEADS,
        (
            *(
                "num_key_value_heads",
                "num_kv_heads",
                "linear_num_key_heads",
                "swa_num_key_value_heads",
            ),
        ),
    ),
    (
        _HEAD_DIM,
        (
            *(
                "head_dim",
                "v_head_dim",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "attention_head_size",
            ),
            *("mamba_d_head", "mamba_head_dim", "mamba_headdim", "swa_head_dim", "index_head_dim"),
            *(
                "linear_key_head_dim",
                "linear_value_head_dim",
                "linear_head_dim",
                "dim_head",
                "d_head",
            ),
            *("kv_channels", "query_pre_attn_scalar", "global_head_dim", "rotary_dim"),
            *("swa_v_head_dim",),
        ),
    ),
    (
        2 * _HEAD_DIM,
        (
            *("q_lora_rank", "kv_lora_rank", "attention_head_dim", "qk_head_dim", "o_lora_rank"),
            *("laurel_rank", "hc_lowrank", "gated_norm_rank", "adapter_rank"),
        ),
    ),
    (
        _LAYERS,
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
            *("encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth", "num_blocks"),
            "num_layers_per_stack",
        ),
    ),
    (
        _INNER,
        (
            *(
                "intermediate_size",
                "n_inner",
                "ffn_dim",
                "decoder_ffn_dim",
                "encoder_ffn_dim",
                "dff",
            ),
            *(
                "ffn_hidden_size",
                "d_ff",
                "dim_ff",
                "moe_intermediate_size",
                "intermediate_size_mlp",
            ),
            *("shared_expert_intermediate_size", "expert_ffn_hidden_size", "d_inner"),
            *("shared_intermediate_size", "moe_shared_expert_intermediate_size"),
            *("dense_intermediate_size", "shared_experts_intermediate_size", "feed_forward_size"),
        ),
    ),
    (
        128,
        (
            *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
            *("max_target_positions", "max_source_positions", "model_max_length"),
        ),
    ),
    (
        4,
        (
            *("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts"),
            *("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"),
            *("chunk_size", "mamba_chunk_size", "sliding_window", "window_size", "zero_expert_num"),
            *("attention_window_size", "sliding_window_size"),
        ),
    ),
    (2, ("num_experts_per_tok", "moe_topk", "moe_k")),
    (1, ("n_group", "topk_group", "mamba_n_groups", "n_groups", "num_logits_to_keep")),
    (0.2, ("initializer_range", "init_std")),
]
SIZES = {name: value for value, names in _NAMES for name in names}

# Neutral by default in some configs, where leaving it out would not show.
_BITING = {
    **dict.fromkeys(("logits_scaling", "logits_mup_width_multiplier"), 4.0),
    **dict.fromkeys(("logit_scale", "lm_head_multiplier", "output_multiplier"), 0.25),
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 2.0),
}

_FOUR_LAYERS = {"num_hidden_layers": 4}  # the first one that attends is the fourth, or so


def _three_axes(*sections: int) -> dict[str, Any]:
    """Of rotary positions in time, height and width; in all they make half of a head."""
    axes = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": axes}


_DEEP_TEXT = {"text_config": _FOUR_LAYERS}
_AXES_OF_TEXT = {"text_config": _three_axes(2, 1, 1)}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_expand": 2, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_expand": 2, "mamba_d_head": 16},
    "falcon_h1": {"mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": _HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": _HEAD_DIM},
    "ministral": {"head_dim": _HEAD_DIM},
    "nemotron": {"head_dim": _HEAD_DIM, "num_key_value_heads": _KV_HEADS},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "mamba2": {"num_heads": 8},
    "mpt": {"logit_scale": None},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["full_attention"] * _LAYERS, "num_dense_layers": 1},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "blt": {"vocab_size": VOCAB},
    "zaya": {"num_experts_per_tok": 1},
    "codegen": {"rotary_dim": 4},
    **dict.fromkeys(
        ("bailing_hybrid", "kimi_linear", "lfm3", "qwen3_5_moe_text", "qwen3_5_text"),
        _FOUR_LAYERS,
    ),
    **dict.fromkeys(("qwen3_next", "qwen4_exp_text", "recurrent_gemma"), _FOUR_LAYERS),
    **dict.fromkeys(("lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _DEEP_TEXT),
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl"), _AXES_OF_TEXT),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl"), _AXES_OF_TEXT),
    "glm4v_moe": {"text_config": _three_axes(1, 1, 0)},
}
"""model_type -> what its own checks or kernels ask for."""


def _has(config: Any, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except Exception:  # an entry that differs from layer to layer
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shrunk(config_class: Any, extra: dict[str, Any]) -> Any:
    default = config_class()
    entries = default.to_dict()
    known = set(entries) | set(getattr(config_class, "attribute_map", {}))
    options = {n: size for n, size in SIZES.items() if n in known and _has(default, n)}
    if "kv_lora_rank" in known:  # latent attention expands its keys to all heads
        options["num_key_value_heads"] = _HEADS
    options |= {n: value for n, value in _BITING.items() if n in known}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
    options |= {n: token for n, token in tokens.items() if n in known}
    rates = ("dropout", "pdrop", "layerdrop")
    options |= {
        n: type(rate)(0) for n, rate in entries.items() if n.endswith(rates) and _is_number(rate)
    }
    extra = dict(extra)
    nested = getattr(config_class, "sub_configs", {}) or [
        n for n, value in vars(default).items() if isinstance(value, transformers.PretrainedConfig)
    ]  # T5Gemma's of transformers 4 does not say which they are
    for name in nested:
        sub = getattr(default, name, None)
        if sub is not None:
            options[name] = _shrunk(type(sub), extra.pop(name, {})).to_dict()
    return config_class(**{**options, **extra})


def causal_lm_families() -> dict[str, str]:
    """model_type -> class name, of what `AutoModelForCausalLM` loads."""
    return dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_causal_lm(model_type: str, class_name: str, *, is_decoder: bool = True) -> Any:
    """The same small model every time, in evaluation mode; vectors moved off zeros and ones.

    `is_decoder` makes a decoder of what is by default an encoder, or one half of two.
    """
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class or type(transformers.CONFIG_MAPPING[model_type]())
    config = _shrunk(config_class, SPECIAL.get(model_type, {}))
    if is_decoder and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if config.is_encoder_decoder and not is_decoder and not hasattr(config, "decoder"):
        config.decoder_start_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def has_family(model_type: str) -> bool:
    """Whether the installed transformers knows it."""
    return model_type in causal_lm_families()
