"""A run keeps the best checkpoint by answers to prompts that nothing else sees, and says so."""

from __future__ import annotations

import json
import re

import pytest

from plad_fast.cli import main
from plad_fast.data.records import model_digest
from plad_fast.models.loading import load_model
from plad_fast.recipe import validation
from plad_fast.recipe.inputs import RunPrompts
from plad_fast.recipe.settings import DistillConfig
from plad_fast.training.trained_folders import log_history
from tests.support.recipe_runs import arguments, kill_at
from tests.support.tools import TEMPLATE, TOOLS

pytestmark = pytest.mark.usefixtures("no_plots")

MEASURED = {
    f"validation/{name}" for name in ("score", "words", "repetition", "cut_off", "nll", "end_logp")
}


def command(teacher, output, *extra: str) -> list[str]:
    given = ("--validation", "4", "--saves-per-stage", "3", "--epochs", "3", "--patience", "1")
    return arguments(teacher, output, *given, *extra)


def checks(run) -> list[dict[str, float]]:
    return [entry for entry in log_history(run / "plad") if "validation/score" in entry]


def test_a_student_that_gets_worse_is_not_delivered(tiny_teacher, tmp_path, capsys, monkeypatch):
    """The longer its answers, the better; a high learning rate makes a student end at once."""
    run = tmp_path / "run"
    longest = ("--eval-scorer", "length", "--learning-rate", "0.3")
    assert main(command(tiny_teacher, run, *longest)) == 0
    told = "no checkpoint answered better than the SFT student, which is kept"
    assert told in capsys.readouterr().out
    assert told in (run / "report.html").read_text()
    found = checks(run)
    assert [entry["step"] for entry in found][:2] == [0, 2]
    assert len(found) == 2  # of four: patience 1
    assert all(entry.keys() >= MEASURED for entry in found)
    assert found[0]["validation/score"] == found[0]["validation/words"]
    sentence = "the PLaD student is that student, which validation kept."
    assert sentence in (run / "report.html").read_text()
    card = (run / "plad" / "README.md").read_text()
    assert "kept by validation" in card
    assert "outcome" not in card  # that of the weights that were not kept
    # Equal weights answer and rank alike.
    sft, plad = json.loads((run / "metrics.json").read_text())["students"]
    assert {**sft, "name": ""} == {**plad, "name": ""}


def test_a_kept_student_with_adapters_is_a_whole_model_and_says_so(tiny_teacher, tmp_path):
    run = tmp_path / "run"
    nothing_learned = ("--learning-rate", "1e-12", "--epochs", "1", "--saves-per-stage", "1")
    assert main(command(tiny_teacher, run, "--lora-r", "2", *nothing_learned)) == 0
    sft, plad = ((run / name / "README.md").read_text() for name in ("sft", "plad"))
    trained = "LoRA adapters of rank 2, alpha 4, on all-linear"
    assert f"{trained} |" in sft
    assert "adapter_config.json" in sft
    assert f"{trained}, merged |" in plad
    assert "adapter_config.json" not in plad
    assert load_model(run / "plad").config.num_hidden_layers == 1


def test_more_fine_tuning_is_told_by_its_likelihood(tiny_teacher, tmp_path, capsys):
    more = ("--loss", "sft", "--sft-weight", "0", "--epochs", "1", "--saves-per-stage", "1")
    assert main(command(tiny_teacher, tmp_path / "run", *more)) == 0
    told = capsys.readouterr().out
    assert len(re.findall(r"NLL \d\.\d\d nat per token", told)) == 2
    assert "ranking_accuracy" not in told.partition("evaluation")[0]


@pytest.fixture(scope="module")
def patient(tiny_teacher, tmp_path_factory):
    run = tmp_path_factory.mktemp("patient") / "run"
    assert main(command(tiny_teacher, run, "--patience", "3")) == 0
    return run


def test_the_best_checkpoint_is_delivered(patient):
    scores = [entry["validation/score"] for entry in checks(patient)]
    assert len(scores) == 4
    best = max(range(4), key=lambda number: (scores[number], -number))
    stages = json.loads((patient / "run.json").read_text())["stages"]
    told = stages["preference training"]["summary"]
    what = f"the checkpoint of step {2 * best} is kept" if best else "SFT student, which is kept"
    assert what in told
    assert f"{scores[0]:.3f} for the SFT student" in told
    report = (patient / "report.html").read_text()
    assert told.split("; ")[-1] in report
    assert report.count("<h2>The checkpoint that was kept</h2>") == 1
    cards = [(patient / name / "README.md").read_text() for name in ("sft", "plad")]
    (line,) = [row for row in cards[1].splitlines() if row.startswith("| kept by validation")]
    assert what.replace("SFT student", "student before this training") in line
    assert "kept by validation" not in cards[0]


def test_a_killed_preference_training_goes_on_to_the_same_checks(patient, tiny_teacher, tmp_path):
    run = tmp_path / "run"
    arguments = command(tiny_teacher, run, "--patience", "3")
    kill_at("training.trainer.fused_linear_preference_loss", 11, arguments)
    assert list(run.glob("plad.checkpoints/checkpoint-*/trainer_state.json"))
    assert main(arguments) == 0
    assert checks(run) == checks(patient)
    assert model_digest(run / "plad") == model_digest(patient / "plad")


