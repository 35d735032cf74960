"""Data from which little can be learned: findings, and refusals."""

from __future__ import annotations

import json

import pytest

from plad_fast.cli import main
from plad_fast.errors import UsageError
from plad_fast.recipe.data_checks import (
    check_answers,
    check_overlap,
    check_rows,
    require_learnable,
)


def rows(count, chosen="answer number {}", rejected="sample {} of it"):
    return [
        {"prompt": f"p{i}", "chosen": chosen.format(i), "rejected": rejected.format(i)}
        for i in range(count)
    ]


def changed(data, count, **values):
    return [{**row, **values} if i < count else row for i, row in enumerate(data)]


MESSAGES = [
    {
        "prompt": [{"role": "user", "content": f"p{i}"}],
        "chosen": [{"role": "assistant", "content": f"a b {i}"}],
        "rejected": [{"role": "assistant", "content": f"c d {i}"}],
    }
    for i in range(40)
]


@pytest.mark.parametrize(
    ("data", "expected", "hopeless"),
    [
        (rows(40), [], False),
        (MESSAGES, [], False),
        ([{"prompt": f"p{i}", "chosen": f"a {i}"} for i in range(40)], [], False),
        (rows(19), ["the number of pairs is 19: below 20"], False),
        (rows(2), ["the number of pairs is 2"], False),
        (rows(1), ["the number of pairs is 1"], True),
        (rows(40, chosen="Yes it is."), ["40 of 40 chosen answers of the pairs are the"], True),
        (changed(rows(40), 30, chosen="No no no."), ["30 of 40 chosen", "'No no no.'"], False),
        (
            [{**row, "chosen": MESSAGES[0]["chosen"]} for row in MESSAGES],
            ["40 of 40 chosen answers", "'a b 0'"],
            True,
        ),
        (rows(40, "{} is", " {}  is "), ["40 of 40 pairs have the same answer as chosen"], True),
        (changed(rows(40), 3, chosen="b", rejected="b "), ["3 of 40 pairs have the same"], False),
        (changed(rows(40), 3, chosen="..."), ["3 of 40 chosen answers of the pairs hold"], False),
        (changed(rows(40), 4, rejected=""), ["4 of 40 rejected answers of the pairs hold"], False),
        ([*rows(40), *rows(2)], ["2 of 42 pairs are copies of others, such as 'p0'"], False),
        (
            changed(rows(40), 30, prompt="Q?"),
            ["40 pairs have 11 different prompts", "'Q?' stands there 30 times"],
            False,
        ),
        (
            rows(40, "a b c d {}", "a b {}"),
            ["in 100% of 40 pairs the chosen answer is the longer one (5 words to 3 on average)"],
            False,
        ),
        (rows(40, rejected="a b c d e f {}"), ["chosen answer is the shorter one"], False),
        (
            [{"prompt": f"p{i}", "responses": [f"a {i}", "b", f"a {i}"]} for i in range(40)],
            ["40 of 80 pairs have the same answer as chosen"],
            False,
        ),
        ([{"prompt": 3}, {"chosen": None}], [], False),  # refused elsewhere, with their numbers
        ([{**row, "chosen": row["chosen"] + "\x1b[31m" + "x" * 500} for row in rows(1)],
         ["the number of pairs is 1"], True),
    ],
)  # fmt: skip
def test_rows(data, expected, hopeless):
    findings = check_rows(data)
    block = "\n".join(map(str, findings))
    for text in expected:
        assert text in block
    assert len(findings) == bool(expected), block
    assert any(finding.hopeless for finding in findings) == hopeless
    assert "\x1b" not in block
    assert all(len(line) < 250 for line in block.splitlines())
    if hopeless:
        with pytest.raises(UsageError, match=r"nothing can be learned from this data: .*; do x"):
            require_learnable(findings, "do x")
    else:
        require_learnable(findings, "do x")


def test_a_single_pair_may_be_joined_to_others():
    assert [finding.hopeless for finding in check_rows(rows(1))] == [True]
    assert [finding.hopeless for finding in check_rows(rows(1), for_training=False)] == [False]
    same = rows(40, chosen="Yes, always so.")
    assert any(finding.hopeless for finding in check_rows(same, for_training=False))


