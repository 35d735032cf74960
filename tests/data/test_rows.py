"""Rows go where they are meant to: ours train here and in TRL, and TRL's train here."""

from __future__ import annotations

import copy
import importlib.util
import json
import re

import pytest
from datasets import Dataset

from plad_fast.data.prompts import Prompt
from plad_fast.data.rows import require_pairs
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.pairs.build import build_pairs
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.scorers import open_scorer
from plad_fast.pairs.scoring.stored import score_answers
from tests.support.trainings import last_log, weights

PROMPTS = [Prompt(str(k), f"What is {k}?", reference=f"{k} is a number") for k in range(4)]
TEACHER = {p.id: [Answer(p.id, f"{p.id} is a number, I say", "stop", 9)] for p in PROMPTS}
STUDENT = {
    p.id: [Answer(p.id, text, "stop", 9, k) for k, text in enumerate([f"{p.id} is it", "hm"])]
    for p in PROMPTS
}
USER = {"role": "user", "content": "hi"}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def scores(tmp_path):
    scorer = open_scorer("rougeL")
    path = tmp_path / "scores.jsonl"
    return score_answers(scorer, PROMPTS, [TEACHER, STUDENT], path)


# ROUGE-L to the four words of the reference: of six words four agree, of three two, of one none.
FULL, PART, NONE = 2 * 4 / 10, 2 * 2 / 7, 0.0


@pytest.mark.parametrize(
    ("select", "loss", "chat", "expected"),
    [
        ("teacher", "plad_margin", False, [FULL, PART]),
        ("best-worst", "plad_margin", True, [FULL, NONE]),
        ("ranked", "plad_listwise", True, [FULL, PART, NONE]),
    ],
)
def test_scored_rows_train(make, tiny_tokenizer, scores, select, loss, chat, expected):
    tokenizer = tiny_tokenizer if chat else None
    rows, _ = build_pairs(
        PROMPTS, TEACHER, STUDENT, select=select, scores=scores, tokenizer=tokenizer
    )
    assert isinstance(rows[0]["prompt"], list) == chat
    data = tokenize_dataset(rows, tiny_tokenizer, max_length=128, with_scores=True)
    for values, ids in zip(data["scores"], data["response_ids"], strict=True):
        assert values == pytest.approx(expected)
        assert len(ids) == len(expected)
    trainer = make(rows, loss=loss)
    before = weights(trainer)
    trainer.train()
    assert last_log(trainer)["loss"] > 0
    assert any((before[name] != after).any() for name, after in weights(trainer).items())


TRL_CHAT = {
    "implicit prompt": {"chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
    "explicit prompt": {"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]},
}


@pytest.mark.parametrize("form", TRL_CHAT)
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_trl_chat_data_trains(make, tiny_tokenizer, form, kind):
    rows = kind([TRL_CHAT[form]] * 2)
    data = tokenize_dataset(rows, tiny_tokenizer, max_length=64)
    text = tiny_tokenizer.decode(data[0]["prompt_ids"])
    assert text == "<|bos|><|user|>hi<|end|><|assistant|>"
    answers = [tiny_tokenizer.decode(ids) for ids in data[0]["response_ids"]]
    assert answers == ["yes<|end|>", "no<|end|>"]
    trainer = make(rows, loss="plad_ranking")
    trainer.train()
    assert last_log(trainer)["loss"] > 0


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # hh-rlhf; the answers begin with the same letter, which is no part of the prompt
        ("\n\nHuman: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: yo", " yes<|end|>"),
        ("One. Two", "One. Two or three", " Two<|end|>"),
    ],
)
def test_text_without_prompt_parts_between_words(tiny_tokenizer, chosen, rejected, expected):
    [row] = tokenize_dataset(
        [{"chosen": chosen, "rejected": rejected}], tiny_tokenizer, max_length=64
    )
    assert tiny_tokenizer.decode(row["response_ids"][0]) == expected
    assert tiny_tokenizer.decode(row["prompt_ids"] + row["response_ids"][1]) == (
        f"<|bos|>{rejected}<|end|>"
    )