def test_validation_prompts_are_in_nothing_else():
    prompts = RunPrompts.of(DistillConfig(validation=0.1))
    parts = [prompts.sft, prompts.pairs, prompts.validation, prompts.held_out]
    ids = [prompt.id for part in parts for prompt in part]
    assert sorted(ids) == sorted(prompt.id for prompt in prompts.all)
    assert len(prompts.validation) == round(0.1 * (len(prompts.all) - len(prompts.held_out)))
    # What is held out does not depend on it.
    assert prompts.held_out == RunPrompts.of(DistillConfig(validation=0)).held_out


def test_too_many_validation_prompts_are_refused(tiny_teacher, tmp_path, capsys):
    assert main(command(tiny_teacher, tmp_path / "run", "--validation", "15")) == 2
    assert "--validation 15 of 16 prompts leaves 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("purpose", ["fine-tuning", "pairs", "evaluation", "validation"])
def test_prompts_without_an_answer_are_refused_before_the_training(
    purpose, tiny_teacher, tmp_path, capsys
):
    rows = [{"prompt": f"how is {n}", "answer": f"it is {n}"} for n in range(12)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--teacher", "column:answer", "--prompts", str(file), "--validation", "2")
    config = DistillConfig(teacher="column:answer", prompts=str(file), validation=2, held_out=4)
    prompts, part = RunPrompts.of(config), {"fine-tuning": "sft", "evaluation": "held_out"}
    unanswered = {prompt.content for prompt in getattr(prompts, part.get(purpose, purpose))}
    for row in rows:
        row["answer"] = "" if row["prompt"] in unanswered else row["answer"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = ("--student", str(tiny_teacher), "--held-out", "4", "--max-new-tokens", "20")
    output = ("--output-dir", str(tmp_path / "run"))
    assert main(["distill", *given, *student, *output]) == 2
    told = f"the teacher finished no answer to the {len(unanswered)} prompts for {purpose}"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "sft").exists()


def test_metrics_are_those_of_the_students_answers(tiny_model, tiny_tokenizer):
    """Against answers that `generate` gave, and log-probabilities from whole logits."""
    import torch

    from plad_fast.data.prompts import Prompt
    from plad_fast.pairs.generation.sampling import Sampling
    from plad_fast.pairs.generation.text_model import Answer
    from plad_fast.pairs.text_metrics import rouge, word_counts

    prompts = [Prompt(str(i), text) for i, text in enumerate(("Say one.", "Count to two!"))]
    teacher = {"0": "one", "1": "one two"}
    check = validation.AnswerCheck(
        prompts,
        {key: Answer(key, text, "stop", 3) for key, text in teacher.items()},
        tiny_tokenizer,
        Sampling(12, temperature=0.0),
        max_length=128,
    )
    metrics = check.measure(tiny_model)
    texts, nll, ends = [], [], []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt.content}]
        text = tiny_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        start = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = tiny_model.generate(start, max_new_tokens=12, do_sample=False)
            texts.append(tiny_tokenizer.decode(out[0, start.shape[1] :], skip_special_tokens=True))
            ids = tiny_tokenizer(
                f"{teacher[prompt.id]}<|end|>", add_special_tokens=False, return_tensors="pt"
            ).input_ids
            logits = tiny_model(torch.cat([start, ids], 1)).logits[0, start.shape[1] - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, ids[0][:, None])[:, 0]
        nll.append(-logps.mean().item())
        ends.append(logps[-1].item())
    rouges = rouge([text.strip() for text in texts], list(teacher.values()))["rougeL"]
    assert metrics["score"] == pytest.approx(rouges.mean())
    assert metrics["words"] == pytest.approx(word_counts(texts).mean())
    assert metrics["nll"] == pytest.approx(sum(nll) / 2, rel=1e-5)
    assert metrics["end_logp"] == pytest.approx(sum(ends) / 2, rel=1e-5)


def test_calls_in_the_teachers_answers_are_scored_as_they_are_trained_on(
    tiny_model, tiny_tokenizer
):
    """By the chat template, which writes them in another way than the text of the answer has it."""
    import copy

    from plad_fast.data.chat import written_calls
    from plad_fast.data.prompts import Prompt
    from plad_fast.models.response_scores import score_with_ends
    from plad_fast.pairs.generation.sampling import Sampling
    from plad_fast.pairs.generation.text_model import Answer

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("<tool_call>\n", "<<").replace(
        "\n</tool_call>", ">>"
    )
    asked = [{"role": "user", "content": "sum 1"}]
    calls = ({"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},)
    answer = Answer("0", written_calls(calls), "stop", 3, tool_calls=calls)
    check = validation.AnswerCheck(
        [Prompt("0", asked, tools=TOOLS)],
        {"0": answer},
        tokenizer,
        Sampling(12, temperature=0.0),
        max_length=256,
    )
    response = [{"role": "assistant", "content": "", "tool_calls": [*calls]}]
    logps, _ = score_with_ends(
        tiny_model, tokenizer, [(asked, response)], max_length=256, templates=[{"tools": TOOLS}]
    )
    assert check.measure(tiny_model)["nll"] == pytest.approx(-logps[0])
