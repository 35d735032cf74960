"""A random small model of every language-model class of transformers: right, or refused.

Log-probabilities of the fused path, padded and (where `prepare` finds the model able) with shared
prompts, equal those of the model's own logits for each sequence alone. Scales and softcaps are set
to values that bite. tests/support/architectures.py says what is expected of which.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.encoder_decoder import decoder_start_token
from plad_fast.models.head import causal_lm_logprobs, check_architecture
from plad_fast.models.lm_head import find_head
from plad_fast.models.sharing import prepare
from tests.models.test_head import naive_sums
from tests.support.architectures import (
    CAUSAL,
    MORE_THAN_TEXT,
    NOT_BUILT,
    NOTES,
    PADDED_ONLY,
    REFUSED,
    REFUSED_BY_NAME,
    TWO_HALVES,
    architectures,
    entry,
    result,
)
from tests.support.tiny_configs import SPECIAL, make_causal_lm

IS_NEW = int(transformers.__version__.split(".")[0]) >= 5
FEATURES = [
    {"prompt_ids": [11, 5, 9, 17, 23, 8], "response_ids": [[12, 7, 99, 13], [33, 22]]},
    {"prompt_ids": [21, 60], "response_ids": [[44, 8, 15, 16, 23, 25], [42, 29]]},
]

# Small and known ones, and each way to scale, to cap, to share or not, and to be refused.
IN_EVERY_RUN = [
    *("llama", "qwen2", "qwen3", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "gemma2", "gemma3"),
    *("gemma3_text", "mistral", "phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "opt", "bloom"),
    *("falcon", "cohere", "granite", "hyperclovax", "falcon_h1", "minicpm3", "inkling_text"),
    *("nanochat", "recurrent_gemma", "mamba", "starcoder2", "smollm3", "deepseek_v3"),
    *("llama4_text", "bart", "bert", "cpmant", "xlnet", "encoder-decoder-t5"),
    *("encoder-decoder-mt5", "encoder-decoder-umt5", "encoder-decoder-longt5"),
    *("encoder-decoder-switch_transformers", "encoder-decoder-bart", "encoder-decoder-mbart"),
    *("encoder-decoder-marian", "encoder-decoder-t5gemma", "encoder-decoder-prophetnet"),
    *("text_and_more-llava", "text_and_more-qwen2_vl", "text_and_more-qwen3_vl"),
    *("text_and_more-aya_vision", "text_and_more-blip-2"),
]


def sweep():
    for architecture in architectures():
        if entry(NOT_BUILT, architecture) is None:
            name = str(architecture).replace(" ", "_")
            marks = () if name in IN_EVERY_RUN else pytest.mark.slow
            yield pytest.param(architecture, marks=marks, id=name)


def own_sums(model, batch):
    """From the model's own logits, of each sequence alone and without padding."""
    if "decoder_input_ids" not in batch:
        return naive_sums(model, batch)
    sums = []
    for feature in FEATURES:
        for response in feature["response_ids"]:
            inputs = {"labels": torch.tensor([response])}
            if model.config.model_type in ("mbart", "plbart", "t5gemma"):
                # They begin with the last label, which is the mark of a language in their data, or
                # (T5Gemma of transformers 4) with the decoder's bos token.
                start = decoder_start_token(model)
                ids = torch.tensor([[start, *response[:-1]]])
                # With a mask: in training T5Gemma takes pad tokens for padding, also the first.
                inputs = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
            logits = model(input_ids=torch.tensor([feature["prompt_ids"]]), **inputs).logits[0]
            found = logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])
            sums.append(found.sum())
    return torch.stack(sums)


