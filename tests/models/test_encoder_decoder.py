"""T5 and BART against their own forward with labels: numbers, gradients, trainings, answers."""

from __future__ import annotations

import pytest
import torch
import transformers

from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.text_ids import TextIds
from plad_fast.errors import UsageError
from plad_fast.models.head import causal_lm_logprobs, check_architecture
from plad_fast.models.layer_drop import depth, drop_layers
from plad_fast.models.loading import load_model
from plad_fast.training.micro_batches import pack
from tests.conftest import BOS, END
from tests.support.encoder_decoders import (
    GROUPS,
    MODELS,
    SEQ_2_SEQ,
    adapt,
    collate,
    make_model,
    own_logprobs,
    tokenizer_like_t5,
)


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_gradients_equal_the_models_own(name):
    """Every parameter's, under another weight for every sequence; pad ids stand inside texts."""
    model = make_model(name)
    check_architecture(model)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
    ours = causal_lm_logprobs(model, collate(model, GROUPS))
    (ours.sums @ weight).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    theirs = own_logprobs(model, GROUPS)
    (torch.stack([each.sum() for each in theirs]) @ weight).backward()
    torch.testing.assert_close(ours.token_logprobs, torch.cat(theirs), rtol=1e-5, atol=1e-5)
    largest = max(p.grad.norm() for p in model.parameters())
    for parameter, p in model.named_parameters():
        # The bias of a key has none, since it moves all scores of a query alike: this is rounding.
        error = (gradients[parameter] - p.grad).norm()
        assert error <= 1e-5 * p.grad.norm() + 1e-7 * largest, parameter


def test_the_encoder_reads_every_prompt_once():
    """Three responses to each of two prompts: one call of two rows."""
    model, seen = make_model("t5"), []
    model.get_encoder().register_forward_hook(lambda m, args, out: seen.append(len(out[0])))
    causal_lm_logprobs(model, collate(model, GROUPS)).sums.sum().backward()
    assert seen == [2]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t5_v1_1", {"task_type": SEQ_2_SEQ}),
        ("t5_v1_1", {"lora_bias": True}),
        # T5 scales what goes into a tied head: the adapter's bias comes after that.
        ("t5", {"lora_bias": True}),
        ("bart", {"lora_bias": True}),
    ],
    ids=["untied", "bias", "tied-bias", "two-biases"],
)
def test_adapters_in_both_halves_and_on_the_head(name, options):
    targets = ("q_proj", "v_proj", "lm_head") if name == "bart" else ("q", "v", "lm_head")
    if options.get("lora_bias"):
        targets = ("lm_head",)
    model = adapt(make_model(name), targets, **options)
    check_architecture(model)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
    ours = causal_lm_logprobs(model, collate(model, GROUPS))
    theirs = own_logprobs(model, GROUPS)
    torch.testing.assert_close(ours.token_logprobs, torch.cat(theirs), rtol=1e-5, atol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = {part for n in trained for part in n.split(".")}
    assert set(["lm_head"] if len(targets) == 1 else ["encoder", "decoder", "lm_head"]) <= parts
    sums = torch.stack([each.sum() for each in theirs])
    both = [torch.autograd.grad(s @ weight, list(trained.values())) for s in (ours.sums, sums)]
    for name, got, expected in zip(trained, *both, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_decoder_reads_responses_behind_its_start():
    """Shifted by one; an empty response has no row that predicts."""
    groups = [{"prompt_ids": [5, 6], "response_ids": [[7, 8, 2], []]}]
    batch = PreferenceCollator(0, 2, layout="encoder_decoder", decoder_start_token_id=4)(groups)
    assert batch["input_ids"].tolist() == [[5, 6]]
    assert batch["decoder_input_ids"].tolist() == [[4, 7, 8], [4, 0, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["loss_rows"].tolist() == [0, 1, 2]
    assert batch["targets"].tolist() == [7, 8, 2]
    assert batch["cu_seqlens"].tolist() == [0, 3, 3]
    assert batch["group_tokens"].tolist() == [[5, 7]]


def test_two_widths_share_one_budget():
    """Encoder and decoder are padded each to its longest, wherever that comes from."""
    shapes = [(100, 2), (2, 100), (90, 4), (1, 1)]
    assert pack(shapes, 210, padded=True) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("template", "front", "back"), [(f"$A {END}", 0, 1), (f"{BOS} $A {END}", 1, 1), ("$A", 0, 0)]
)
def test_prompts_and_responses_are_texts_of_their_own(tiny_tokenizer, template, front, back):
    """Each with its special tokens, also when cut; a response always ends in EOS."""
    tokenizer = tokenizer_like_t5(tiny_tokenizer, template)
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def group(prompt, length, side="left"):
        ids = TextIds(tokenizer, encoder_decoder=True)
        return ids.encode(prompt, ["xyz", "w"], max_length=length, truncation_side=side)

    letters = tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]
    whole, left, right = group("abcdefgh", 10), group("abcdefgh", 6), group("abcdefgh", 6, "right")
    room = 6 - front - back
    assert whole["prompt_ids"] == [bos] * front + letters + [end] * back
    assert left["prompt_ids"] == [bos] * front + letters[-room:] + [end] * back
    assert right["prompt_ids"] == [bos] * front + letters[:room] + [end] * back
    assert (whole["truncated"], left["truncated"], left["fits"]) == (False, True, True)
    assert not group("abcdefgh", 3 + front)["fits"]
    xyz = tokenizer("xyz", add_special_tokens=False)["input_ids"]
    assert whole["response_ids"][0] == [bos] * front + xyz + [end]


def test_an_end_inside_of_a_response_is_no_end(tiny_tokenizer):
    bare = tokenizer_like_t5(tiny_tokenizer, "$A")
    end = bare.eos_token_id
    group = TextIds(bare, encoder_decoder=True).encode("p", [f"x{END}y"], max_length=9)
    assert group["response_ids"][0][-1] == end
    assert group["response_ids"][0].count(end) == 2


@pytest.mark.parametrize("name", MODELS)
def test_a_student_of_fewer_layers_is_the_same_when_loaded(name, tmp_path):
    model = make_model(name)
    assert depth(model) == 3
    student = drop_layers(model, 2)
    student.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    batch = collate(model, GROUPS)
    ours = causal_lm_logprobs(student, batch).token_logprobs
    torch.testing.assert_close(causal_lm_logprobs(loaded, batch).token_logprobs, ours)
    assert not torch.allclose(causal_lm_logprobs(model, batch).token_logprobs, ours)
    assert len(drop_layers(model, 1).get_encoder().state_dict()) == len(
        model.get_encoder().state_dict()
    )


def test_layers_that_cannot_be_dropped():
    with pytest.raises(UsageError, match="cannot lose these layers"):
        drop_layers(make_model("t5"), [1, 2])  # the first one has the relative positions


def _whisper():
    config = transformers.WhisperConfig(
        **{"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16},
        **{"decoder_ffn_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
        **{"decoder_start_token_id": 2, "num_mel_bins": 8},
    )
    return transformers.WhisperForConditionalGeneration(config)


def _bert_to_bert():
    half = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(half, half)
    return transformers.EncoderDecoderModel(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(_whisper, "reads input_features"), (_bert_to_bert, "no decoder apart from its LM head")],
)
def test_models_that_are_refused(make, reason):
    with pytest.raises(UsageError, match=reason):
        check_architecture(make().eval())
