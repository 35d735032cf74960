"""`--lora-r` of the commands: the adapters are those of a plain PEFT script, and survive a kill."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from plad_fast.cli import main
from plad_fast.data.file_states import damage
from plad_fast.models import lora
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.response_scores import score_pairs
from plad_fast.training import checkpoints
from plad_fast.training.train import train_model
from tests.support.recipe_runs import arguments, content, evaluate, train, write_pairs
from tests.support.saved_trainings import stop

peft = pytest.importorskip("peft")
LORA = ("--lora-r", "4", "--lora-alpha", "12", "--learning-rate", "1e-2")
ADAPTERS = "adapter_model.safetensors"


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 6)


def run(model, pairs, output, *extra: str):
    assert main(train(model, pairs, output, *LORA, *extra)) == 0
    return output


def scores(folder, pairs):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    return score_pairs(load_model(folder), load_tokenizer(folder), rows)


def by_script(model, rows, tokenizer, *, steps: int, warmup: int) -> dict[str, torch.Tensor]:
    """Hinge on mean log-probabilities plus likelihood, from logits, with PEFT and PyTorch alone."""
    transformers.set_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)

    def token_logps(prompt, response):
        prompt = tokenizer(prompt).input_ids
        response = tokenizer(response, add_special_tokens=False).input_ids
        response = torch.tensor([*response, tokenizer.eos_token_id])
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, response[:, None])[:, 0]

    for step in range(steps):
        rate = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        chosen = [token_logps(row["prompt"], row["chosen"]) for row in rows]
        rejected = [token_logps(row["prompt"], row["rejected"]) for row in rows]
        hinges = [(2 - a.mean() + b.mean()).relu() for a, b in zip(chosen, rejected, strict=True)]
        loss = torch.stack(hinges).mean() - 0.5 * torch.cat(chosen).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return {k: v.detach() for k, v in peft.get_peft_model_state_dict(model).items()}


def test_adapters_by_flag_are_those_of_a_plain_script(tiny_teacher, pairs, tmp_path):
    objective = ("--beta", "2", "--sft-weight", "0.5", "--rank-end-token", "true")
    steps = ("--batch-size", "6", "--epochs", "10")
    output = run(tiny_teacher, pairs, tmp_path / "out", *objective, *steps)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    tokenizer = load_tokenizer(tiny_teacher)
    expected = by_script(tiny_teacher, rows, tokenizer, steps=10, warmup=1)
    found = load_file(output / ADAPTERS)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 7 * 2  # down and up, of the linear layers of two blocks
    for name, weight in expected.items():
        # A step moves a weight by up to 0.01.
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5, msg=name)
        assert weight.abs().max() > 1e-2


def test_a_killed_training_of_adapters_ends_with_the_same_weights(
    tiny_teacher, pairs, tmp_path, monkeypatch
):
    """Killed while it saves its second checkpoint; dropout, so that the random state counts too."""
    options = ("--loss", "sft", "--lora-dropout", "0.3", "--epochs", "2", "--saves-per-stage", "3")
    run(tiny_teacher, pairs, tmp_path / "straight", *options)
    saved = []
    with monkeypatch.context() as patch:
        real = checkpoints.write_manifest
        patch.setattr(
            checkpoints,
            "write_manifest",
            lambda *given, **about: stop() if saved else saved.append(real(*given, **about)),
        )
        assert main(train(tiny_teacher, pairs, tmp_path / "out", *LORA, *options)) == 130
    assert [path.name for path in tmp_path.glob("out.checkpoints/checkpoint-*")] != []
    assert not (tmp_path / "out").exists()
    run(tiny_teacher, pairs, tmp_path / "out", *options)
    ours, theirs = (load_file(tmp_path / name / ADAPTERS) for name in ("out", "straight"))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize("options", [{"base": "../elsewhere"}, {"merge": True}], ids=str)
def test_a_checkpoint_is_whole_until_its_model_is_published(
    options, tiny_teacher, pairs, tmp_path, monkeypatch
):
    """What a kill leaves is gone on from: no file that is written again is the checkpoint's."""
    monkeypatch.setattr("plad_fast.training.train.discard_checkpoints", lambda output: None)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    train_model(tiny_teacher, rows, tmp_path / "out", loss="sft", epochs=1, learning_rate=1e-2,
                lora_r=4, **options)  # fmt: skip
    found = [*tmp_path.glob("out.checkpoints/checkpoint-*")]
    assert found
    assert [damage(path) for path in found] == [None] * len(found)
    if "merge" in options:  # which writes the tokenizer again: the same bytes, unless it is killed
        assert {file.stat().st_nlink for path in found for file in path.iterdir()} == {1}