def without_dropout(model):
    """In training mode, where layers may act otherwise; nothing random is left."""
    for module in model.train().modules():
        for name, value in list(vars(module).items()):
            random = "drop" in name or "jitter" in name or (name == "p" and "Drop" in str(module))
            if random and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def assert_same_gradients_in_training(model, batch):
    """Of the input embeddings, through the whole model, and of the head."""
    without_dropout(model)
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.25])
    parameters = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    ours, theirs = (
        torch.autograd.grad(sums @ upstream, parameters)
        for sums in (causal_lm_logprobs(model, batch).sums, own_sums(model, batch))
    )
    for got, expected in zip(ours, theirs, strict=True):
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("architecture", [*sweep()])
def test_fused_log_probs_are_those_of_the_models_own_logits(architecture):
    kind, model_type, class_name = architecture
    if kind == MORE_THAN_TEXT and not IS_NEW:
        pytest.skip("the small configurations are those of transformers 5")
    try:
        model = make_causal_lm(model_type, class_name, is_decoder=kind != TWO_HALVES)
    except Exception as error:
        if IS_NEW:
            raise
        pytest.skip(f"this transformers builds none: {error}")
    if (refused := entry(REFUSED, architecture)) is not None:
        with pytest.raises(UsageError, match=refused.message):
            check_architecture(model)
        return
    check_architecture(model)
    if model_type == "recurrent_gemma" and not IS_NEW:
        pytest.skip("its own logits are others with use_cache=False, in transformers 4")
    collator = PreferenceCollator(
        0,
        2,
        layout="encoder_decoder" if kind == TWO_HALVES else "padded",
        decoder_start_token_id=decoder_start_token(model),
    )
    batch = collator(FEATURES)
    with torch.no_grad():
        expected = own_sums(model, batch)
        found = causal_lm_logprobs(model, batch).sums
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    if str(architecture).replace(" ", "_") in IN_EVERY_RUN:
        assert_same_gradients_in_training(model, batch)
        model.eval()
    with torch.no_grad():
        if kind == TWO_HALVES:
            return
        if (padded := entry(PADDED_ONLY, architecture)) is not None:
            # An older class may fail an earlier one of the checks.
            message = padded.message if IS_NEW else "'shared' is not possible"
            with pytest.raises(UsageError, match=message):
                prepare(model, "shared")
            return
        try:
            assert prepare(model, "shared") == "shared"
        except UsageError:
            if IS_NEW:
                raise
            return  # older classes have an attention of their own more often
        shared = PreferenceCollator(0, 2, layout="shared")(FEATURES)
        found = causal_lm_logprobs(model, shared).sums
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["asked untied", "asked tied"])
@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5", "longt5", "switch_transformers"])
def test_scale_of_t5_and_its_kin(model_type, tied, monkeypatch):
    """Whether they scale before the head depends on the tie, in a way of each one's own; that of
    transformers 5 ties some of them whatever is asked for."""
    monkeypatch.setitem(SPECIAL, model_type, {"tie_word_embeddings": tied})
    [architecture] = [a for a in architectures() if a[:2] == (TWO_HALVES, model_type)]
    model = make_causal_lm(model_type, architecture.class_name, is_decoder=False)
    check_architecture(model)
    if model_type == "t5":
        assert find_head(model).logit_scale == pytest.approx(32**-0.5 if tied else 1.0)


def test_tables_name_what_there_is():
    """And each of it once; of the transformers that docs/supported-models.md is about."""
    page = load_page()
    page.require_its_transformers(pytest.skip)
    known = {tuple(architecture[:2]) for architecture in architectures()}
    named = [(kind, name) for table in (REFUSED, PADDED_ONLY, NOT_BUILT) for kind in table
             for name in table[kind]]  # fmt: skip
    assert len(named) == len(set(named))
    notes = {(kind, name) for kind in NOTES for name in NOTES[kind]}
    assert {*named, *notes} <= known
    ids = {str(architecture).replace(" ", "_") for architecture in architectures()}
    assert set(IN_EVERY_RUN) <= ids


def test_page_is_up_to_date():
    page = load_page()
    page.require_its_transformers(pytest.skip)
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run docs/make_architectures.py"
    found = [result(architecture)[0] for architecture in architectures()]
    assert sum(text.startswith("right") for text in found) >= 20
    assert found.count(REFUSED_BY_NAME) == sum(map(len, REFUSED.values()))
    kinds = {a.kind for a in architectures() if result(a)[0].startswith("right")}
    assert kinds == {CAUSAL, TWO_HALVES, MORE_THAN_TEXT}


def load_page():
    path = Path(__file__).parents[2] / "docs" / "make_architectures.py"
    spec = importlib.util.spec_from_file_location("make_architectures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
