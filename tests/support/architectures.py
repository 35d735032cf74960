"""Every language-model class of transformers, and what this library makes of it.

These are the expectations of tests/models/test_architectures.py, which builds a small random model
of each class, and the content of docs/supported-models.md. An architecture that no table names must
be right, and where prompts can be shared at all, with shared prompts too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.models.auto import modeling_auto

CAUSAL, TWO_HALVES, MORE_THAN_TEXT = "causal", "encoder-decoder", "text and more"


class Architecture(NamedTuple):
    """A model type of transformers, and the class that makes a language model of it."""

    kind: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return self.model_type if self.kind == CAUSAL else f"{self.kind}-{self.model_type}"


class Reason(NamedTuple):
    """Why something is not done: a pattern for the message of the error, and words for a reader."""

    message: str
    words: str


def _all(reason: Any, *model_types: str) -> dict[str, Any]:
    return dict.fromkeys(model_types, reason)


_MORE = Reason("does more to its logits", "has further layers before its head, or a cut vocabulary")
_NOT_CAUSAL = Reason("it is not a causal model", "lets tokens see padding or later ones")
_SEVERAL_HEADS = Reason("ModuleList", "has several heads, one for each codebook")
_NO_PLAIN_HEAD = Reason("needs a plain nn.Linear", "has a head that is not a linear layer")
_NO_HEAD = Reason("has no LM head", "has no LM head of its own")
_ASKS_FOR_MORE = Reason(
    "does not run on token ids alone", "does not run without images or the like"
)
_READS_OTHERS = Reason("reads .*; pass one of text", "has an encoder that does not read text")
_NO_HIDDEN = Reason("returns no hidden states", "keeps its head inside its backbone")
_ENCODER_AND_MODEL = Reason("no decoder apart from its LM head", "has a whole model as its decoder")
_UNKNOWN_SCALE = Reason(
    "it is not known what", "may or may not scale logits as its text model does"
)

REFUSED: dict[str, dict[str, Reason]] = {
    CAUSAL: {
        **_all(_MORE, "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
        **_all(_MORE, "megatron-bert", "modernbert-decoder", "prophetnet", "rembert", "roberta"),
        **_all(_MORE, "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
        **_all(_MORE, "xlm-roberta-xl"),
        **_all(_NOT_CAUSAL, "cpmant", "xlm", "xlnet"),
        **_all(_SEVERAL_HEADS, "musicgen", "musicgen_melody"),
    },
    TWO_HALVES: {
        "encoder-decoder": _ENCODER_AND_MODEL,
        "fsmt": _NO_PLAIN_HEAD,
        "prophetnet": _MORE,
        **_all(_READS_OTHERS, "pix2struct", "pp_formulanet", "vision-encoder-decoder"),
        "udop": _ASKS_FOR_MORE,
    },
    MORE_THAN_TEXT: {
        **_all(_ASKS_FOR_MORE, "blip-2", "instructblip", "instructblipvideo", "kosmos-2"),
        "voxtral_realtime": _ASKS_FOR_MORE,
        **_all(_NO_HEAD, "blip", "pi0"),
        **_all(_UNKNOWN_SCALE, "granite_speech", "granite_speech_plus"),
        "idefics": _NO_PLAIN_HEAD,
        "kosmos-2.5": _NO_HIDDEN,
        "paligemma": _NOT_CAUSAL,
    },
}
"""Kind -> model type -> why `check_architecture` or `find_head` refuses it."""

_OWN_ATTENTION = Reason(
    "does not use transformers' attention interface", "has an attention of its own"
)
_OWN_POSITIONS = Reason(
    "other log-probabilities in the shared layout", "has positions of its own, or an odd attention"
)
_OTHER_LAYERS = Reason(
    "has layers of the kind", "recurs, convolves or attends in a way that packed rows do not have"
)
_SOME_LAYERS = Reason(
    r"of the \d layers of", "does not ask transformers' attention interface once a layer"
)

PADDED_ONLY: dict[str, dict[str, Reason]] = {
    CAUSAL: {
        **_all(_OTHER_LAYERS, "axk2", "bamba", "deepseek_v32", "deepseek_v4", "falcon_h1"),
        **_all(_OTHER_LAYERS, "falcon_mamba", "glm_moe_dsa", "hy_v4", "inkling2_text"),
        **_all(_OTHER_LAYERS, "inkling_text", "jamba", "lfm3", "llama4", "llama4_text", "mamba"),
        **_all(_OTHER_LAYERS, "mamba2", "minimax", "nemotron_h", "olmo_hybrid"),
        **_all(_OTHER_LAYERS, "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
        **_all(_OTHER_LAYERS, "recurrent_gemma", "zaya"),
        **_all(_OWN_ATTENTION, "bloom", "codegen", "falcon", "got_ocr2", "gpt_neo"),
        **_all(_OWN_ATTENTION, "gpt_neox_japanese", "gptj", "mpt", "mvp", "openai-gpt", "rwkv"),
        **_all(_OWN_ATTENTION, "trocr", "xglm"),
        **_all(_OWN_POSITIONS, "bart", "blenderbot", "blenderbot-small", "doge", "marian"),
        **_all(_OWN_POSITIONS, "mbart", "pegasus", "plbart"),
        **_all(_SOME_LAYERS, "diffllama", "git", "nemotron", "stablelm"),
        "bigbird_pegasus": Reason(
            "asks for attention that is not causal", "asks for attention that is not causal"
        ),
        "moshi": Reason(
            "keeps the width of its sliding window", "keeps its sliding window to itself"
        ),
        "phi4_multimodal": Reason("has convolutions", "has convolutions beside its layers"),
    },
    MORE_THAN_TEXT: {
        **_all(_OTHER_LAYERS, "inkling_mm_model", "lfm3_vl", "minicpm_ocr", "minicpmv4_6"),
        **_all(_OTHER_LAYERS, "minicpmv4_7", "mistral_large4", "unlimited_ocr"),
        "pp_chart2table": _OWN_ATTENTION,
    },
}
"""Kind -> model type -> why `prepare` leaves prompts unshared."""

_SIZES = "its sizes depend on each other in a way of its own"
_LEVELS = "its levels are configured apart"
_DRAFTS = "drafts tokens for another model, whose cache it reads"
_TIMM = "needs timm"
_LACKS = "its default config lacks what its forward reads"
_NOT_IN_TURN = "fills in blocks of tokens, not one after the other"

NOT_BUILT: dict[str, dict[str, str]] = {
    CAUSAL: {
        **_all(_SIZES, "bailing_hybrid", "cohere_compass_text", "dbrx", "deepseek_v2", "dots1"),
        **_all(_SIZES, "dots3_note", "dots3_note_text", "granitemoehybrid", "kimi_linear"),
        **_all(_SIZES, "qwen3_5", "qwen3_5_moe", "qwen4_exp", "qwen4_exp_text", "reformer"),
        **_all(_SIZES, "xlstm", "zamba", "zamba2"),
        **_all(_LEVELS, "blt", "hrm_text"),
        **_all(_DRAFTS, "gemma4_assistant", "gemma4_unified_assistant"),
        "gemma3n": _TIMM,
        "xmod": "needs a language to be chosen",
    },
    TWO_HALVES: {"florence2": _SIZES},
    MORE_THAN_TEXT: {
        **_all(_SIZES, "chameleon", "cohere_compass", "cosmos3_edge", "deepseek_ocr2"),
        **_all(_SIZES, "ernie4_5_vl_moe", "glm5_next", "granite4_vision", "hunyuan_vl"),
        **_all(_SIZES, "inkling2", "mistral4", "molmo2", "muse_spark", "nemo_speechlm"),
        **_all(_SIZES, "nemotron_h_omni", "vibevoice_asr"),
        **_all(_LACKS, "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "step3p7"),
        **_all(_TIMM, "fast_vlm", "perception_lm"),
        "diffusion_gemma": _NOT_IN_TURN,
    },
}
"""Kind -> model type -> why it is not in the sweep."""

_CAPACITY = "its experts take a limited number of tokens, so that other rows of a batch matter"
_LANGUAGE = "its start token is the mark of a language: set `decoder_start_token_id`"
NOTES: dict[str, dict[str, str]] = {
    TWO_HALVES: {
        **_all(_CAPACITY, "nllb-moe", "switch_transformers"),
        **_all(_LANGUAGE, "m2m_100", "mbart", "plbart", "seamless_m4t", "seamless_m4t_v2"),
    }
}
"""Kind -> model type -> what else is to be known."""

TWO_HALVES_TYPES = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "florence2"),
    *("fsmt", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus"),
    *("pegasus_x", "pix2struct", "plbart", "pp_formulanet", "prophetnet", "seamless_m4t"),
    *("seamless_m4t_v2", "switch_transformers", "t5", "t5gemma", "t5gemma2", "udop", "umt5"),
    "vision-encoder-decoder",
)


def architectures() -> list[Architecture]:
    """All of the installed transformers, by kind and name."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    others = {
        **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    found = [Architecture(CAUSAL, *item) for item in causal.items()]
    for model_type, class_name in others.items():
        if model_type in TWO_HALVES_TYPES:
            found.append(Architecture(TWO_HALVES, model_type, class_name))
        elif model_type not in causal:
            found.append(Architecture(MORE_THAN_TEXT, model_type, class_name))
    return sorted(found)


def entry(table: dict[str, dict[str, Any]], architecture: Architecture) -> Any:
    """What a table says of an architecture, or None."""
    return table.get(architecture.kind, {}).get(architecture.model_type)


RIGHT_SHARED, RIGHT_PADDED = "right, prompts shared", "right, rows padded"
RIGHT_HALVES = "right, one encoding a prompt"
REFUSED_BY_NAME, NOT_TRIED = "refused", "not tried"


def result(architecture: Architecture) -> tuple[str, str]:
    """What is expected of an architecture, and a note on it."""
    if (why := entry(NOT_BUILT, architecture)) is not None:
        return NOT_TRIED, why
    if (reason := entry(REFUSED, architecture)) is not None:
        return REFUSED_BY_NAME, reason.words
    note = entry(NOTES, architecture) or ""
    if architecture.kind == TWO_HALVES:
        return RIGHT_HALVES, note
    if (reason := entry(PADDED_ONLY, architecture)) is not None:
        return RIGHT_PADDED, reason.words
    return RIGHT_SHARED, note