@pytest.mark.parametrize(("answer", "status"), [("I cannot help with that.", 2), ("Word {}.", 0)])
def test_pairs_of_a_teacher_that_repeats_itself(answer, status, tiny_teacher, tmp_path, capsys):
    data = [{"prompt": f"p{i}", "answer": answer.format(i)} for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    command = ["pairs", "--teacher", "column:answer", "--student", str(tiny_teacher)]
    command += ["--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "60"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == status
    printed = capsys.readouterr()
    funnel = next(line for line in printed.out.splitlines() if "12 prompts > " in line)
    dropped = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    kept = (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()
    assert len(dropped) + len(kept) == 12
    assert f"> {len(kept)} kept" in funnel
    assert ("chosen answers of the pairs are the same" in printed.err) == (status == 2)


def test_answers_of_one_author():
    assert check_answers([], "answers") == []
    assert check_answers(["yes", "no"] * 20, "answers") == []
    [finding] = check_answers(["", " ", ""], "answers of A")
    assert finding.text == "3 of 3 answers of A are the same: ''"
    assert finding.hopeless
    [finding] = check_answers(["", "a b", "c d", "e"], "answers of A")
    assert finding.text == "1 of 4 answers of A hold no word, such as ''"


@pytest.mark.parametrize(
    ("data", "status"), [(rows(40, chosen="Yes."), 2), (rows(40, "{}", "{} "), 2), (rows(2), 0)]
)
@pytest.mark.parametrize("loss", ["sft", "plad_ranking"])
def test_training_says_it_before_a_model_is_loaded(
    data, status, loss, tiny_teacher, tmp_path, capsys, monkeypatch
):
    if loss == "sft":
        data = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in data]
        status = 2 if len({row["chosen"] for row in data}) == 1 else 0
    loaded = []
    monkeypatch.setattr(
        "plad_fast.recipe.stages.train_model", lambda *_, **__: loaded.append(1) or []
    )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    command = ["train", "--model", str(tiny_teacher), "--pairs", str(tmp_path / "p.jsonl")]
    assert main([*command, "--loss", loss, "--output-dir", str(tmp_path / "out")]) == status
    printed = capsys.readouterr()
    assert loaded == [1] * (status == 0)
    if loss != "sft" or status:
        assert "check your data:" in printed.out
    assert ("nothing can be learned from this data" in printed.err) == (status == 2)


@pytest.mark.usefixtures("no_plots")
def test_an_evaluation_shows_it_in_terminal_and_report(tiny_teacher, tmp_path, capsys):
    data = rows(20, "{}", "{} ")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    command = ["evaluate", "--student", f"A={tiny_teacher}", "--pairs", str(tmp_path / "p.jsonl")]
    out = tmp_path / "out"
    assert main([*command, "--max-new-tokens", "4", "--output-dir", str(out)]) == 0
    said = "20 of 20 held-out pairs have the same answer as chosen and as rejected"
    assert said in capsys.readouterr().out
    assert said in (out / "report.html").read_text()


def test_a_recipe_ends_before_fine_tuning_where_the_teacher_repeats_itself(
    tiny_teacher, tmp_path, capsys
):
    data = [{"prompt": f"p{i}", "answer": "I cannot help with that."} for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    out = tmp_path / "out"
    command = ["distill", "--teacher", "column:answer", "--student", str(tiny_teacher)]
    command += ["--prompts", str(tmp_path / "p.jsonl"), "--output-dir", str(out)]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert "40 of 40 teacher's answers are the same: 'I cannot help with that.'" in printed.out
    assert "nothing can be learned from this data" in printed.err
    assert not (out / "sft").exists()


def any_value(draw, depth=0):
    """Whatever JSON can hold, and what a careless program writes into it."""
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind < 3:
        numbers = [None, True, 0, -1, 2**63, -(2**70), 10**299, 1.5, float("nan"), float("inf")]
        return draw.choice(numbers)
    if kind < 5:
        return draw.choice(["", " ", "a", "\u200b", "\x00", "\u2028", "x" * 3000, "<|end|>", "1e5"])
    if kind < 6:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    names = ["role", "content", "a", "tools", ""]
    if kind < 7:
        return {draw.choice(names): any_value(draw, depth + 1) for _ in range(draw.randrange(4))}
    contents = ["q", "", None, 3, ["x"], [{"type": "text", "text": "q"}]]
    roles = ["user", "assistant", "system", 3, None]
    count = draw.randrange(1, 3)
    return [{"role": draw.choice(roles), "content": draw.choice(contents)} for _ in range(count)]


def test_rows_of_any_json_are_read_or_refused_in_a_line(tiny_tokenizer, tmp_path):
    """As prompts, for training and for evaluation; nothing but a UsageError may come of them."""
    import random

    from plad_fast.data.prompts import load_prompts
    from plad_fast.data.tokenization import tokenize_dataset
    from plad_fast.evaluation.held_out import read_held_out
    from plad_fast.recipe.inputs import read_pairs

    draw = random.Random(0)
    columns = ["prompt", "chosen", "rejected", "id", "reference", "responses", "scores",
               "chosen_score", "rejected_score", "tools", "chat_template_kwargs",
               "reference_logps", "completion", "source"]  # fmt: skip
    file = tmp_path / "p.jsonl"
    read = dict.fromkeys(("prompts", "held out", "training"), 0)
    messages = []
    for turn in range(80):
        data = [
            {**row, **{draw.choice(columns): any_value(draw) for _ in range(draw.randrange(1, 3))}}
            for row in rows(draw.randrange(1, 4))
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
        for name, use in (
            ("prompts", lambda: load_prompts(file)),
            ("held out", lambda: read_held_out(read_pairs(str(file)), "p")),
            (
                "training",
                lambda turn=turn: tokenize_dataset(
                    read_pairs(str(file)), tiny_tokenizer, max_length=64, with_scores=turn % 2 == 0
                ),
            ),
        ):
            try:
                use()
                read[name] += 1
            except UsageError as error:
                messages.append(str(error))
        check_rows(data)
    assert min(read.values()) > 10
    assert len(messages) > 50
    assert max(map(len, messages)) < 700


def test_what_is_trained_on_measures_nothing():
    """However the prompt is spaced, and whether it is text or a message."""
    held_out = [{**MESSAGES[3]}, {"prompt": " p4 ", "chosen": "a"}, {"prompt": "q", "chosen": "a"}]
    [finding] = check_overlap(rows(9), held_out, "rows of --eval-pairs")
    assert "2 of 3 rows of --eval-pairs have a prompt that is trained on" in finding.text
    assert "p3" in finding.text
    assert not finding.hopeless
    assert check_overlap(rows(3), held_out, "rows") == []


def test_a_training_tells_that_it_is_measured_on_its_own_prompts(tiny_teacher, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    data = ["--pairs", str(file), "--eval-pairs", str(file), "--output-dir", str(tmp_path / "out")]
    assert main(["train", "--model", str(tiny_teacher), *data, "--precision", "float32"]) == 0
    assert "4 of 4 rows of --eval-pairs have a prompt" in capsys.readouterr().out