def test_conversations_that_part_early_share_what_comes_before(tiny_tokenizer):
    turns = [USER, says("hello"), {"role": "user", "content": "more"}]
    row = {"chosen": [*turns, says("yes")], "rejected": [*turns, says("yes")]}
    [encoded] = tokenize_dataset([row], tiny_tokenizer, max_length=64)
    assert tiny_tokenizer.decode(encoded["response_ids"][1]) == "yes<|end|>"
    row["rejected"] = [USER, says("go on"), says("no")]
    with pytest.raises(UsageError, match=r"row 1: .* not the prompt; move the earlier turns"):
        tokenize_dataset([row], tiny_tokenizer, max_length=64)
    row["rejected"] = [says("no")]
    with pytest.raises(UsageError, match=r"row 1: prompt is None, .* do not begin with the same"):
        tokenize_dataset([row], tiny_tokenizer, max_length=64)


@pytest.mark.parametrize("label", [True, False, "False", 0])
def test_unpaired_rows_are_refused(tiny_tokenizer, label):
    """To fine-tune on all of them would teach the bad completions, too."""
    row = {"prompt": "p", "completion": "c", "label": label}
    with pytest.raises(
        UsageError, match=r"row 1: unpaired rows \(completion, label\) are not read"
    ):
        tokenize_dataset([row], tiny_tokenizer, max_length=64, first_only=True)
    for fine in ({**row, "label": None}, {**row, "rejected": "r"}):
        tokenize_dataset([fine], tiny_tokenizer, max_length=64)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "p", "chosen": "a", "rejected": "b"},
            "p.jsonl has no column prompt (it has question, chosen, rejected); row 1: prompt is",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejceted": "b"},
            "p.jsonl has no column rejected (it has prompt, chosen, rejceted; rename "
            "rejceted), and the loss compares responses",
        ),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "p.jsonl, row 1: chosen is 3"),
        ({"prompt": "p", "completion": "c", "label": True}, "p.jsonl, row 1: unpaired rows"),
    ],
)
def test_the_first_row_of_a_file_names_file_and_columns(row, said):
    with pytest.raises(UsageError, match="^" + re.escape(said)):
        require_pairs([row], compares=True, with_scores=False, name="p.jsonl")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "chosen": "a"}, "p.jsonl, row 3 has no rejected response, and"),
        ({"chosen": "a", "rejected": "b"}, "p.jsonl, row 3: prompt is None"),
        (
            {"prompt": "p", "chosen": "a", "rejected": ["b", "c"]},
            "p.jsonl, row 3 has 3 responses, and the rows before it have 2; keep that many",
        ),
    ],
)
def test_a_row_unlike_those_before_it(row, said):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(UsageError, match="^" + re.escape(said)):
        require_pairs([good, good, row], compares=True, with_scores=False, name="p.jsonl")


def test_rows_without_the_scores_of_the_loss():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    scored = {**row, "chosen_score": 1.0, "rejected_score": 0.0}
    said = "p.jsonl, row 2: the scores are [None, None] for 2 responses; give one each"
    with pytest.raises(UsageError, match="^" + re.escape(said)):
        require_pairs([scored, row], compares=True, with_scores=True, name="p.jsonl")
    require_pairs([scored, scored], compares=True, with_scores=True, name="p.jsonl")


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("chat", [True, False])
def test_pair_files_train_in_trl(tiny_model, tiny_tokenizer, tmp_path, chat):
    """Columns that TRL does not know, such as the scores and the id, are in its way nowhere."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    scores = {(p.id, given[p.id][0].text): 1.0 for given in (TEACHER, STUDENT) for p in PROMPTS}
    tokenizer = tiny_tokenizer if chat else None
    rows, _ = build_pairs(PROMPTS, TEACHER, STUDENT, scores=scores, tokenizer=tokenizer)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = DPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=copy.deepcopy(tiny_model),
        ref_model=copy.deepcopy(tiny_model),  # by default it is loaded once more, from a hub
        args=args,
        train_dataset=load_dataset("json", data_files=str(path), split="train"),
        processing_class=tiny_tokenizer,
    )
    before = weights(trainer)
    trainer.train()
    assert last_log(trainer)["loss"] > 0
    assert any((before[name] != after).any() for name, after in weights(trainer).items())
