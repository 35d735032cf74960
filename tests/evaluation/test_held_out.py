"""Held-out pairs of a file: each prompt is asked and counted once, and bad rows end it at once."""

from __future__ import annotations

import json

import pytest

from plad_fast.cli import main
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.evaluation import run_students as module
from plad_fast.evaluation.held_out import read_held_out

PAIR = {"id": "a", "prompt": "Say 1.", "chosen": " one", "rejected": " x"}


def message(content: str, role: str = "assistant") -> dict:
    return {"role": role, "content": content}


def test_one_pair_a_prompt():
    rows = [PAIR, {"prompt": "Say 2.", "chosen": [message("two")], "rejected": [message("y")]}]
    held_out = read_held_out(rows, "file")
    assert held_out.prompts == [Prompt("a", "Say 1."), Prompt("1", [message("Say 2.", "user")])]
    assert held_out.teacher_answers == {"a": "one", "1": "two"}
    assert held_out.pairs[0] == PAIR
    assert held_out.pair_prompts == ["a", "1"]
    assert rows[0] == PAIR
    assert "id" not in rows[1]


def test_several_pairs_of_a_prompt_are_one_prompt():
    """As `--select all` writes them: with ids of their own, and the same chosen answer."""
    rows = [PAIR, {**PAIR, "id": "a\t1", "rejected": " y"}, {**PAIR, "id": "b", "prompt": "Say 2."}]
    rows[1]["reference"] = "1"
    held_out = read_held_out(rows, "file")
    assert held_out.prompts == [Prompt("a", "Say 1.", "1"), Prompt("b", "Say 2.")]
    assert [pair["id"] for pair in held_out.pairs] == ["a", "a\t1", "b"]
    assert held_out.pair_prompts == ["a", "a", "b"]
    # Ids that are those of the prompts are as good.
    again = read_held_out([{**row, "id": row["id"][0]} for row in rows], "file")
    assert (again.prompts, again.pair_prompts) == (held_out.prompts, held_out.pair_prompts)


def test_half_a_character_in_an_id_is_mended_everywhere():
    held_out = read_held_out([{**PAIR, "id": "\ud83d"}], "file")
    assert held_out.prompts == [Prompt("\ufffd", "Say 1.")]
    assert held_out.teacher_answers == {"\ufffd": "one"}
    assert [held_out.pairs[0]["id"], *held_out.pair_prompts] == ["\ufffd"] * 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q: ", "chosen": "a", "rejected": ["b", "c"]},
        {"prompt": "Q: ", "responses": ["a", "b", "c"], "scores": [3.0, 2.0, 1.0]},
    ],
)
def test_a_list_is_its_best_response_against_each_other(row):
    held_out = read_held_out([row], "file")
    found = [(p["id"], p["prompt"], p["chosen"], p["rejected"]) for p in held_out.pairs]
    assert found == [("0", "Q: ", "a", "b"), ("0\t1", "Q: ", "a", "c")]
    assert held_out.pair_prompts == ["0", "0"]
    assert held_out.teacher_answers == {"0": "a"}


def test_a_prompt_that_both_responses_begin_with():
    held_out = read_held_out([{"chosen": "Say it: yes", "rejected": "Say it: no"}], "file")
    assert held_out.prompts == [Prompt("0", "Say it:")]
    assert held_out.teacher_answers == {"0": "yes"}


def test_a_blank_reference_is_none():
    assert read_held_out([{**PAIR, "reference": " "}], "file").prompts[0].reference is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**PAIR, "chosen": None}, "chosen is None; it should be text or"),
        ({**PAIR, "rejected": None}, "no rejected response, and evaluation ranks pairs"),
        ({**PAIR, "rejected": [1, 2]}, "an entry of rejected is 1; it"),
        ({**PAIR, "prompt": 3}, "prompt is 3; it"),
        ({**PAIR, "reference": 7}, "reference holds a int; a reference is text or null"),
        (
            {**PAIR, "chosen": [{"role": "assistant", "content": None, "thinking": "hm"}]},
            "the best response has no text",
        ),
        ({**PAIR, "chosen": "\u200b"}, "the best response has no text"),
        ({**PAIR, "prompt": None}, "prompt is None, and chosen and rejected do not begin"),
    ],
)
def test_bad_rows_are_named(row, said):
    with pytest.raises(UsageError, match=f"^file, row 2: .*{said}"):
        read_held_out([{**PAIR, "prompt": "Another"}, row], "file")


def test_one_id_for_two_prompts_is_refused():
    with pytest.raises(UsageError, match="rows 1 and 3 have the id 'a' and different prompts"):
        read_held_out([PAIR, PAIR, {**PAIR, "prompt": "Say 2."}], "file")


def evaluate(model, rows, folder, *extra: str) -> int:
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return main(
        ["evaluate", "--student", f"A={model}", "--student", f"B={model}", "--pairs", str(pairs),
         "--output-dir", str(folder / "out"), "--precision", "float32", *extra]
    )  # fmt: skip


def test_nothing_is_generated_where_a_pair_cannot_be_scored(
    tiny_teacher, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(module, "load_model", None)
    rows = [PAIR, {**PAIR, "id": "long", "prompt": "Say much.", "chosen": " much" * 20}]
    options = ("--max-length", "64", "--max-new-tokens", "40")
    assert evaluate(tiny_teacher, rows, tmp_path, *options) == 2
    assert "1 of 2 pairs hold a response longer than max_length=64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_are_counted_once(tiny_teacher, tmp_path):
    rows = [
        {**PAIR, "id": f"{i}\t{k}", "prompt": f"Say {i}.", "rejected": f" {k}"}
        for i in range(3)
        for k in range(2)
    ]
    assert evaluate(tiny_teacher, rows, tmp_path, "--max-new-tokens", "40") == 0
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [results[f"n_{name}"] for name in ("prompts", "pairs", "pair_prompts")] == [3, 6, 3]
    assert results["students"][0]["n"] == 3
    wins = results["comparisons"][0]["wins"]
    assert wins["wins"] + wins["ties"] + wins["losses"] == 3
    for kind in ("greedy", "sampled"):
        assert len((tmp_path / "out" / f"a-{kind}.jsonl").read_text().splitlines()) == 1 + 3
    assert "3 held-out prompts, 6 pairs of 3 prompts" in (
        tmp_path / "out" / "report.html"
    ).read_text("utf-8")
