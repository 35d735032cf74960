"""Chat templates: what rows bring to them, and what they show."""

from __future__ import annotations

import copy
import json

import pytest
from datasets import Dataset

from plad_fast.data.chat import is_blank
from plad_fast.data.text_ids import TextIds
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.models.response_scores import score_pairs

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0].missing.key }}", "UndefinedError"),
        ("{{ messages[7].content.upper() }}", "UndefinedError"),
        ("{{ messages | nofilter }}", "TemplateAssertionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ '%d' % messages[0].content }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ {} | first | tojson }}", "is not JSON serializable"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_what_a_chat_template_raises_is_a_refusal_with_the_row(tiny_tokenizer, template, said):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.name_or_path = "some/model"
    tokenizer.chat_template = template
    rows = [{"prompt": "p", "chosen": "a"}, {"prompt": CHAT, "chosen": "a"}]
    with pytest.raises(UsageError, match=r"data, row 2: .* some/model .* roles user") as caught:
        tokenize_dataset(rows, tokenizer, max_length=64, name="data")
    assert said in str(caught.value)


@pytest.mark.parametrize("prompt", ["hi", CHAT])
@pytest.mark.parametrize("repeated", [[], CHAT])
def test_responses_of_messages_answer_a_prompt_in_chat(tiny_tokenizer, prompt, repeated):
    """As in UltraFeedback: the prompt is text, and the responses are whole conversations."""
    chosen, rejected = ([*repeated, {"role": "assistant", "content": t}] for t in "ab")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for rows in ([row], Dataset.from_list([row])):
        [encoded] = tokenize_dataset(rows, tiny_tokenizer, max_length=32)
        text = tiny_tokenizer.decode(encoded["prompt_ids"])
        assert text == "<|bos|><|user|>hi<|end|><|assistant|>"
        texts = [tiny_tokenizer.decode(ids) for ids in encoded["response_ids"]]
        assert texts == ["a<|end|>", "b<|end|>"]


def test_a_template_that_marks_no_end_still_teaches_to_stop(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    group = TextIds(tokenizer).encode(CHAT, ["yes"], max_length=64)
    assert tokenizer.decode(group["prompt_ids"]) == "user: hi\nassistant: "
    assert tokenizer.decode(group["response_ids"][0]) == "yes<|end|>"


def test_messages_that_the_template_refuses_are_named(tiny_tokenizer):
    """Gemma's template raises for a system message."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    prompt = [{"role": "system", "content": "be kind"}, *CHAT]
    with pytest.raises(UsageError, match=r"row 1: .* roles system, user \(no system role\)"):
        tokenize_dataset([{"prompt": prompt, "chosen": "a"}], tokenizer, max_length=64)


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture(scope="module")
def tool_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if think %}hm{% endif %}"
        + tokenizer.chat_template
    )
    return tokenizer


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("arrow", [False, True])
def test_rows_bring_tools_and_options_to_the_chat_template(tool_tokenizer, tools, arrow):
    row = {"prompt": CHAT, "chosen": "a", "rejected": "b"}
    rows = [
        {**row, "tools": tools, "chat_template_kwargs": {"think": True}},
        {**row, "tools": None, "chat_template_kwargs": {"other": 1}},
    ]
    data = tokenize_dataset(
        Dataset.from_list(rows) if arrow else rows, tool_tokenizer, max_length=200
    )
    texts = [tool_tokenizer.decode(ids) for ids in data["prompt_ids"]]
    plain = "<|bos|><|user|>hi<|end|><|assistant|>"
    assert texts == [json.dumps(TOOLS) + "hm" + plain, plain]
    assert all(
        [tool_tokenizer.decode(ids) for ids in responses] == ["a<|end|>", "b<|end|>"]
        for responses in data["response_ids"]
    )


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", "f(", "row 1: tools is a text and no JSON"),
        ("tools", {"name": "f"}, "row 1: tools is a dict; give a list"),
        ("chat_template_kwargs", "think", "row 1: chat_template_kwargs is a str"),
        *(
            ("chat_template_kwargs", {name: "x"}, f"row 1: chat_template_kwargs has {name}, which")
            for name in (
                "tokenize",
                "chat_template",
                "messages",
                "tokenizer",
                "tools",
                "self",
                "conversation",
                "add_generation_prompt",
                "return_dict",
                "kwargs",
            )
        ),
    ],
)
def test_options_of_the_chat_template_are_checked(tool_tokenizer, column, value, message):
    row = {"prompt": CHAT, "chosen": "a", "rejected": "b", column: value}
    with pytest.raises(UsageError, match=message):
        tokenize_dataset([row], tool_tokenizer, max_length=200)


def test_tools_have_no_keys_of_other_rows(tool_tokenizer):
    """Arrow gives every struct the keys that one of them has."""
    rows = [
        {"prompt": CHAT, "chosen": "a", "rejected": "b",
         "tools": [{"name": "f", "parameters": {name: {"type": "string"}}}]}
        for name in ("city", "day")
    ]  # fmt: skip
    texts = [
        [tool_tokenizer.decode(ids) for ids in data["prompt_ids"]]
        for data in (
            tokenize_dataset(given, tool_tokenizer, max_length=200)
            for given in (rows, Dataset.from_list(rows))
        )
    ]
    assert texts[0] == texts[1]
    assert "null" not in texts[1][0]


def test_plain_text_passes_through_no_template(tiny_tokenizer):
    row = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    data = tokenize_dataset([{**row, "tools": "hammer"}], tiny_tokenizer, max_length=200)
    assert data.to_list() == tokenize_dataset([row], tiny_tokenizer, max_length=200).to_list()


def test_reserved_names_are_those_of_the_function_itself(tool_tokenizer):
    """Whichever version of transformers: a parameter is no variable of a template."""
    import inspect

    parameters = inspect.signature(tool_tokenizer.apply_chat_template).parameters
    row = {"prompt": CHAT, "chosen": "a", "rejected": "b"}
    for name in (parameters.keys() - {"documents"}) | {"bos_token", "eos_token"}:
        given = {**row, "chat_template_kwargs": {name: True}}
        with pytest.raises(UsageError, match=f"chat_template_kwargs has {name}"):
            tokenize_dataset([given], tool_tokenizer, max_length=200)
    documents = {**row, "chat_template_kwargs": {"documents": [{"title": "a", "text": "b"}]}}
    tokenize_dataset([documents], tool_tokenizer, max_length=200)


def test_template_options_reach_a_text_prompt_with_chat_responses(tool_tokenizer):
    row = {"prompt": "hi", "chosen": [{"role": "assistant", "content": "a"}], "tools": TOOLS}
    [found] = tokenize_dataset([row], tool_tokenizer, max_length=200)
    assert tool_tokenizer.decode(found["prompt_ids"]).startswith(json.dumps(TOOLS))


def test_a_default_of_null_in_a_list_of_tools_stays(tool_tokenizer):
    tools = [{"name": "f", "parameters": {"city": {"type": "string", "default": None}}}]
    row = {"prompt": CHAT, "chosen": "a", "rejected": "b", "tools": tools}
    [found] = tokenize_dataset([row], tool_tokenizer, max_length=200)
    assert tool_tokenizer.decode(found["prompt_ids"]).startswith(json.dumps(tools))


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufeff \u2060", "\u00ad", "\u3164", "\x00"])
def test_a_prompt_that_shows_nothing_is_empty(tiny_tokenizer, text):
    import copy

    from tokenizers import processors

    assert is_blank(text)
    assert not is_blank(text + ".")
    bare = copy.deepcopy(tiny_tokenizer)
    bare._tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(UsageError, match="empty"):
        TextIds(bare).prompt(text)
    row = {"chosen": f"{text} a", "rejected": f"{text} b"}
    with pytest.raises(UsageError, match="row 1: prompt is None"):
        tokenize_dataset([row], tiny_tokenizer, max_length=64)


def test_visible_characters_are_not_blank():
    for text in ("a", "。", "🙂", "\u0600", "٪", "-", "\u0301", "𝅘𝅥"):
        assert not is_blank(text)


def test_parquet_adds_no_nulls_to_what_is_nested(tmp_path):
    from plad_fast.recipe.inputs import read_pairs

    def row(**arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"prompt": CHAT, "chosen": [turn], "rejected": [turn], "reference": None}

    rows = [row(x=0), row(text="hi")]
    path = tmp_path / "pairs.parquet"
    Dataset.from_list(rows).to_parquet(path)
    assert read_pairs(str(path)) == rows


def test_a_dataset_of_pairs_is_scored_as_its_rows_are(tiny_model, tool_tokenizer):

    rows = [
        {"prompt": CHAT, "chosen": "a", "rejected": "b", "tools": [{"name": "f", key: 1}]}
        for key in ("x", "y")
    ]
    listed, arrow = (
        score_pairs(tiny_model, tool_tokenizer, data, progress=False)
        for data in (rows, Dataset.from_list(rows))
    )
    assert listed["chosen"].tolist() == arrow["chosen"].tolist()
