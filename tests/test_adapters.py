"""Folders in which PEFT saved adapters alone, given to the commands in place of a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from plad_fast._records import model_digest
from plad_fast.cli import main
from plad_fast.errors import UsageError
from plad_fast.recipe_texts import RecipeTexts
from plad_fast.students import load_model, load_tokenizer
from tests.recipe_runs import arguments, write_pairs

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


def test_training_starts_from_the_merged_model(adapters, pairs, tmp_path):
    command = ["train", "--model", str(adapters), "--pairs", str(pairs), "--output-dir"]
    nothing_learned = ["--learning-rate", "1e-12", "--precision", "float32"]
    assert main([*command, str(tmp_path / "out"), *nothing_learned]) == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    expected = logits(load_model(adapters))
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3)
    assert main([*command, str(tmp_path / "more"), "--learning-rate", "1e-3"]) == 0
    first, second = (
        load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        for name in ("out", "more")
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("role", ["--student", "--teacher"])
def test_the_student_of_a_run_is_the_merged_model(role, adapters, tmp_path, monkeypatch, capsys):
    def far_enough(texts):
        raise UsageError("far enough")

    monkeypatch.setattr(RecipeTexts, "ask_teacher", far_enough)
    command = arguments(tmp_path / "base", tmp_path / "run", role, str(adapters))
    assert main([*command, "--student-layers", "2"]) == 2
    assert "far enough" in capsys.readouterr().err
    torch.testing.assert_close(
        logits(load_model(tmp_path / "run" / "student")),
        logits(load_model(adapters)),
        rtol=1e-4,
        atol=1e-4,
    )


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
