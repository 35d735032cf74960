"""The recipe's data: the split of the prompts, and rows as files."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plad_fast import UsageError
from plad_fast.data.prompts import Prompt
from plad_fast.recipe.arguments import COMMANDS
from plad_fast.recipe.inputs import (
    RunPrompts,
    answer_columns,
    prompts_digest,
    read_jsonl,
    split_prompts,
    write_jsonl,
)
from plad_fast.recipe.settings import DistillConfig


def test_split_is_disjoint_complete_and_seeded():
    prompts = [Prompt(str(i), f"p{i}") for i in range(20)]
    train, held_out, _ = split_prompts(prompts, 0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert {p.id for p in train} | {p.id for p in held_out} == {str(i) for i in range(20)}
    assert split_prompts(prompts, 0.25, seed=3) == (train, held_out, [])
    assert split_prompts(prompts, 0.25, seed=4) != (train, held_out, [])
    assert len(split_prompts(prompts, 6, seed=3)[1]) == 6
    with pytest.raises(UsageError, match="each needs at least"):
        split_prompts(prompts, 19.0, seed=0)
    for shares, name in (((1.5, 0, 0.0), "--held-out 1.5"), ((0.25, 0, 2.5), "--validation 2.5")):
        with pytest.raises(UsageError, match=f"{name} is neither a share below 1 nor a number"):
            split_prompts(prompts, *shares)


def test_copies_of_a_prompt_stay_on_one_side():
    """24 rows of 4 prompts: as text, with other white space, and as a chat of the same words."""
    forms = [
        lambda i: f"Name {i} things.",
        lambda i: f" Name  {i}\nthings. ",
        lambda i: [{"role": "user", "content": f"Name {i} things."}],
    ]
    prompts = [Prompt(str(n), forms[n % 3](n % 4)) for n in range(24)]
    train, held_out, _ = split_prompts(prompts, 0.5, seed=0)
    assert (len(train), len(held_out)) == (12, 12)
    kinds = [{int(p.id) % 4 for p in side} for side in (train, held_out)]
    assert kinds[0].isdisjoint(kinds[1])
    with pytest.raises(UsageError, match="4 different prompts with --held-out 8"):
        split_prompts(prompts, 8.0, seed=0)


def test_whatever_changes_of_prompts_is_noticed():
    """Also the words of one that keeps its id."""
    first, second = Prompt("a", "p", "r"), Prompt("b", [{"role": "user", "content": "q"}])
    changes = [{"id": "c"}, {"content": "q"}, {"reference": "s"}, {"reference": None}]
    lists = [[replace(first, **change), second] for change in ({}, *changes)]
    lists += [[first, replace(second, tools=({"name": "f"},))], [second, first], [first]]
    assert len(set(map(prompts_digest, lists))) == len(lists)


def test_rows_may_hold_any_line_separator(tmp_path):
    rows = [{"prompt": "a\u2028b\u2029c\x85d\ne\x0bf"}, {"prompt": "g"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_the_quickstart_has_an_answer_to_every_prompt():
    config = DistillConfig(**COMMANDS["quickstart"].defaults)
    prompts = RunPrompts.of(config)
    answers = answer_columns(config)("answer")
    assert all(answers[prompt.id].strip() for prompt in prompts.all)
    assert len(prompts.held_out) >= 40
    assert len(prompts.pairs) > len(prompts.sft) >= 20
    with pytest.raises(UsageError, match="has no column 'other' to take answers from"):
        answer_columns(config)("other")
