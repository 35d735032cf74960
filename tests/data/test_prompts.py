"""Prompts: what can be read, which ids they get, and what is said about data that is no good."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest

from plad_fast.data.places import BUILTIN
from plad_fast.data.prompts import (
    Prompt,
    as_messages,
    builtin_file,
    builtin_prompts,
    load_prompts,
    require_unique_ids,
)
from plad_fast.errors import UsageError
from tests.support.prompt_files import (
    CHAT,
    ROWS,
    message_of,
    write_csv,
    write_json,
    write_jsonl,
    write_parquet,
)


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "prompts.jsonl", ROWS)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("p.jsonl", write_jsonl),
        ("p.json", write_json),
        ("p.json", write_jsonl),  # how many hub repositories name their JSON lines
        ("p.csv", write_csv),
        ("p.parquet", write_parquet),
    ],
)
def test_all_formats_give_the_same_prompts(tmp_path, name, write):
    write(tmp_path / name, ROWS)
    prompts = load_prompts(tmp_path / name, reference_column="answer")
    assert prompts == [Prompt(row["id"], row["prompt"], row["answer"]) for row in ROWS]


def test_csv_text_stays_text_and_may_be_long(tmp_path):
    rows = [{"prompt": "007"}, {"prompt": "NA"}, {"prompt": "long " * 50_000}]
    write_csv(tmp_path / "p.csv", rows)
    assert [p.content for p in load_prompts(tmp_path / "p.csv")] == [r["prompt"] for r in rows]


def test_a_blank_reference_is_none(tmp_path):
    """A CSV file has no other way to leave one out, and an empty text is like no answer."""
    answers = ["", " \n", "3"]
    rows = [{**row, "answer": answer} for row, answer in zip(ROWS, answers, strict=True)]
    write_csv(tmp_path / "p.csv", rows)
    prompts = load_prompts(tmp_path / "p.csv", reference_column="answer")
    assert [p.reference for p in prompts] == [None, None, "3"]


def test_template_columns_and_messages(tmp_path, jsonl):
    prompts = load_prompts(jsonl, prompt_template="On {topic}:\n{prompt}")
    assert prompts[0].content == "On x:\nOne?"
    assert load_prompts(jsonl, prompt_column="topic")[2].content == "007"

    # Arrow fills keys that only some messages have with null.
    chat = [{**message, "name": None} for message in CHAT]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": chat}])
    assert load_prompts(path)[0].content == CHAT


def test_arguments_of_other_rows_are_no_part_of_a_prompt(tmp_path):
    """As in a file that was made of a table of Arrow's, or in a data set of the hub."""
    rows = [
        {"prompt": [*CHAT, {"role": "tool", "content": "", "tool_calls": [{"arguments": more}]}]}
        for more in ({"x": 1, "text": None}, {"x": None, "text": "hi"})
    ]
    rows = [
        {"prompt": [{**m, "tool_calls": m.get("tool_calls")} for m in r["prompt"]]} for r in rows
    ]
    for prompt, left in zip(
        load_prompts(write_jsonl(tmp_path / "p.jsonl", rows)),
        ({"x": 1}, {"text": "hi"}),
        strict=True,
    ):
        assert prompt.content[-1]["tool_calls"] == [{"arguments": left}]


def test_a_system_message_alone_can_be_a_prompt(tmp_path):
    said = "Say something."
    for texts, fits in ([said], True), (["\u200b"], False), (["", said], True), (["", " "], False):
        path = write_jsonl(
            tmp_path / "p.jsonl",
            [{"prompt": [{"role": "system", "content": text} for text in texts]}],
        )
        if fits:
            assert load_prompts(path)[0].content[-1]["content"] == said
        else:
            with pytest.raises(UsageError, match="blank prompt"):
                load_prompts(path)


