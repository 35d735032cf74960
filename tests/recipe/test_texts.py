"""Texts of a run: answers that were paid for are not made again behind anybody's back."""

from __future__ import annotations

import json

import pytest

from plad_fast.cli import main
from plad_fast.data.prompts import builtin_prompts
from plad_fast.data.records import model_digest
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.recipe.inputs import RunPrompts, load_recipe_prompts
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.texts import RecipeTexts
from tests.support.recipe_runs import arguments, pair


def test_answers_of_another_teacher_are_refused_and_left_alone(tmp_path):
    data, answers = tmp_path / "data.jsonl", tmp_path / "answers"
    rows = [{"prompt": f"question {i}", "gold": f"answer {i}"} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DistillConfig(teacher="column:gold", prompts=str(data), student="s")
    texts = RecipeTexts(config, load_recipe_prompts(config), answers=answers, pairs=tmp_path)
    (store_file,) = texts.teachers.stores
    with RowStore.open(store_file, {"teacher": "openai:m"}) as store:
        store.append([{"id": "0", "prompt": "p", "text": "t"}])
    before = store_file.read_bytes()
    with pytest.raises(UsageError, match="teacher was 'openai:m' and is 'column:gold'"):
        texts.teachers.ask()
    assert [path.name for path in answers.iterdir()] == ["teacher.jsonl"]
    assert store_file.read_bytes() == before


def stored(file):
    """Fingerprint and answers of a store."""
    first, *rows = map(json.loads, filter(None, file.read_text().split("\n")))
    return first["fingerprint"], {row["id"]: row["text"] for row in rows}


@pytest.mark.usefixtures("no_plots")
def test_rejected_answers_take_turns_over_students_and_temperatures(tiny_teacher, tmp_path):
    """Those before fine-tuning come from the student's own folder, and no turn has another's
    random numbers."""
    run = tmp_path / "run"
    given = ("--rejected-from", "mixed", "--student-temperature", "0,1", "--student-samples", "2")
    assert main(arguments(tiny_teacher, run, *given, "--select", "all")) == 0
    files = ["student.jsonl", *(f"student.turn{n}.jsonl" for n in (1, 2, 3))]
    turns = [stored(run / "answers" / name) for name in files]
    assert [settings["temperature"] for settings, _ in turns] == [1.0, 0.0, 1.0, 0.0]
    weights = [model_digest(run / name) for name in ("sft", "sft", "student", "student")]
    assert [settings["weights"] for settings, _ in turns] == weights
    assert len({settings["seed"] for settings, _ in turns}) == 4

    prompts = RunPrompts.of(DistillConfig(limit=24, held_out=8, sft_share=0.5, validation=0))
    held_out = {prompt.id for prompt in prompts.held_out}
    assert held_out <= turns[0][1].keys()
    drawn = [answers.keys() - held_out for _, answers in turns]
    every = [prompt_id for ids in drawn for prompt_id in ids]
    assert sorted(every) == sorted(2 * [prompt.id for prompt in prompts.pairs])
    assert all(drawn)

    greedy = LocalModel(load_model(run / "student"), load_tokenizer(run / "student"), "student")
    asked = [(prompt, 0) for prompt in prompts.pairs if prompt.id in drawn[3]]
    answers = greedy.generate_samples(asked, Sampling(60, temperature=0.0))
    assert {a.prompt_id: a.text for batch in answers for a in batch} == turns[3][1]
    texts = {text for _, answers in turns for text in answers.values()}
    rows = (run / "pairs" / "train.jsonl").read_text().splitlines()
    assert all(json.loads(row)["rejected"][0]["content"] in texts for row in rows)


def test_pairs_of_several_temperatures(tiny_teacher, tmp_path):
    """Also by the command for pairs alone, which can be run again."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": p.id, "prompt": p.content} for p in builtin_prompts()[:12]]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = pair(tiny_teacher, tiny_teacher, prompts, tmp_path / "p")
    command += ["--student-temperature", "0.5,1"]
    assert main(command) == 0
    turns = [stored(tmp_path / "p" / name) for name in ("student.jsonl", "student.turn1.jsonl")]
    assert [settings["temperature"] for settings, _ in turns] == [1.0, 0.5]
    assert sum(len(answers) for _, answers in turns) == 12
    assert main([*command, "--overwrite"]) == 0
    assert [stored(tmp_path / "p" / n) for n in ("student.jsonl", "student.turn1.jsonl")] == turns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_temperature": "0,0"}, "--student-temperature must be a number of at least 0"),
        ({"student_temperature": "0,-1"}, "--student-temperature must be a number of at least 0"),
        ({"student_temperature": "a,1"}, "--student-temperature must be a number or several"),
        ({"student_temperature": "0,1", "student_samples": 3}, "--student-samples 3 would give"),
        ({"rejected_from": "teacher"}, "--rejected-from must be one of"),
    ],
)
def test_turns_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DistillConfig(**options)


def test_parts_of_a_file_give_the_pairs_of_the_whole(tiny_teacher, tmp_path):
    """So that prompts which do not fit into memory can be paired part by part."""
    rows = [json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(30)]
    found = {}
    for name, part in {"whole": rows, "first": rows[:15], "second": rows[15:]}.items():
        prompts, out = tmp_path / f"{name}.jsonl", tmp_path / name
        prompts.write_text("".join(part))
        assert main(pair(tiny_teacher, tiny_teacher, prompts, out)) == 0
        found[name] = (out / "pairs.jsonl").read_text()
    assert found["first"]
    assert found["second"]
    assert found["whole"] == found["first"] + found["second"]