def test_the_reference_of_a_loss_is_the_model_without_adapters(tiny_teacher, pairs, tmp_path):
    output = run(tiny_teacher, pairs, tmp_path / "out", "--loss", "dpo", "--epochs", "3")
    log = json.loads((output / "log_history.json").read_text())
    reference, trained = scores(tiny_teacher, pairs), scores(output, pairs)
    margins = [found["chosen"] - found["rejected"] for found in (reference, trained)]
    assert log[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert (margins[1] - margins[0]).mean() > 0.1


def test_merged_is_the_whole_model_that_the_adapters_make(
    tiny_teacher, pairs, tmp_path, capsys, no_plots
):
    adapters = run(tiny_teacher, pairs, tmp_path / "adapters")
    whole = run(tiny_teacher, pairs, tmp_path / "whole", "--merge")
    assert not list(whole.glob("adapter_*"))
    expected = load_model(adapters, merge_adapters=True).state_dict()
    found = load_file(whole / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
    # Another training begins with either, and adapters on adapters are evaluated as they are.
    second = run(adapters, pairs, tmp_path / "second")
    from_whole = run(whole, pairs, tmp_path / "from-whole")
    for name, weight in load_file(from_whole / ADAPTERS).items():
        torch.testing.assert_close(load_file(second / ADAPTERS)[name], weight)
    assert json.loads((second / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(adapters)
    torch.testing.assert_close(
        load_model(second)(torch.arange(9)[None]).logits,
        load_model(second, merge_adapters=True)(torch.arange(9)[None]).logits,
    )
    assert main(evaluate(second, pairs, tmp_path / "evaluated")) == 0
    before = content(adapters)
    capsys.readouterr()
    run(tiny_teacher, pairs, adapters)
    assert "done before" in capsys.readouterr().out
    assert content(adapters) == before
    assert main(train(tiny_teacher, pairs, adapters, *LORA, "--lora-targets", "q_proj")) == 2
    assert "lora_targets was 'all-linear' and is 'q_proj'" in capsys.readouterr().err


def test_a_run_with_adapters(tiny_teacher, tmp_path, capsys, no_plots):
    command = arguments(tiny_teacher, tmp_path / "run", *LORA, "--sft-learning-rate", "1e-2")
    assert main(command) == 0
    for name, base in (("sft", "student"), ("plad", "sft")):
        folder = tmp_path / "run" / name
        assert (folder / ADAPTERS).is_file()
        assert not (folder / "model.safetensors").exists()
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == f"../{base}"
    models = {path.name: path for path in (tmp_path / "run").iterdir() if path.is_dir()}
    tokens = torch.arange(9)[None]
    logits = [load_model(models[name])(tokens).logits for name in ("student", "sft", "plad")]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(logits))
    before = content(tmp_path / "run")
    capsys.readouterr()
    assert main(command) == 0
    told = capsys.readouterr().out
    assert told.count("done before") == 7
    assert {path for path, data in content(tmp_path / "run").items() if before[path] != data} <= {
        tmp_path / "run" / "report.html"
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--merge",), "--merge does nothing without --lora-r"),
        (("--lora-targets", "q_proj"), "--lora-targets does nothing without --lora-r"),
        (("--load-in-4bit",), "--load-in-4bit does nothing without --lora-r"),
        ((*LORA, "--lora-dropout", "0.1"), "--lora-dropout 0.1: loss plad_ranking"),
        ((*LORA, "--lora-targets", "q_proj,nowhere"), "no layer 'nowhere'; it has down_proj"),
        ((*LORA, "--load-in-4bit"), "--load-in-4bit"),
    ],
)
def test_what_adapters_do_not_take_is_named(options, named, tiny_teacher, pairs, tmp_path, capsys):
    assert main(train(tiny_teacher, pairs, tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_adapters_on_a_tied_head_are_refused(tiny_model, tiny_tokenizer, pairs, tmp_path, capsys):
    """No later training could begin with them."""
    config = transformers.LlamaConfig(
        **{**tiny_model.config.to_dict(), "tie_word_embeddings": True}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    command = train(tmp_path / "tied", pairs, tmp_path / "out", "--lora-r", "2")
    assert main([*command, "--lora-targets", "q_proj,lm_head"]) == 2
    assert "'lm_head' shares its weights with another layer" in capsys.readouterr().err
    assert main([*command, "--epochs", "1"]) == 0


def test_layers_that_a_student_lacks_are_found_before_its_teacher_answers(
    tiny_teacher, tmp_path, capsys
):
    command = arguments(tiny_teacher, tmp_path / "run", "--lora-r", "2", "--lora-targets", "wq")
    assert main(command) == 2
    assert "--lora-targets wq: the model has no layer 'wq'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "answers").exists()


def test_in_bfloat16_the_adapters_keep_float32(tiny_teacher, pairs, tmp_path, monkeypatch):
    """The frozen weights do not; the losses are close to those in float32."""
    frozen = []
    real = lora.Lora.check
    monkeypatch.setattr(
        lora.Lora, "check", lambda self, model: (frozen.append(model.dtype), real(self, model))
    )
    logs = {}
    for precision in ("float32", "bfloat16"):
        options = ("--epochs", "4", "--precision", precision)
        output = run(tiny_teacher, pairs, tmp_path / precision, *options)
        logs[precision] = json.loads((output / "log_history.json").read_text())
        weights = load_file(output / ADAPTERS).values()
        assert {weight.dtype for weight in weights} == {torch.float32}
    assert frozen == [torch.float32, torch.bfloat16]
    first, last = ([log[i]["nll"] for log in logs.values()] for i in (0, -2))
    assert first[1] == pytest.approx(first[0], rel=0.01)
    assert last[1] == pytest.approx(last[0], rel=0.1)
    assert last[1] < 0.8 * first[1]


def test_four_bits(tiny_teacher, pairs, tmp_path, monkeypatch):
    """On a CPU, by the products that bitsandbytes has for CPUs without AVX512-BF16: with it, layers
    that were once run in evaluation mode have no gradient."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr("plad_fast.models.lora._require_gpu", lambda: None)
    options = ("--load-in-4bit", "--batch-size", "6", "--epochs", "8")
    output = run(tiny_teacher, pairs, tmp_path / "out", *options)
    log = json.loads((output / "log_history.json").read_text())
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    quantised = load_model(tiny_teacher, dtype=torch.float32, in_4bit=True)
    assert type(quantised.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    chosen = score_pairs(quantised, load_tokenizer(tiny_teacher), rows)["chosen"]
    # Three tokens each, of which one ends the response.
    assert log[0]["nll"] == pytest.approx(-chosen.mean() / 3, rel=1e-4)
    assert log[0]["nll"] != pytest.approx(
        -scores(tiny_teacher, pairs)["chosen"].mean() / 3, rel=0.01
    )
    assert log[-2]["nll"] < 0.9 * log[0]["nll"]
    assert all(weight.abs().max() > 1e-3 for weight in load_file(output / ADAPTERS).values())
    assert load_model(output, merge_adapters=True).dtype == torch.float32
