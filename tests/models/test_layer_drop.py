"""A student of fewer layers is the same model when it is loaded, and leaves its teacher alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from plad_fast.errors import UsageError
from plad_fast.models.layer_drop import drop_layers
from plad_fast.models.loading import load_model

COMMON = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_LIKE = {**COMMON, "num_key_value_heads": 2}
GPT2_SHAPE = {"vocab_size": 61, "n_embd": 16, "n_layer": 5, "n_head": 2, "n_positions": 32}
MOE_SHAPE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
TOKENS = torch.arange(3, 15)[None]


def random_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True), id="llama-tied"),
        # Windows differ from layer to layer: `layer_types` has to follow the layers.
        pytest.param(Gemma2Config(**LLAMA_LIKE, head_dim=8, sliding_window=3), id="gemma2"),
        pytest.param(
            Qwen2Config(
                **LLAMA_LIKE, use_sliding_window=True, sliding_window=3, max_window_layers=2
            ),
            id="qwen2-windows",
        ),
        pytest.param(GPT2Config(**GPT2_SHAPE, bos_token_id=1, eos_token_id=2), id="gpt2"),
        pytest.param(GPTNeoXConfig(**COMMON), id="gpt-neox"),
        pytest.param(OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16), id="opt-nested"),
        # As many experts as layers: the list of experts must not be taken for the layers.
        pytest.param(
            Qwen2MoeConfig(**LLAMA_LIKE, **MOE_SHAPE, shared_expert_intermediate_size=8), id="moe"
        ),
    ],
)
def test_student_survives_saving(config, tmp_path):
    teacher = random_model(config)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = drop_layers(teacher, [0, 1, 4])
    student.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(student(TOKENS).logits, loaded(TOKENS).logits)
        # Generation reads the cache by layer number.
        assert torch.equal(
            student.generate(TOKENS, max_new_tokens=3, do_sample=False),
            loaded.generate(TOKENS, max_new_tokens=3, do_sample=False),
        )
    assert student.config.num_hidden_layers == 3
    assert teacher.config.num_hidden_layers == 5
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    owned = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert owned.isdisjoint(parameter.data_ptr() for parameter in student.parameters())


def test_tied_embeddings_stay_tied():
    student = drop_layers(random_model(LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True)), 2)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_all_layers_kept_is_the_teacher():
    teacher = random_model(LlamaConfig(**LLAMA_LIKE))
    with torch.no_grad():
        assert torch.equal(drop_layers(teacher, 5)(TOKENS).logits, teacher(TOKENS).logits)


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), ([1, 3], [1, 3])]
)
def test_which_layers_are_kept(keep, kept):
    """Evenly spaced, with the first and the last among them."""
    teacher = random_model(LlamaConfig(**LLAMA_LIKE))
    student = drop_layers(teacher, keep)
    for layer, index in zip(student.model.layers, kept, strict=True):
        ours, theirs = layer.mlp.up_proj.weight, teacher.model.layers[index].mlp.up_proj.weight
        assert torch.equal(ours, theirs)


def test_dropped_layers_are_never_copied(monkeypatch):
    """A 30-layer teacher with a 2-layer student must not need the memory of two teachers."""
    teacher = random_model(LlamaConfig(**LLAMA_LIKE))
    copied = []
    original = torch.nn.Parameter.__deepcopy__

    def spy(self, memo):
        copied.append(id(self))
        return original(self, memo)

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", spy)
    drop_layers(teacher, [0, 4])
    assert copied
    assert not {id(p) for layer in teacher.model.layers[1:4] for p in layer.parameters()} & set(
        copied
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # Every other layer has experts, told by its number: the last would lose or gain them.
        pytest.param(
            Qwen2MoeConfig(
                **LLAMA_LIKE,
                **MOE_SHAPE,
                shared_expert_intermediate_size=8,
                decoder_sparse_step=2,
            ),
            r"layers\.1\.mlp.* would differ",
            id="kind",
        ),
        # Attention is scaled by a number that the layer keeps from when it was built.
        pytest.param(
            GPT2Config(**GPT2_SHAPE, scale_attn_by_inverse_layer_idx=True),
            "scaling would differ",
            id="scale",
            marks=pytest.mark.skipif(
                transformers.__version__ < "5", reason="GPT-2 takes the layer's current number"
            ),
        ),
    ],
)
def test_a_student_its_config_cannot_rebuild_is_refused(config, message):
    """Renumbered layers would be others when the student is loaded again."""
    with pytest.raises(UsageError, match=message):
        drop_layers(random_model(config), [0, 4])


@pytest.mark.parametrize("keep", [0, 6, -1, [], [0, 0], [3, 1], [0, 5], [-1, 2]])
def test_bad_layers_are_refused(keep):
    with pytest.raises(UsageError, match="keep"):
        drop_layers(random_model(LlamaConfig(**LLAMA_LIKE)), keep)
