"""Messages as text and tokens: what of them is trained, what is refused, and what is only text."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import ByT5Tokenizer

from plad_fast.data.chat import written_out
from plad_fast.data.text_ids import TextIds
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from tests.support.tokenizer_families import (
    BOS,
    SPECIALS,
    TEMPLATES,
    byte_level,
    load,
    sentencepiece_bpe,
    single_bytes,
    unigram,
    word_piece,
)

USER = [{"role": "user", "content": "What is the sky?"}]
THOUGHT = "<think>\nhm\n</think>\n\nblue"


def says(text, **more):
    return [{"role": "assistant", "content": text, **more}]


def trained(tokenizer, prompt, response, **options):
    """Prompt and response as text."""
    group = TextIds(tokenizer).encode(prompt, [response], max_length=2000, **options)
    return tokenizer.decode(group["prompt_ids"]), tokenizer.decode(group["response_ids"][0])


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        ("deepseek-r1", "blue", ("<｜Assistant｜>", "blue")),  # noqa: RUF001
        ("deepseek-r1", THOUGHT, ("<think>\n", "hm\n</think>\n\nblue")),
        ("deepseek-r1", "<think>hm</think>blue", ("<think>\n", "hm</think>blue")),
        ("deepseek-r1", "hm\n</think>\n\nblue", ("<think>\n", "hm\n</think>\n\nblue")),
        ("nemotron", "blue", ("<think>", "</think>blue")),
        ("nemotron", THOUGHT, ("<think>\n", "hm\n</think>\n\nblue")),
        ("nemotron", "hm\n</think>\n\nblue", ("<think>\n", "hm\n</think>\n\nblue")),
        ("no thinking", "blue", ("<think>\n\n</think>\n\n", "blue")),
        ("no thinking", THOUGHT, ("<think>\n", "hm\n</think>\n\nblue")),
        ("no thinking", "hm\n</think>\n\nblue", ("<think>\n", "hm\n</think>\n\nblue")),
        ("strips", "blue", ("assistant\n", "blue")),
        ("strips", THOUGHT, ("assistant\n", THOUGHT)),
        ("doubles", "blue", ("<think>\n", "\n</think>\n\nblue")),
        ("doubles", THOUGHT, ("<think>\n", "hm\n</think>\n\nblue")),
        ("doubles", "<think>\nhm", ("<think>\n", "hm")),
        # Tags of another kind are text; of two thoughts the template would lose what is between.
        (
            "deepseek-r1",
            "[THINK]hm[/THINK]blue",
            ("<｜Assistant｜>", "[THINK]hm[/THINK]blue"),  # noqa: RUF001
        ),
        ("nemotron", "<thinking>hm</thinking>", ("<think>", "</think><thinking>hm</thinking>")),
        (
            "no thinking",
            "<think>hm</think>green<think>no</think>blue",
            ("<think>", "hm</think>green<think>no</think>blue"),
        ),
    ],
)
@pytest.mark.parametrize("turns", [1, 2])
def test_thoughts_are_trained_once_and_plain_answers_outside_of_them(
    template, answer, expected, turns
):
    """By what each of these templates makes of a conversation's last answer."""
    chat = (
        "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{%% endfor %%}"
        "{%% if add_generation_prompt %%}<|im_start|>assistant\n%s{%% endif %%}"
    )
    parts = (
        "{% if m.role == 'user' %}{{ m.content }}{% else %}<think>\n"
        "{% if '</think>' in m.content %}"
        "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}{% endif %}"
        "{{ '\n</think>\n\n' + m.content.split('</think>')[-1].lstrip() }}{% endif %}"
    )
    emptied = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    others = {
        "no thinking": chat % (parts, "<think>\n\n</think>\n\n"),
        "strips": chat % ("{{ m.content.split('</think>')[-1] | trim }}", ""),
        "doubles": chat % (emptied, "<think>\n"),
    }
    end = "<｜end▁of▁sentence｜>" if template == "deepseek-r1" else "<|im_end|>"  # noqa: RUF001
    tokenizer = load(single_bytes(), TEMPLATES.get(template) or others[template], eos=end)
    prompt = USER if turns == 1 else [*USER, *says(THOUGHT), *USER]
    before, after = trained(tokenizer, prompt, says(answer))
    assert before.endswith(expected[0])
    assert after == expected[1] + end
    assert (before + after).count("<think>\n<think>") == 0


def test_where_earlier_turns_change_the_answer_stands_behind_the_prompt_as_it_is_asked():
    """A split at the common start would train what the user said."""
    template = TEMPLATES["qwen"].replace("{{ m.content }}", "{{ m.content }}{{ '!' if loop.last }}")
    tokenizer = load(single_bytes(), template, eos="<|im_end|>")
    before, after = trained(tokenizer, USER, says("blue"))
    assert before.endswith("What is the sky?!<|im_end|>\n<|im_start|>assistant\n")
    assert after == "blue!<|im_end|>"
    with pytest.raises(UsageError, match="the response has tool_calls"):
        TextIds(tokenizer).encode(USER, [says("", tool_calls=[CALL])], max_length=500)


CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}


@pytest.fixture(scope="module")
def qwen():
    return load(byte_level(), TEMPLATES["qwen"], eos="<|im_end|>", bos=False)


@pytest.mark.parametrize(
    ("content", "arrow"),
    [("", False), (None, False), ([{"type": "text", "text": ""}], False), ("", True), (None, True)],
)
def test_the_whole_message_of_a_response_is_trained(qwen, content, arrow):
    chosen = says(content, tool_calls=[CALL], refusal=None, annotations=[])
    rows = [
        {"prompt": USER, "chosen": chosen, "rejected": says("no")},
        {"chosen": [*USER, *chosen], "rejected": [*USER, *says("no")]},
    ]
    for row in rows:
        data = tokenize_dataset(Dataset.from_list([row]) if arrow else [row], qwen, max_length=500)
        called, plain = map(qwen.decode, data[0]["response_ids"])
        assert '"arguments": {"city": "Rome"}' in called
        assert called.endswith("</tool_call><|im_end|>")
        assert plain == "no<|im_end|>"


def test_a_call_that_ends_in_its_own_mark_still_ends_the_turn():
    """GLM's template marks no end of a turn, and the last token of a call is an added one."""
    tokenizer = load(byte_level(), TEMPLATES["qwen"].replace("<|im_end|>\n", ""), eos="<|im_end|>")
    assert trained(tokenizer, USER, says("", tool_calls=[CALL]))[1].endswith(
        "</tool_call><|im_end|>"
    )


@pytest.mark.parametrize("key", ["reasoning_content", "name", "weight", "thinking"])
def test_a_key_that_the_template_does_not_show_is_refused_by_name(qwen, key):
    row = {"prompt": USER, "chosen": says("blue", **{key: "x"}), "rejected": says("no")}
    with pytest.raises(UsageError, match=f"row 1: .* the key '{key}', which the chat template"):
        tokenize_dataset([row], qwen, max_length=500)
    # Without a value it says nothing.
    row["chosen"] = says("blue", **{key: ""})
    tokenize_dataset([row], qwen, max_length=500)


def test_a_content_that_the_template_leaves_out_beside_a_call_is_refused():
    """Llama 3.1's writes either the one or the other."""
    template = TEMPLATES["qwen"].replace(
        "{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
    )
    tokenizer = load(byte_level(), template, eos="<|im_end|>")
    with pytest.raises(UsageError, match="the key 'content', which the chat template"):
        TextIds(tokenizer).encode(USER, [says("I look it up.", tool_calls=[CALL])], max_length=500)
    assert "Rome" in trained(tokenizer, USER, says("", tool_calls=[CALL]))[1]


def test_a_thought_in_the_content_and_beside_it_is_refused():
    template = TEMPLATES["qwen"].replace(
        "{{ m.content }}", "<think>{{ m.reasoning_content }}</think>{{ m.content }}"
    )
    tokenizer = load(byte_level(), template, eos="<|im_end|>")
    with pytest.raises(UsageError, match="reasoning_content"):
        trained(tokenizer, USER, says("<think>hm</think>blue", reasoning_content="hm"))


def test_two_names_of_one_thought_are_one():
    template = TEMPLATES["qwen"].replace(
        "{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}"
    )
    tokenizer = load(byte_level(), template, eos="<|im_end|>")
    both = says("blue", reasoning="hm", reasoning_content="hm")
    assert trained(tokenizer, USER, both)[1] == "hmblue<|im_end|>"


def test_parts_of_a_content_are_one_text_and_others_are_refused(qwen):
    parts = [{"type": "text", "text": "bl"}, {"type": "text", "text": "ue", "image_url": None}]
    assert trained(qwen, USER, says(parts))[1] == "blue<|im_end|>"
    assert trained(qwen, [{"role": "user", "content": parts}], "x")[0].endswith(
        "blue<|im_end|>\n<|im_start|>assistant\n"
    )
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "thinking"}, 3):
        row = {"prompt": USER, "chosen": says([part]), "rejected": says("no")}
        with pytest.raises(UsageError, match=r"row 1: chosen has a message with a part .*text"):
            tokenize_dataset([row], qwen, max_length=500)


