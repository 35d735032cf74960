"""Bad input on the command line: one sentence that says what was wrong and what to do."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch

from plad_fast.cli import main


@pytest.fixture
def data(tmp_path):
    """Files that are wrong in one way each."""
    good = [{"prompt": f"Say {i}.", "chosen": f" {i}", "rejected": " x"} for i in range(8)]

    def write(name: str, rows: list) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("good.jsonl", good)
    write("empty.jsonl", [])
    write("question.jsonl", [{"question": row["prompt"]} for row in good])
    write("numbers.jsonl", [{"prompt": 3}])
    write("long.jsonl", [*good, {"prompt": "x " * 400}])
    write("unranked.jsonl", [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in good])
    write("gap.jsonl", [*good[:5], {**good[5], "rejected": None}, *good[6:]])
    asked = {**good[1], "prompt": [{"role": "user", "content": "Say 1."}]}
    write("tools.jsonl", [good[0], {**asked, "tools": [{"name": "f"}]}])
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "recipe.yaml").write_text("beta: 0.5\nlearning-rat: 1e-4\n")
    (tmp_path / "list.yaml").write_text("- beta\n")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "no-model").mkdir()
    return tmp_path


DISTILL = ["distill", "--teacher", "{teacher}", "--student-layers", "1", "--output-dir", "{out}",
           "--max-new-tokens", "40", "--teacher-temperature", "1", "--student-temperature", "1",
           "--precision", "float32"]  # fmt: skip
GOOD = [*DISTILL, "--prompts", "{data}/good.jsonl", "--held-out", "3"]


def _of_teacher(teacher):
    return [part.replace("{teacher}", teacher) for part in GOOD]


TRAIN = ["train", "--model", "{teacher}", "--output-dir", "{out}"]
EVALUATE = ["evaluate", "--output-dir", "{out}", "--pairs", "{data}/good.jsonl"]

BAD_INPUTS = {
    "missing prompts file": (
        [*DISTILL, "--prompts", "{data}/god.jsonl"],
        "there is no file .*god.jsonl'; did you mean '.*/good.jsonl'",
    ),
    "a hub dataset that cannot be reached": (
        [*DISTILL, "--prompts", "nobody/nothing"],
        "the hub data set 'nobody/nothing' cannot be reached",
    ),
    "wrong column": (
        [*DISTILL, "--prompts", "{data}/question.jsonl"],
        "no column 'prompt', but 'question': choose one with --prompt-column",
    ),
    "template names no column": (
        [*DISTILL, "--prompts", "{data}/question.jsonl", "--prompt-template", "Q: {{text}}"],
        "names {text}, which is no column",
    ),
    "empty data": ([*DISTILL, "--prompts", "{data}/empty.jsonl"], "has no rows; give a file"),
    "broken JSON": ([*DISTILL, "--prompts", "{data}/broken.jsonl"], "line 2"),
    "prompts that are not text": (
        [*DISTILL, "--prompts", "{data}/numbers.jsonl"],
        "row 1, column 'prompt' is 3",
    ),
    "too few prompts to hold any out": (
        [*DISTILL, "--prompts", "{data}/good.jsonl", "--held-out", "0.05"],
        "each needs at least 2",
    ),
    "a prompt longer than the model": (
        [*DISTILL, "--prompts", "{data}/long.jsonl", "--held-out", "3"],
        "too long for model teacher: prompt .* has .* tokens, and of 256 positions",
    ),
    "no such teacher": (
        [*GOOD, "--teacher", "{data}/no-model"],
        "--teacher: '.*/no-model' is no folder of a model",
    ),
    "no such student": (
        [*GOOD, "--student", "{data}/no-model"],
        "--student: '.*/no-model' is no folder of a model",
    ),
    "more layers than the teacher has": (
        [*GOOD, "--student-layers", "9"],
        "cannot keep 9 layers of 2",
    ),
    "layers out of order": ([*GOOD, "--student-layers", "1,0"], "increasing indices"),
    "beta below 0": ([*GOOD, "--beta", "-1"], "--beta must be at least 0, got -1"),
    "unknown loss": ([*GOOD, "--loss", "dpo2"], "unknown loss 'dpo2'; did you mean dpo"),
    "a loss that needs scores": ([*GOOD, "--loss", "plad_margin"], "choose a --scorer"),
    "a number that is none": (
        [*GOOD, "--epochs", "many"],
        "--epochs must be a finite number, got 'many'",
    ),
    "half a micro-batch": (
        [*GOOD, "--batch-size", "8", "--micro-batch-size", "3"],
        "--micro-batch-size must divide --batch-size 8",
    ),
    "a misspelt setting in YAML": (
        [*GOOD, "--config", "{data}/recipe.yaml"],
        "unknown setting 'learning-rat' of distill; did you mean learning_rate",
    ),
    "YAML that is no mapping": ([*GOOD, "--config", "{data}/list.yaml"], "`name: value` lines"),
    "output folder that is a file": ([*GOOD, "--output-dir", "{data}/file"], "is a file"),
    "output folder that holds other things": (
        [*GOOD, "--output-dir", "{data}/notes", "--overwrite"],
        "not the folder of a run",
    ),
    "answers cut off by the length limit": (
        [*GOOD, "--max-new-tokens", "1"],
        "finished none of its 8 answers within --max-new-tokens 1; raise it",
    ),
    "all answers identical": (
        [
            *_of_teacher("{silent}"),
            "--student",
            "{silent}",
            "--student-layers",
            "2",
            "--learning-rate",
            "1e-9",
            "--sft-learning-rate",
            "1e-9",
        ],
        r"nothing can be learned from this data: 8 of 8 teacher's answers are the same: 'C'; take",
    ),
    "a student that answers as its teacher": (
        [
            *("pairs", "--teacher", "{silent}", "--student", "{silent}", "--output-dir", "{out}"),
            *("--prompts", "{data}/good.jsonl", "--max-new-tokens", "9"),
        ],
        r"no pair is left: kept 0 of 8 prompts: 8 identical; give the student another seed.*; "
        r".*/dropped.jsonl has every one with its reason",
    ),
    "NaN weights": (_of_teacher("{nan}"), "produced NaN or infinite logits"),
    "training on NaN weights": (
        [*TRAIN, "--model", "{nan}", "--pairs", "{data}/good.jsonl"],
        "not finite|NaN",
    ),
    "pairs without a rejected answer": (
        [*TRAIN, "--pairs", "{data}/unranked.jsonl"],
        r"unranked.jsonl has no column rejected \(it has .*\), and the loss compares responses",
    ),
    # Each before the model, which cannot be loaded.
    "a pair without a rejected answer": (
        [*TRAIN, "--model", "{weightless}", "--pairs", "{data}/gap.jsonl"],
        "gap.jsonl, row 6 has no rejected response, and the loss compares responses; add it",
    ),
    "a pair for evaluation without a rejected answer": (
        [
            *(*TRAIN, "--model", "{weightless}", "--pairs", "{data}/good.jsonl"),
            *("--eval-pairs", "{data}/gap.jsonl"),
        ],
        "gap.jsonl, row 6 has no rejected response",
    ),
    "pairs without the scores of the loss": (
        [
            *(*TRAIN, "--model", "{weightless}", "--pairs", "{data}/good.jsonl"),
            *("--loss", "plad_margin"),
        ],
        "good.jsonl has the columns .*; this loss needs scores in chosen_score and rejected_score",
    ),
    "pairs without the columns of pairs": (
        [*TRAIN, "--pairs", "{data}/question.jsonl"],
        "has the columns question; it needs",
    ),
    "no epochs": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--epochs", "0"],
        "--epochs must be positive",
    ),
    "a student without a name": ([*EVALUATE, "--student", "{teacher}"], "must be NAME=PATH"),
    "an evaluation of pairs with tools": (
        [*EVALUATE, "--pairs", "{data}/tools.jsonl", "--student", "A={teacher}"],
        "pair 1: the prompt has tools, which the chat template of .* does not show",
    ),
    "a student that is not there": (
        [*EVALUATE, "--student", "A={data}/none"],
        "--student A=.*/none: there is nothing at '.*/none'; did you mean '.*/notes'",
    ),
    "a student that is not there either": (
        [*EVALUATE, "--student", "A=./none"],
        r"--student A=\./none: there is nothing at '\./none'; check the path",
    ),
    "a student whose folder is missing": (
        [*EVALUATE, "--student", "SFT=runs/nope"],
        "--student SFT=runs/nope: there is nothing at 'runs/nope'",
    ),
    "a student of the recipe that is not there": (
        [*GOOD, "--student", "{data}/nope"],
        "--student: there is nothing at '.*/nope'",
    ),
    "a teacher that is not there": (
        [*GOOD, "--teacher", "{data}/none"],
        "--teacher: there is nothing at '.*/none'; did you mean '.*/notes'",
    ),
    "a model that is not there": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--model", "runs/nope"],
        "--model: there is nothing at 'runs/nope'",
    ),
    "a model of likelihoods that is not there": (
        [*GOOD, "--scorer", "likelihood:{data}/none"],
        "scorer 'likelihood:.*/none': there is nothing at",
    ),
    "a reward model that is not there": (
        [*GOOD, "--scorer", "reward:./none#good"],
        "scorer 'reward:./none#good': there is nothing at './none'",
    ),
    "a file in place of a model": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--model", "{data}/good.jsonl"],
        "--model: '.*/good.jsonl' is a file and no .gguf; give its folder",
    ),
    "pairs that are not there": (
        [*TRAIN, "--pairs", "{data}/none/pairs"],
        "there is no file '.*/none/pairs'",
    ),
    "a folder in place of a file of settings": (
        [*GOOD, "--config", "{data}/notes"],
        "--config .*/notes is no file; give a YAML file",
    ),
    "a damaged config of a model": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--model", "{damaged}"],
        "cannot load a language model from '.*/damaged'",
    ),
    "a damaged config of a student": (
        [*EVALUATE, "--student", "A={damaged}"],
        "cannot load a tokenizer from '.*/damaged'",
    ),
    "a student that is no model": (
        [*EVALUATE, "--student", "A={data}/no-model"],
        "--student A=.*/no-model: '.*/no-model' is no folder of a model",
    ),
    "pairs with a student without weights": (
        # The teacher would be asked first.
        [
            "pairs",
            "--teacher",
            "python:none.ask",
            "--student",
            "{weightless}",
            "--prompts",
            "{data}/good.jsonl",
            "--output-dir",
            "{out}",
        ],
        "weightless' holds no weights",
    ),
    "a student named like a path": (
        [*EVALUATE, "--student", "../A={teacher}"],
        "--student ../A=.*: choose a name without /",
    ),
    "students that differ in case only": (
        [*EVALUATE, "--student", "A={teacher}", "--student", "a={teacher}"],
        "--student A and --student a would share their files",
    ),
    "a folder of a model that something else made": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--output-dir", "{data}/notes"],
        "notes is there already and has no record of a training",
    ),
    "a training micro-batch that does not divide": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--micro-batch-size", "3", "--batch-size", "8"],
        "--micro-batch-size 3 must divide --batch-size 8",
    ),
    "a precision that there is not": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--precision", "float16"],
        "--precision must be one of .*'bfloat16'.*, got 'float16'",
    ),
    "no checkpoints": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--saves-per-stage", "0"],
        "--saves-per-stage must be at least 1, got 0",
    ),
    "a training seed below 0": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--seed", "-1"],
        "--seed must be from 0",
    ),
    "a weight below 0": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--sft-weight", "-1"],
        "--sft-weight must be at least 0",
    ),
    "beta of a loss that has none": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--loss", "sft", "--beta", "3"],
        "--loss sft has no beta; leave --beta out",
    ),
    "a regulariser of what is a likelihood": (
        [*TRAIN, "--pairs", "{data}/good.jsonl", "--loss", "sft", "--sft-weight", "1"],
        "--sft-weight has no part in --loss sft, .*; leave it out",
    ),
    "an answer for which there is no room": (
        [*EVALUATE, "--student", "A={teacher}", "--max-new-tokens", "1024"],
        "--max-length must exceed --max-new-tokens 1024, got 1024",
    ),
    "an output folder of nobody": (
        [*GOOD, "--output-dir=~no-such-user/run"],
        "--output-dir '~no-such-user/run': .*; write the folder out",
    ),
    "a seed below 0": ([*GOOD, "--seed", "-1"], "--seed must be from 0"),
    "a setting that is NaN": ([*GOOD, "--beta", "nan"], "--beta must be a finite number"),
}


@pytest.fixture(scope="module")
def broken_models(tiny_teacher, tmp_path_factory):
    """A model of NaN, one that says nothing but one short answer, and one without weights."""
    from plad_fast.models.loading import load_model

    folders = {}
    for name in ("nan", "silent"):
        folders[name] = tmp_path_factory.mktemp("models") / name
        shutil.copytree(tiny_teacher, folders[name])
        model = load_model(folders[name])
        with torch.no_grad():
            if name == "nan":
                model.model.norm.weight.fill_(torch.nan)
            else:
                # The logits depend on the last token only: after "a" the end, else "a".
                for layer in model.model.layers:
                    layer.self_attn.o_proj.weight.zero_()
                    layer.mlp.down_proj.weight.zero_()
                letter = 40
                model.model.embed_tokens.weight.fill_(0.0)
                model.model.embed_tokens.weight[:, 0] = 1.0
                model.model.embed_tokens.weight[letter, 0] = -1.0
                model.lm_head.weight.zero_()
                model.lm_head.weight[letter, 0] = 100.0
                model.lm_head.weight[model.config.eos_token_id, 0] = -100.0
        model.save_pretrained(folders[name])
    folders["weightless"] = tmp_path_factory.mktemp("models") / "weightless"
    shutil.copytree(tiny_teacher, folders["weightless"])
    (folders["weightless"] / "model.safetensors").unlink()
    folders["damaged"] = tmp_path_factory.mktemp("models") / "damaged"
    shutil.copytree(tiny_teacher, folders["damaged"])
    (folders["damaged"] / "config.json").write_text("[" * 100_000)
    (folders["damaged"] / "tokenizer.json").write_text('{"version": ')
    return folders


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name, data, tiny_teacher, broken_models, capfd):
    template, message = BAD_INPUTS[name]
    places = {"data": data, "teacher": tiny_teacher, "out": data / "out", **broken_models}
    command = [part.format(**places) for part in template]
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert main(command) == 2
    captured = capfd.readouterr()
    error = next(line for line in captured.err.splitlines() if line.startswith("plad-fast: error:"))
    assert re.search(message, error), error
    assert "Traceback" not in captured.err + captured.out
    for path, content in before.items():
        assert path.read_bytes() == content, f"{path} was touched"


def test_teacher_and_student_may_have_different_tokenizers(data, tiny_teacher, tmp_path, capfd):
    """Pairs are text: nothing has to be aligned, and nothing is refused."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.add_tokens(["Say", "yes"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "student")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    command = [
        "pairs", "--teacher", str(tiny_teacher), "--student", str(tmp_path / "student"),
        "--prompts", str(data / "good.jsonl"), "--output-dir", str(tmp_path / "pairs"),
        "--teacher-temperature", "1", "--student-temperature", "1", "--max-new-tokens", "150",
    ]  # fmt: skip
    status = main(command)
    error = capfd.readouterr().err
    assert status == 0 or "no pair is left" in error
    assert "tokenizer" not in error


def test_a_read_only_folder(data, tiny_teacher, capfd):
    """Root may write anywhere, so the refusal is provoked in a place that refuses even root."""
    command = [part.format(data=data, teacher=tiny_teacher, out="/proc/run") for part in GOOD]
    assert main(command) == 2
    assert "cannot write to /proc/run" in capfd.readouterr().err


@pytest.mark.parametrize("command", [GOOD, [*EVALUATE, "--student", "A={teacher}"]])
def test_what_only_the_report_needs_is_missed_before_any_work(
    command, data, tiny_teacher, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = data / "out"
    assert main([part.format(data=data, teacher=tiny_teacher, out=out) for part in command]) == 2
    error = capsys.readouterr().err
    assert "rouge_score and matplotlib must be installed; run: pip install -e '.[eval]'" in error
    assert not out.exists()


def test_several_gpus_are_refused_at_once(data, tiny_teacher, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    out = data / "out"
    assert main([part.format(data=data, teacher=tiny_teacher, out=out) for part in GOOD]) == 2
    assert "CUDA_VISIBLE_DEVICES=0" in capsys.readouterr().err
    assert not out.exists()
