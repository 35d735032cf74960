"""Small encoder-decoder models, and a tokenizer like T5's."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from plad_fast.data.packing import PreferenceCollator
from plad_fast.models.encoder_decoder import decoder_start_token
from plad_fast.models.sharing import prepare
from tests.conftest import BOS, END

VOCAB = 262  # of the tiny tokenizer


def _t5(**options):
    config = transformers.T5Config(
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        **{"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4},
        **{"num_layers": 2, "num_decoder_layers": 3, "dropout_rate": 0.0},
        **options,
    )
    return transformers.T5ForConditionalGeneration(config)


def _t5_v1_1():
    """Gated, a head of its own, and no scale before it."""
    model = _t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    model.lm_head.weight = nn.Parameter(0.5 * torch.randn_like(model.lm_head.weight))
    return model


def _bart():
    """With positions, a bias on the logits and a start token that is also the end token."""
    config = transformers.BartConfig(
        **{"decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1},
        **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24},
        **{"decoder_ffn_dim": 24, "max_position_embeddings": 96, "init_std": 0.3, "dropout": 0.0},
    )
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


MODELS = {"t5": _t5, "t5_v1_1": _t5_v1_1, "bart": _bart}


def make_model(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tokenizer_like_t5(tiny_tokenizer, template=f"$A {END}"):
    """EOS behind every text, nothing in front, no chat template."""
    from tokenizers import processors

    made = copy.deepcopy(tiny_tokenizer)
    special = [(token, made.convert_tokens_to_ids(token)) for token in (BOS, END)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    made.chat_template = None
    return made


SEQ_2_SEQ = "SEQ_2_SEQ_LM"  # a task of peft
GROUPS = [
    {"prompt_ids": [5, 6, 7, 8, 2], "response_ids": [[9, 0, 8, 2], [3, 2], [7, 7, 7, 7, 7, 2]]},
    {"prompt_ids": [11, 2], "response_ids": [[9, 2], [3, 4, 0, 6, 2], [2]]},
]


def collate(model, groups, **options):
    return PreferenceCollator(
        0,
        len(groups[0]["response_ids"]),
        layout=prepare(model),
        decoder_start_token_id=decoder_start_token(model),
        **options,
    )(groups)


def adapt(model, targets=("q", "v", "q_proj", "v_proj"), **options):
    """Under adapters that are moved, and not their base."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **options)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter += torch.randn_like(parameter)
    return model


def own_logprobs(model, groups):
    """Of every response by `model(labels=...)`, one unpadded sequence at a time."""
    found = []
    for group in groups:
        for response in group["response_ids"]:
            labels = torch.tensor([response])
            logits = model(input_ids=torch.tensor([group["prompt_ids"]]), labels=labels).logits
            found.append(logits.log_softmax(-1).gather(2, labels[..., None])[0, :, 0])
    return found
