"""Folders in which PEFT saved adapters alone, given to the commands in place of a model."""

from __future__ import annotations

import functools
import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plad_fast.cli import main
from plad_fast.data.records import model_digest
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.models.adapters import merge_for_inference
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.response_scores import score_pairs
from plad_fast.recipe.teachers import Teachers
from tests.support.recipe_runs import arguments, write_pairs

peft = pytest.importorskip("peft")
TOKENS = torch.arange(3, 15)[None]
BODY = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def base(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "base")


def save_adapters(base, folder, config):
    """Of that model, and moved: as they are made they add nothing."""
    torch.manual_seed(1)
    model = peft.get_peft_model(load_model(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(base, tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[*BODY, "lm_head"], task_type="CAUSAL_LM"
    )
    return save_adapters(base, tmp_path / "adapters", config)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 4)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_merged_adapters_are_ordinary_weights(base, adapters, tmp_path):
    merged = load_model(adapters, merge_adapters=True)
    assert not merged.training
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(logits(merged), logits(load_model(adapters)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(load_model(base)))
    merged.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_model(tmp_path / "saved")), logits(merged))
    same = load_model(base, merge_adapters=True)
    assert torch.equal(logits(same), logits(load_model(base)))
    assert load_tokenizer(adapters).get_vocab() == load_tokenizer(base).get_vocab()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_is_merged_in_place_for_inference(tied, options, base, tmp_path):
    """But where a weight is another layer's too, or the adapter is not plain LoRA."""
    if tied:
        tie(base)
    targets = BODY if options else [*BODY, "lm_head"]
    config = peft.LoraConfig(r=3, target_modules=targets, **options)
    folder = save_adapters(base, tmp_path / "lora", config)
    theirs = peft.PeftModel.from_pretrained(load_model(base), folder).eval()
    want = logits(theirs)
    model = merge_for_inference(theirs if options or tied else load_model(folder))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    apart = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and not layer.merged
    }
    assert apart == (set(BODY) if options else {"lm_head"} if tied else set())


TRAINED_TOKENS = {
    "lora and tokens": lambda: peft.LoraConfig(
        r=3, target_modules=BODY, trainable_token_indices=[5, 200, 201]
    ),
    "tokens by name": lambda: peft.LoraConfig(
        r=3, target_modules=BODY, trainable_token_indices={"embed_tokens": [5, 200]}
    ),
    "tokens alone": lambda: peft.TrainableTokensConfig(
        token_indices=[5, 200], target_modules=["embed_tokens"]
    ),
}


@pytest.mark.parametrize("kind", TRAINED_TOKENS)
def test_trained_tokens_of_tied_embeddings_are_those_of_peft(kind, base, tiny_tokenizer, tmp_path):
    """Loaded, merged, merged and saved, and scored, against PEFT's own model (float64 sums)."""
    tie(base)
    folder = save_adapters(base, tmp_path / "tokens", TRAINED_TOKENS[kind]())
    theirs = peft.PeftModel.from_pretrained(load_model(base), folder).eval()
    tokens = torch.arange(190, 210)[None]  # the trained ones go in and come out
    with torch.no_grad():
        want = theirs(tokens).logits
    assert not torch.allclose(want, load_model(base)(tokens).logits, atol=0.1)
    merged = load_model(folder, merge_adapters=True)
    merged.save_pretrained(tmp_path / "merged")
    pair = {"prompt": "p", "chosen": "\u0080 yes", "rejected": "n"}
    rows = tokenize_dataset([pair], tiny_tokenizer, max_length=64)[0]
    log_probs = [
        score_naively(theirs, rows["prompt_ids"], response) for response in rows["response_ids"]
    ]
    for model in (load_model(folder), merged, load_model(tmp_path / "merged")):
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-4)
        scores = score_pairs(model, tiny_tokenizer, [pair], progress=False)
        assert [scores["chosen"][0], scores["rejected"][0]] == pytest.approx(log_probs, rel=1e-5)


def tie(base):
    model = load_model(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)


def score_naively(model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    rows = logits[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(response)[:, None]).sum().item()


def test_a_weight_that_is_missing_under_all_its_names_is_missed(base, tmp_path):
    """Of tied ones a checkpoint holds one name; the adapter itself must be there."""
    tie(base)
    config = TRAINED_TOKENS["lora and tokens"]()
    folder = save_adapters(base, tmp_path / "tokens", config)
    state = load_file(folder / "adapter_model.safetensors")
    kept = {name: weight for name, weight in state.items() if "token_adapter" not in name}
    assert len(kept) < len(state)
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"lacks 2 .*trainable_tokens_delta"):
        load_model(folder)


def test_merged_weights_that_loading_would_tie_are_refused(tmp_path):
    """T5's encoder and decoder have embeddings that are tied whatever the head is."""
    size = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    config = transformers.T5Config(vocab_size=50, decoder_start_token_id=0, **size)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    shared = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["shared"])
    folder = save_adapters(tmp_path / "base", tmp_path / "adapters", shared)
    with pytest.raises(UsageError, match=r"embed_tokens.weight' differ .* tied"):
        load_model(folder, merge_adapters=True)
    both = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    folder = save_adapters(tmp_path / "base", tmp_path / "both", both)
    with pytest.raises(UsageError, match="which merging would change as well"):
        load_model(folder, merge_adapters=True)