def test_tools_belong_to_a_prompt_of_messages(tmp_path):
    tool = {"name": "f"}
    rows = [{"prompt": CHAT, "tools": given} for given in ([], [tool], json.dumps([tool]))]
    found = load_prompts(write_jsonl(tmp_path / "tools.jsonl", rows))
    assert [list(prompt.tools) for prompt in found] == [[], [tool], [tool]]
    assert found[0].id == load_prompts(write_jsonl(tmp_path / "a.jsonl", rows[:1]))[0].id
    assert found[2].id == f"{found[1].id}-1" != f"{found[0].id}-1"
    assert len({prompt.digest for prompt in found}) == 2
    called = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
              {"role": "tool", "content": "4"}]  # fmt: skip
    (prompt,) = load_prompts(write_jsonl(tmp_path / "called.jsonl", [{"prompt": called}]))
    assert prompt.content == called
    assert prompt.has_tools


def test_tools_that_no_model_would_see_are_refused(tmp_path):
    for row, says in (
        (
            {"prompt": CHAT, "chat_template_kwargs": {"think": True}},
            "row 1 has chat_template_kwargs",
        ),
        ({"prompt": "say", "tools": [{"name": "f"}]}, "row 1 has tools and a prompt of plain text"),
    ):
        with pytest.raises(UsageError, match=says):
            load_prompts(write_jsonl(tmp_path / "tools.jsonl", [row]))
    path = write_jsonl(tmp_path / "text.jsonl", [{"prompt": "Which tools?", "tools": "saw"}])
    assert load_prompts(path)[0].content == "Which tools?"


def test_a_hub_data_set_is_read_with_its_config_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = load_prompts("owner/data:main", split="test", limit=2)
    assert calls == [("owner/data", "main", "test", False)]
    assert [p.id for p in prompts] == ["a", "b"]


def test_a_folder_of_data_files_is_read(tmp_path, jsonl, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    assert [p.id for p in load_prompts(folder)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'q'}]",
        ' [ {"content": "q",\n "role": "user"}, {"role": "assistant", "content": "a"} ]\n',
        "[{'role': 'user', 'content': 'q'}\n {'role': 'user', 'content': 'q'}]",  # numpy's
    ],
)
def test_messages_that_a_spreadsheet_made_text_of_are_refused(text, tmp_path):
    from plad_fast.recipe.inputs import read_pairs

    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2
    write_csv(tmp_path / "p.csv", [rows[0], {**rows[0], "prompt": text}])
    assert "row 2, column 'prompt' holds a list of chat messages" in message_of(tmp_path / "p.csv")
    for column in rows[0]:
        write_csv(tmp_path / "p.csv", [rows[0], {**rows[0], column: text}])
        with pytest.raises(UsageError, match=f"row 2, column '{column}' holds a list of chat"):
            read_pairs(str(tmp_path / "p.csv"))
    told = f"Write this as YAML: {text}"
    write_csv(tmp_path / "p.csv", [{**rows[0], "prompt": told}])
    assert load_prompts(tmp_path / "p.csv")[0].content == told.replace("\r\n", "\n")


def test_a_folder_without_data_is_called_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    message = message_of(tmp_path / "data")
    assert message.startswith(f"cannot load the folder '{tmp_path / 'data'}' as a data set")


def test_ids_do_not_depend_on_the_limit(tmp_path):
    rows = [{"prompt": text} for text in ("same", "other", "same", "same")]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    ids = [p.id for p in load_prompts(path)]
    assert len(set(ids)) == 4
    assert ids[2:] == [f"{ids[0]}-1", f"{ids[0]}-2"]
    for limit in range(1, 5):
        assert [p.id for p in load_prompts(path, limit=limit)] == ids[:limit]
    # A stored run has to be found again by a later release.
    assert ids[0] == "106c4202d3d02a3f"