def test_templates_that_write_none_get_an_empty_content():
    """Some ask whether the content is null, and some write it as it is."""
    prompt = [*USER, *says(None, tool_calls=[CALL]), {"role": "tool", "content": "18 C"}]
    tokenizer = load(byte_level(), TEMPLATES["qwen"], eos="<|im_end|>")
    assert "None" not in trained(tokenizer, prompt, "ok")[0]
    with pytest.raises(UsageError, match="whose content is None"):
        TextIds(tokenizer).encode(says(None, tool_calls=None), ["x"], max_length=500)
    with pytest.raises(UsageError, match="whose content is None"):
        TextIds(tokenizer).encode(
            [{"role": "user", "content": None, "name": "a"}], ["x"], max_length=500
        )


def test_a_prompt_that_ends_in_an_answer_is_refused(qwen):
    prompt = [*USER, *says('{"a":')]
    for ask in (
        lambda: TextIds(qwen).prompt(prompt),
        lambda: tokenize_dataset([{"prompt": prompt, "chosen": " 1}"}], qwen, max_length=99),
    ):
        with pytest.raises(UsageError, match="the prompt ends in an assistant message"):
            ask()


def test_nulls_of_other_rows_are_left_out_and_those_of_lists_stay(qwen):
    def row(**arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {
            "prompt": [*USER, *says("", tool_calls=[call]), *USER],
            "chosen": says("", tool_calls=[call]),
            "rejected": says("no"),
        }

    rows = [row(x={"a": 0}), row(x={"b": 1}, text="hi")]
    listed = tokenize_dataset(rows, qwen, max_length=2000)
    table = Dataset.from_list(rows)
    # Also where a list or a file was made of one.
    for given in (table, table.to_list(), json.loads(json.dumps(table.to_list()))):
        found = tokenize_dataset(given, qwen, max_length=2000)
        assert found.to_list() == listed.to_list()
    [meant] = tokenize_dataset([row(x=None)], qwen, max_length=2000)
    assert '{"x": null}' in qwen.decode(meant["prompt_ids"])
    assert '{"x": null}' in qwen.decode(meant["response_ids"][0])
    _, meant = tokenize_dataset([row(x=1, y=2), row(x=None, y=3)], qwen, max_length=2000)
    assert '{"x": null, "y": 3}' in qwen.decode(meant["response_ids"][0])


def test_json_text_of_arguments_goes_through_as_it_is():
    template = TEMPLATES["qwen"].replace("call | tojson", "call.function.arguments")
    tokenizer = load(byte_level(), template, eos="<|im_end|>")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}
    rows = [{"prompt": USER, "chosen": says("", tool_calls=[call]), "rejected": says("no")}]
    for data in (rows, Dataset.from_list(rows)):
        [found] = tokenize_dataset(data, tokenizer, max_length=500)
        assert '<tool_call>\n{"x": null}\n</tool_call>' in tokenizer.decode(
            found["response_ids"][0]
        )


@pytest.mark.parametrize(
    "backend",
    [
        byte_level,
        unigram,
        word_piece,
        *(lambda s=s: sentencepiece_bpe(s) for s in ("legacy", "always", "first")),
    ],
    ids=["byte-level", "Unigram", "WordPiece", "legacy", "always", "first"],
)
def test_special_tokens_in_messages_are_text(backend, caplog):
    tokenizer = load(backend(), TEMPLATES["qwen"], eos="<|im_end|>")
    said = "blue<|im_end|> <s>green</s><|ad_hoc|><|im_start|>user"
    prompt = [{"role": "user", "content": "<|im_start|>sky?"}]
    group = TextIds(tokenizer).encode(prompt, [said, "blue"], max_length=500)
    ids = group["prompt_ids"] + group["response_ids"][0]
    marks = [token for token in tokenizer.convert_ids_to_tokens(ids) if token in SPECIALS[2:]]
    assert marks == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    squeezed = "".join(tokenizer.decode(ids).split())
    if backend is not word_piece:  # which writes in lower case, with spaces around signs
        assert said.replace(" ", "") in squeezed
    with caplog.at_level(logging.WARNING, logger="plad_fast.data.tokenization"):
        row = {"prompt": prompt, "chosen": said, "rejected": "blue"}
        tokenize_dataset([row], tokenizer, max_length=500)
    assert any("1 of 1 rows hold special tokens" in r.getMessage() for r in caplog.records)

    as_they_stand = TextIds(tokenizer, split_special_tokens=False)
    [as_tokens] = as_they_stand.encode(prompt, [said], max_length=500)["response_ids"]
    assert tokenizer.convert_tokens_to_ids("<|ad_hoc|>") in as_tokens
    assert tokenizer.bos_token_id in as_tokens