@pytest.mark.parametrize("others", [{}, {"embed_tokens": [201]}])
def test_tokens_trained_at_a_tied_head_are_not_merged_into_the_embeddings(others, base, tmp_path):
    tie(base)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [200], **others}
    )
    folder = save_adapters(base, tmp_path / "tokens", config)
    with pytest.raises(UsageError, match="which merging would change as well"):
        load_model(folder, merge_adapters=True)


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("a", "a")])
def test_adapters_in_a_circle_are_refused(first, second, adapters, tmp_path, pairs, capsys):
    settings = json.loads((adapters / "adapter_config.json").read_text())
    for name, other in ((first, second), (second, first), ("outer", first)):
        shutil.copytree(adapters, tmp_path / name, dirs_exist_ok=True)
        changed = {**settings, "base_model_name_or_path": str(tmp_path / other)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(changed))
    for name in (first, "outer"):
        assert model_digest(tmp_path / name)
        for load in (
            load_model,
            load_tokenizer,
            functools.partial(load_model, merge_adapters=True),
        ):
            with pytest.raises(UsageError, match="in a circle"):
                load(tmp_path / name)
    command = ["train", "--pairs", str(pairs), "--output-dir", str(tmp_path / "out"), "--model"]
    assert main([*command, str(tmp_path / "outer")]) == 2
    assert "in a circle" in capsys.readouterr().err


def test_adapters_beside_their_model_are_not_merged_for_ever(base, adapters):
    for file in adapters.glob("adapter_*"):
        shutil.copy(file, base)
    with pytest.raises(UsageError, match="a folder of their own"):
        load_model(base, merge_adapters=True)


def test_training_starts_from_the_merged_model(adapters, pairs, tmp_path):
    command = ["train", "--model", str(adapters), "--pairs", str(pairs), "--output-dir"]
    nothing_learned = ["--learning-rate", "1e-12", "--precision", "float32"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is_gradient_checkpointing")  # which PEFT asks for
        assert main([*command, str(tmp_path / "out"), *nothing_learned]) == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    expected = logits(load_model(adapters))
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("role", ["--student", "--teacher"])
def test_the_student_of_a_run_is_the_merged_model(role, adapters, tmp_path, monkeypatch, capsys):
    def far_enough(texts, **_):
        raise UsageError("far enough")

    monkeypatch.setattr(Teachers, "ask", far_enough)
    command = arguments(tmp_path / "base", tmp_path / "run", role, str(adapters))
    assert main([*command, "--student-layers", "2"]) == 2
    assert "far enough" in capsys.readouterr().err
    torch.testing.assert_close(
        logits(load_model(tmp_path / "run" / "student")),
        logits(load_model(adapters)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.usefixtures("no_plots")
def test_evaluation_takes_what_can_be_loaded(base, adapters, pairs, tmp_path):
    command = ["evaluate", "--student", f"Base={base}", "--student", f"LoRA={adapters}",
               "--pairs", str(pairs), "--output-dir", str(tmp_path / "out"),
               "--max-new-tokens", "20", "--precision", "float32"]  # fmt: skip
    assert main(command) == 0
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["students"]
    assert rows[0]["margin"]["mean"] != rows[1]["margin"]["mean"]


def test_a_digest_covers_the_settings_and_the_base(adapters, base, tmp_path):
    before = model_digest(adapters)
    model = load_model(base)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(base)
    assert model_digest(adapters) != before
    before = model_digest(adapters)
    settings = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 7}))
    assert model_digest(adapters) != before


def test_what_cannot_be_merged_is_refused(base, pairs, tmp_path, capsys):
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tuned = save_adapters(base, tmp_path / "tuned", prompt)
    command = ["train", "--pairs", str(pairs), "--output-dir", str(tmp_path / "out"), "--model"]
    assert main([*command, str(tuned)]) == 2
    assert "cannot merge the adapters of" in capsys.readouterr().err

    model = load_model(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    head = peft.LoraConfig(r=3, target_modules=["lm_head"])
    tied = save_adapters(base, tmp_path / "tied", head)
    assert main([*command, str(tied)]) == 2
    assert "on an LM head or on embeddings whose weights are those" in capsys.readouterr().err
    embeddings = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UsageError, match="which merging would change as well"):
        load_model(save_adapters(base, tmp_path / "ends", embeddings), merge_adapters=True)


def test_adapters_on_adapters_are_merged_in_turn(adapters, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    inner = load_model(adapters, merge_adapters=True)
    outer = peft.get_peft_model(inner, config)
    with torch.no_grad():
        for parameter in outer.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    outer.save_pretrained(tmp_path / "outer")
    path = tmp_path / "outer" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": str(adapters)}))
    expected = logits(outer.merge_and_unload())
    found = load_model(tmp_path / "outer", merge_adapters=True)
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