@pytest.mark.parametrize("ids", [[1, 1], [None, "x"]], ids=["repeated", "null"])
def test_an_id_column_that_is_not_unique_is_not_used(tmp_path, caplog, ids):
    rows = [{"id": ids[0], "prompt": "One?"}, {"id": ids[1], "prompt": "Two?"}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    # Also with a limit that hides the second occurrence, or the ids would change with it.
    assert load_prompts(path, limit=1)[0].id == load_prompts(path)[0].id
    assert len({p.id for p in load_prompts(path)}) == 2
    assert "not unique" in caplog.text


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_prompts(name):
    prompts = builtin_prompts(name)
    assert len(prompts) >= 400
    require_unique_ids(prompts)
    with builtin_file(name) as path:
        answers = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    assert len(answers) == len(prompts)
    assert all(answers)


def test_builtin_calendar_entries_say_what_their_messages_say():
    with builtin_file("builtin:calendar") as path:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for row in rows:
        message = row["prompt"][-1]["content"].lower()
        event, day, time, place = row["answer"].lower().split(", ")
        said = [event, place, *(rf"\b{word}" for word in day.split())]
        assert all(re.search(pattern, message) for pattern in said), row
        assert re.fullmatch(r"(0[89]|1\d|20):[0-5]\d", time), row


def test_as_messages(tiny_tokenizer):
    assert as_messages(tiny_tokenizer, "Hi") == [{"role": "user", "content": "Hi"}]
    assert as_messages(tiny_tokenizer, CHAT) is CHAT
    assert as_messages(types.SimpleNamespace(chat_template=None), "Hi") == "Hi"


def test_missing_file_names_its_neighbour(jsonl):
    message = message_of(jsonl.with_name("promts.jsonl"))
    assert "no file" in message
    assert f"did you mean '{jsonl}'?" in message
    assert "no file" in message_of("nowhere/at/all/prompts.csv")
    assert "no file" in message_of("./nowhere/prompts")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"prompt_column": "question"}, "but 'id', 'prompt', 'topic', 'answer'"),
        ({"prompt_column": "question"}, "--prompt-column"),
        ({"reference_column": "gold"}, "--reference-column"),
        ({"prompt_column": "prompt", "prompt_template": "{prompt}"}, "both given"),
        ({"prompt_template": "{question}"}, "names {question}, which is no column"),
        ({"prompt_template": "{question}"}, "has 'id', 'prompt', 'topic', 'answer'"),
        ({"prompt_template": "{}"}, "names {}, which is no column"),
        ({"prompt_template": "Say something."}, "names no column"),
        ({"prompt_template": "{prompt"}, "malformed"),
        ({"prompt_template": "{prompt.text}"}, "row 1 does not fit the prompt template"),
        ({"prompt_template": "{prompt:d}"}, "row 1 does not fit the prompt template"),
    ],
)
def test_bad_options(jsonl, options, expected):
    assert expected in message_of(jsonl, **options)


def test_gaps_in_columns(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"q": "a", "r": "b"}, {"q": None, "r": 5}])
    assert "--prompt-column" in message_of(path)
    assert "row 2 has no 'q' for the prompt template" in message_of(path, prompt_template="{q}")
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "r": 5}])
    assert "a reference is text or null" in message_of(path, reference_column="r")


def test_hub_failures_are_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")
    # HF_HUB_OFFLINE is set for the tests: this is the library's own way of failing.
    message = message_of("someuser/no-such-data")
    assert "cannot be reached" in message
    assert "\n" not in message

    def failing(error):
        def load_dataset(*args, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    failing(datasets.exceptions.DatasetNotFoundError("no"))
    assert "neither a file nor an accessible hub data set" in message_of("someuser/nothing")
    failing(ValueError("Config name is missing.\nPlease pick one among the available configs"))
    assert "Config name is missing.; name a split" in message_of("someuser/many")


def test_repeated_ids_are_refused():
    with pytest.raises(UsageError, match="1 prompt ids are used more than once, among them 'x'"):
        require_unique_ids([Prompt("x", "a"), Prompt("x", "b"), Prompt("y", "c")])


def test_reading_files_needs_no_hub_library(jsonl, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_prompts(jsonl)) == 3


def test_halves_of_characters_in_ids_and_references_are_mended(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a\\ud83d", "prompt": "x", "ref": "Nice \\ud83d"}\n')
    assert load_prompts(path, reference_column="ref") == [Prompt("a\ufffd", "x", "Nice \ufffd")]
    path.write_text('{"id": "a\\ud83d", "prompt": "x"}\n{"id": "a\\ud83e", "prompt": "y"}\n')
    assert len({prompt.id for prompt in load_prompts(path)}) == 2