def test_special_tokens_in_messages_are_the_bytes_of_their_text():
    tokenizer = load(single_bytes(), TEMPLATES["qwen"], eos="<|im_end|>")
    said = "a<|im_end|></s>b"
    group = TextIds(tokenizer).encode([{"role": "user", "content": said}], [said], max_length=500)
    start, newline = (
        tokenizer.convert_tokens_to_ids("<|im_start|>"),
        tokenizer("\n")["input_ids"][1:],
    )
    text = tokenizer(said, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(text) == len(said)
    head = tokenizer("user\n", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    assert group["prompt_ids"][: len(head) + len(text) + 2] == [start, *head, *text, end]
    assert group["prompt_ids"][-1:] == newline
    assert group["response_ids"] == [[*text, end]]


def test_text_that_no_special_token_is_in_has_the_tokens_of_the_tokenizer_itself(qwen):
    """The renamed tokenizer is the same one: only what is special differs."""
    from plad_fast.data.special_tokens import SpecialText

    text = SpecialText(qwen)
    rendered = "<|im_start|>user\nWhat is the sky?<|im_end|>\n"
    hidden = text.hide("</s>")
    [first, second] = text.ids([rendered + hidden, rendered])
    assert second == qwen(rendered, add_special_tokens=False)["input_ids"]
    assert first[: len(second)] == second
    assert qwen.eos_token_id not in first[len(second) :]
    assert qwen.decode(first[len(second) :]) == "</s>"


def test_no_message_can_forge_a_special_token(qwen):
    from plad_fast.data import special_tokens as _special_text

    for digits in (_special_text._MARK, _special_text._RENAMED):
        forged = f"{digits}{qwen.eos_token_id:07}</s>"
        with pytest.raises(UsageError, match=digits):
            TextIds(qwen).encode(USER, [forged], max_length=99)
    [ids] = TextIds(qwen).encode(USER, ["<|im_<|im_end|>end|>"], max_length=99)["response_ids"]
    assert ids.count(qwen.eos_token_id) == 1


def test_marks_of_thoughts_and_calls_and_plain_text_stay_tokens(qwen):
    ids = TextIds(qwen).encode(USER, ["<think>hm</think><tool_call>"], max_length=99)[
        "response_ids"
    ]
    tokens = qwen.convert_ids_to_tokens(ids[0])
    assert {"<think>", "</think>", "<tool_call>"} <= set(tokens)
    ids = TextIds(qwen).prompt(f"<|im_start|>user\nsky?<|im_end|>{BOS}")
    assert qwen.convert_tokens_to_ids("<|im_start|>") in ids
    assert ids[-1] == qwen.bos_token_id


def test_a_slow_tokenizer_refuses_special_tokens_in_messages_by_name(qwen, monkeypatch):
    monkeypatch.setattr(type(qwen), "is_fast", False)
    with pytest.raises(UsageError, match=r"'<\|im_end\|>'.*split_special_tokens=False"):
        TextIds(qwen).encode(USER, ["a<|im_end|>b"], max_length=99)
    assert TextIds(qwen).encode(USER, ["a"], max_length=99)["fits"]
    # What is a special token by its name alone is one.
    bytes_alone = ByT5Tokenizer()
    bytes_alone.chat_template = TEMPLATES["zephyr"]
    with pytest.raises(UsageError, match="'</s>'"):
        TextIds(bytes_alone).encode(USER, ["a</s>b"], max_length=99)


TRL = ["deepseek_r1_distill", "nemotron_3_nano", "qwen3", "qwen3_5_nothink", "qwen3_5_think",
       "gemma3", "llama3", "glm4moe", "gptoss", "phi3", "qwen2_5", "cohere2", "lfm2"]  # fmt: skip


@pytest.mark.parametrize("name", TRL)
def test_templates_as_models_ship_them(name):
    """Plain answers are trained as the template writes them, and thoughts are kept, once."""
    trl = pytest.importorskip("trl", reason="TRL, which ships the templates, is not installed")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this TRL ships no {path.name}")
    tokenizer = load(byte_level(), path.read_text(encoding="utf-8"), eos="<|im_end|>")
    for prompt in (USER, [*USER, *says("blue"), *USER]):
        before, after = trained(tokenizer, prompt, says("green"))
        full = tokenizer.apply_chat_template([*prompt, *says("green")], tokenize=False).rstrip()
        assert (before + after).removesuffix("<|im_end|>") == full.removesuffix("<|im_end|>")
        assert not before.endswith(("<think>", "<think>\n")) or "</think>" in after
        before, after = trained(tokenizer, prompt, says(THOUGHT))
        text = before + after
        assert "hm" in after
        assert "".join(text.split()).count("<think>hm</think>blue") == 1
        assert text.count("<think>") == text.count("</think>")


def test_readers_see_all_of_a_message():
    """A judge, and whoever reads a report."""
    messages = [*USER, *says(None, tool_calls=[CALL], name=None), {"role": "tool", "content": "18"}]
    assert written_out(messages) == (
        f"user: What is the sky?\n\nassistant: tool_calls: {json.dumps([CALL])}\n\ntool: 18"
    )
