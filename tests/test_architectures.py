"""A random small model of every causal-LM class of transformers: right, or refused with a reason.

Log-probabilities of the fused path, padded and (where `prepare` finds the model able) with shared
prompts, equal those of the model's own logits for each sequence alone. Scales and softcaps are set
to values that bite. A family that no table names has to be right in both layouts.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from plad_fast.errors import UsageError
from plad_fast.head import causal_lm_logprobs, check_head
from plad_fast.packing import PreferenceCollator
from plad_fast.sharing import prepare
from tests.test_head import naive_sums
from tests.tiny_configs import causal_lm_families, make_causal_lm

FEATURES = [
    {"prompt_ids": [11, 5, 9, 17, 23, 8], "response_ids": [[12, 7, 99, 13], [33, 22]]},
    {"prompt_ids": [21, 60], "response_ids": [[44, 8, 15, 16, 23, 25], [42, 29]]},
]
MORE = "does more to its logits"  # a dense layer and a norm, in most of these
NOT_CAUSAL = "it is not a causal model"
SEVERAL_HEADS = "ModuleList"
REFUSED = {
    **dict.fromkeys(
        [
            "bert",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "modernbert-decoder",
            "prophetnet",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ],
        MORE,
    ),
    **dict.fromkeys(
        [
            "cpmant",
            "xlm",
            "xlnet",
        ],
        NOT_CAUSAL,
    ),
    **dict.fromkeys(
        [
            "musicgen",
            "musicgen_melody",
        ],
        SEVERAL_HEADS,
    ),
}
"""model_type -> why `check_head` or `find_head` refuses it."""

OWN_ATTENTION = "does not use transformers' attention interface"
OWN_POSITIONS = "other log-probabilities in the shared layout"
OTHER_LAYERS = "has layers of the kind"
SOME_LAYERS = r"of the \d layers of"
PADDED_ONLY = {
    **dict.fromkeys(
        [
            "axk2",
            "bamba",
            "deepseek_v32",
            "deepseek_v4",
            "falcon_h1",
            "falcon_mamba",
            "glm_moe_dsa",
            "hy_v4",
            "inkling2_text",
            "inkling_text",
            "jamba",
            "lfm3",
            "llama4",
            "llama4_text",
            "mamba",
            "mamba2",
            "minimax",
            "nemotron_h",
            "olmo_hybrid",
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen3_next",
            "recurrent_gemma",
            "zaya",
        ],
        OTHER_LAYERS,
    ),
    **dict.fromkeys(
        [
            "bloom",
            "codegen",
            "falcon",
            "got_ocr2",
            "gpt_neo",
            "gpt_neox_japanese",
            "gptj",
            "mpt",
            "mvp",
            "openai-gpt",
            "rwkv",
            "trocr",
            "xglm",
        ],
        OWN_ATTENTION,
    ),
    **dict.fromkeys(
        [
            "bart",
            "blenderbot",
            "blenderbot-small",
            "doge",
            "marian",
            "mbart",
            "pegasus",
            "plbart",
        ],
        OWN_POSITIONS,
    ),
    **dict.fromkeys(
        [
            "diffllama",
            "git",
            "nemotron",
            "stablelm",
        ],
        SOME_LAYERS,
    ),
    "bigbird_pegasus": "asks for attention that is not causal",
    "mllama": "targets must lie in",
    "moshi": "keeps the width of its sliding window",
    "phi4_multimodal": "has convolutions",
}
"""model_type -> why `prepare` leaves prompts unshared."""

SIZES = "its sizes depend on each other in a way of its own"
NOT_BUILT = {
    **dict.fromkeys(
        [
            "bailing_hybrid",
            "cohere_compass_text",
            "dbrx",
            "deepseek_v2",
            "dots1",
            "dots3_note",
            "dots3_note_text",
            "granitemoehybrid",
            "kimi_linear",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen4_exp",
            "qwen4_exp_text",
            "reformer",
            "xlstm",
            "zamba",
            "zamba2",
        ],
        SIZES,
    ),
    **dict.fromkeys(
        [
            "blt",
            "hrm_text",
        ],
        "its levels are configured apart",
    ),
    **dict.fromkeys(
        [
            "gemma4_assistant",
            "gemma4_unified_assistant",
        ],
        "drafts tokens for another model, whose cache it reads",
    ),
    "gemma3n": "needs timm",
    "xmod": "needs a language to be chosen",
}
"""model_type -> why it is not in the sweep."""

# Small and known ones, and each way to scale, to cap, to share or not, and to be refused.
IN_EVERY_RUN = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "gpt_oss",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "mistral",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "cohere",
    "granite",
    "hyperclovax",
    "falcon_h1",
    "minicpm3",
    "inkling_text",
    "nanochat",
    "recurrent_gemma",
    "mamba",
    "starcoder2",
    "smollm3",
    "deepseek_v3",
    "llama4_text",
    "bart",
    "bert",
    "cpmant",
    "xlnet",
]


def sweep():
    for model_type in causal_lm_families():
        if model_type not in NOT_BUILT:
            marks = () if model_type in IN_EVERY_RUN else pytest.mark.slow
            yield pytest.param(model_type, marks=marks)


@pytest.mark.parametrize("model_type", sweep())
def test_fused_log_probs_are_those_of_the_models_own_logits(model_type):
    try:
        model = make_causal_lm(model_type, causal_lm_families()[model_type])
    except Exception as error:
        if int(transformers.__version__.split(".")[0]) >= 5:
            raise
        pytest.skip(f"this transformers builds none: {error}")
    batch = PreferenceCollator(pad_token_id=0, group_size=2)(FEATURES)
    if model_type in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[model_type]):
            check_head(model)
        return
    check_head(model)
    with torch.no_grad():
        expected = naive_sums(model, batch)
        found = causal_lm_logprobs(model, batch).sums
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        if model_type in PADDED_ONLY:
            with pytest.raises(UsageError, match=PADDED_ONLY[model_type]):
                prepare(model, "shared")
            return
        try:
            assert prepare(model, "shared") == "shared"
        except UsageError:
            if int(transformers.__version__.split(".")[0]) >= 5:
                raise
            return  # older classes have an attention of their own more often
        shared = PreferenceCollator(0, 2, layout="shared")(FEATURES)
        found = causal_lm_logprobs(model, shared).sums
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
