"""Token ids, row numbers and offsets decide which probabilities are trained: checked one by one."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
from datasets import Dataset

from plad_fast.data.chat import is_blank
from plad_fast.data.rows import TokenLimits
from plad_fast.data.tokenization import encode_group, encode_prompt, tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.models.response_scores import score_pairs

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def eos_tokenizer(tiny_tokenizer):
    """Like T5's or some Qwen forks': it also appends EOS to whatever it encodes."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    bos, end = tokenizer.bos_token, tokenizer.eos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {end}",
        special_tokens=[(bos, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)],
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return tokenizer


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", "<|bos|>ab"),  # plain text gets BOS
        ("<|bos|>ab", "<|bos|>ab"),  # but not twice, when the text was rendered before
        (CHAT, "<|bos|><|user|>hi<|end|><|assistant|>"),  # the template writes its own BOS
    ],
)
def test_prompt_has_one_bos_and_no_eos(tiny_tokenizer, eos_tokenizer, prompt, expected):
    for tokenizer in (tiny_tokenizer, eos_tokenizer):
        assert text_of(tokenizer, encode_prompt(tokenizer, prompt)) == expected


def test_responses_end_their_turn_once(tiny_tokenizer, eos_tokenizer):
    """The end mark is trained, and a tokenizer that appends EOS does not double it."""
    for tokenizer in (tiny_tokenizer, eos_tokenizer):
        group = encode_group(
            tokenizer, CHAT, ["yes", [{"role": "assistant", "content": "no"}]], max_length=64
        )
        texts = [text_of(tokenizer, ids) for ids in group["response_ids"]]
        assert texts == ["yes<|end|>", "no<|end|>"]
        assert (group["truncated"], group["fits"]) == (False, True)


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_text_that_ends_in_eos_gets_no_other(tiny_tokenizer, eos_tokenizer, encoder_decoder):
    """As in TRL, where it is added only if it is missing."""
    for tokenizer in (tiny_tokenizer, eos_tokenizer):
        group = encode_group(
            tokenizer, "p", ["yes<|end|>", "no"], max_length=64, encoder_decoder=encoder_decoder
        )
        ends = [ids.count(tokenizer.eos_token_id) for ids in group["response_ids"]]
        assert ends == [1, 1]
        assert all(ids[-1] == tokenizer.eos_token_id for ids in group["response_ids"])


def test_left_cut_keeps_bos_and_the_end_of_the_prompt(tiny_tokenizer):
    group = encode_group(tiny_tokenizer, "abcdef", ["xyz", "x"], max_length=7)
    # The longest response is xyz and its end mark: three tokens are left for the prompt.
    assert text_of(tiny_tokenizer, group["prompt_ids"]) == "<|bos|>ef"
    assert (group["truncated"], group["fits"]) == (True, True)


def test_right_cut_keeps_the_start_of_the_prompt(tiny_tokenizer):
    group = encode_group(tiny_tokenizer, "abcdef", ["xyz"], max_length=7, truncation_side="right")
    assert text_of(tiny_tokenizer, group["prompt_ids"]) == "<|bos|>ab"


def test_response_is_never_cut(tiny_tokenizer):
    group = encode_group(tiny_tokenizer, "p", ["x" * 20], max_length=10)
    assert not group["fits"]
    assert len(group["response_ids"][0]) == 21


def test_empty_prompt_without_bos_is_refused(tiny_tokenizer):
    """Nothing would predict the first response token."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(UsageError, match="empty"):
        encode_prompt(tokenizer, "")


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"chosen": "a", "rejected": "b"}, ["a", "b"]),
        ({"chosen": "a", "rejected": ["b", "c"]}, ["a", "b", "c"]),
        ({"responses": ["a", "b", "c"]}, ["a", "b", "c"]),
        ({"chosen": "a"}, ["a"]),
        ({"completion": "a"}, ["a"]),
        (
            {
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
            ["a", "b"],
        ),
        (
            {"chosen": "a", "rejected": "a"},
            ["a", "a"],
        ),  # equal texts are the pair factory's business
    ],
)
@pytest.mark.parametrize("prompt", ["p", CHAT])
def test_every_dataset_form(tiny_tokenizer, prompt, row, texts):
    data = tokenize_dataset([{"prompt": prompt, **row}], tiny_tokenizer, max_length=32)
    decoded = [text_of(tiny_tokenizer, ids) for ids in data[0]["response_ids"]]
    assert decoded == [text + "<|end|>" for text in texts]
    assert set(data.column_names) == {"prompt_ids", "response_ids", "length"}


def test_first_only_and_scores(tiny_tokenizer):
    row = {"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}
    row |= {"chosen_score": 0.9, "rejected_score": [0.2, 0.1]}
    data = tokenize_dataset([row], tiny_tokenizer, max_length=32, with_scores=True)
    assert data[0]["scores"] == [0.9, 0.2, 0.1]
    data = tokenize_dataset([row], tiny_tokenizer, max_length=32, first_only=True)
    assert len(data[0]["response_ids"]) == 1
    ranked = [{"prompt": "p", "responses": ["a", "b"], "scores": [2, 1]}]
    data = tokenize_dataset(ranked, tiny_tokenizer, max_length=32, with_scores=True)
    assert data[0]["scores"] == [2, 1]


@pytest.mark.parametrize("arrow", [False, True])
def test_scores_that_a_loss_can_go_without_are_read_where_there_are_some(tiny_tokenizer, arrow):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    unscored = {**row, "chosen_score": None, "rejected_score": None}
    scored = {**row, "chosen_score": 2.0, "rejected_score": 1.0}

    def encode(rows):
        rows = Dataset.from_list(rows) if arrow else rows
        return tokenize_dataset(rows, tiny_tokenizer, max_length=32, with_scores=None)

    assert encode([scored, scored])["scores"][0] == [2.0, 1.0]
    for rows in ([row], [unscored]):
        assert "scores" not in encode(rows).column_names
    for wrong in (unscored, {**scored, "rejected_score": None}):
        with pytest.raises(UsageError, match=r"row 2: the scores are .* give one each"):
            encode([scored, wrong])


@pytest.mark.parametrize("arrow", [False, True])
def test_reference_logps_of_text_rows_are_kept(tiny_tokenizer, arrow):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "reference_logps": [-1.0, -2.5]}

    def encode(row, **options):
        rows = [
            {"prompt": "p", "chosen": "a" * 30, "rejected": "b", "reference_logps": [0, 0]},
            row,
        ]
        rows = Dataset.from_list(rows) if arrow else rows
        [found] = tokenize_dataset(rows, tiny_tokenizer, **{"max_length": 16, **options})
        return found

    assert encode(row)["reference_logps"] == [-1.0, -2.5]
    assert encode(row, first_only=True)["reference_logps"] == [-1.0]
    assert "reference_logps" not in encode(row, with_reference=False)
    for wrong, message in (
        (
            {**row, "reference_logps": [-1.0]},
            r"row 2: reference_logps are \[-1.0\] for 2 responses",
        ),
        ({**row, "reference_logps": None}, "row 2: reference_logps are None for 2 responses"),
        ({**row, "reference_logps": [-1.0, math.inf]}, "give a finite number each"),
        ({**row, "prompt": "p" * 30}, "row 2: reference_logps are of the whole prompt"),
    ):
        with pytest.raises(UsageError, match=message):
            encode(wrong)


def test_cut_prompts_and_dropped_rows_are_counted_once(tiny_tokenizer, caplog):
    rows = [
        {"prompt": "p" * 30, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a" * 30, "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    with caplog.at_level(logging.WARNING, logger="plad_fast.data.tokenization"):
        data = tokenize_dataset(rows, tiny_tokenizer, max_length=16, name="train_dataset")
    assert len(data) == 2
    assert max(data["length"]) == 16
    [record] = caplog.records
    assert "train_dataset: 1 of 3 prompts were cut and 1 rows dropped" in record.getMessage()


def test_tokenised_rows_are_taken_as_they_are(tiny_tokenizer):
    row = {"prompt_ids": [1], "response_ids": [[2], [3, 4]], "scores": [0.5, 0.25]}
    found = tokenize_dataset(Dataset.from_list([row]), tiny_tokenizer, max_length=2)
    assert found.to_list() == [{**row, "length": 3}]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no rows"),
        ({"prompt": "p"}, {}, "pass a datasets.Dataset, a DataFrame or a list"),
        ([{"question": "q", "chosen": "a"}], {}, "has the columns chosen, question"),
        ([{"prompt": "p", "answer": "a"}], {}, "has the columns answer, prompt"),
        ([{"prompt": "p", "chosen": "a" * 9}], {"max_length": 8}, "raise max_length"),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b"}],
            {"with_scores": True},
            "chosen_score and rejected_score",
        ),
        (
            [{"prompt": "p", "responses": ["a", "b"]}],
            {"with_scores": True},
            "this loss needs scores in scores",
        ),
        (
            [{"prompt": "p", "responses": ["a", "b"], "scores": [1.0]}],
            {"with_scores": True},
            "row 1: the scores are .* give one each",
        ),
        (
            [{"prompt": "p", "responses": ["a", "b"]}, {"prompt": "p", "responses": ["a"]}],
            {},
            "1 or 2 responses",
        ),
        (["p"], {}, "row 1 is a str"),
        (
            [{"prompt": "p", "chosen": "a"}, {"prompt": "p", "chosen": None}],
            {},
            "row 2: chosen is None; it should be text or a list",
        ),
        ([{"prompt": None, "chosen": "a"}], {}, "row 1: prompt is None"),
        ([{"prompt": [], "chosen": "a"}], {}, "row 1: prompt is \\[\\]"),
        ([{"prompt": "p", "chosen": "a", "rejected": 3}], {}, "row 1: rejected is 3; it"),
        ([{"prompt": "p", "chosen": "a", "rejected": ["b", 3]}], {}, "an entry of rejected is 3;"),
        ([{"prompt": "p", "responses": []}], {}, "responses is \\[\\]"),
        ([{"prompt": [{"role": "user"}], "chosen": "a"}], {}, "whose content is None"),
        ([{"prompt": "p\ud800", "chosen": "a"}], {}, "half of a surrogate pair"),
        # What the user said is not the prompt: which of the two is meant?
        (
            [{"prompt": "p", "chosen": [*CHAT, {"role": "assistant", "content": "a"}]}],
            {},
            "row 1.*2",
        ),
        ([{"prompt": CHAT, "chosen": CHAT}], {}, "ends in a message of role 'user'"),
    ],
)
def test_usage_errors(tiny_tokenizer, rows, options, message):
    with pytest.raises(UsageError, match=message):
        tokenize_dataset(rows, tiny_tokenizer, **{"max_length": 16, **options})


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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [9, 12], "response_ids": [[1], [2]]}, "prompt has the token id 12"),
        ({"prompt_ids": [9, 11], "response_ids": [[1], [2, 10]]}, "response has the token id 10"),
        ({"prompt_ids": [9], "response_ids": [[-100, 1], [2]]}, "response has the token id -100"),
        ({"prompt_ids": [9], "response_ids": [[1, None], [2]]}, "response has the token id None"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "the token id"),
    ],
)
def test_token_ids_beyond_the_model_are_refused_with_their_row(tiny_tokenizer, row, message):
    """12 embeddings and 10 rows of the head."""
    limits = TokenLimits(12, 10, None)
    good = {"prompt_ids": [9, 11], "response_ids": [[1, 9], []]}
    if "prompt" in row:
        first = tokenize_dataset([row], tiny_tokenizer, max_length=64)[0]
        limits = TokenLimits(max(first["prompt_ids"]) + 1, max(first["response_ids"][0]) + 1, None)
        good = {**row, "rejected": "a"}
    rows = [good, good, row]
    for data in (rows, Dataset.from_list(rows), Dataset.from_list(rows).with_format("numpy")):
        with pytest.raises(UsageError, match=f"data, row 3: the {message}|row 3: .*{message}"):
            tokenize_dataset(data, tiny_tokenizer, max_length=64, limits=limits, name="data")
        assert tokenize_dataset(
            data[:2] if data is rows else data.select([0, 1]),
            tiny_tokenizer,
            max_length=64,
            limits=limits,
        )


def test_arrow_datasets_are_checked_as_lists_are(tiny_tokenizer):
    rows = Dataset.from_list(
        [{"prompt": "p", "chosen": "a"}, {"prompt": "p", "chosen": None}, {"prompt": "p"}]
    )
    with pytest.raises(UsageError, match="dataset, row 2: chosen is None"):
        tokenize_dataset(rows, tiny_tokenizer, max_length=16)


def test_rows_of_both_forms_go_together(tiny_tokenizer):
    """Arrow columns hold one type: rows are encoded before they become columns."""
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": ["b"]},
        {"prompt": CHAT, "chosen": "a", "rejected": "b"},
    ]
    data = tokenize_dataset(rows, tiny_tokenizer, max_length=32)
    assert [text_of(tiny_tokenizer, row["prompt_ids"]) for row in data] == [
        "<|bos|>p",
        "<|bos|><|user|>hi<|end|><|assistant|>",
    ]


@pytest.mark.parametrize("prompt", ["hi", CHAT])
@pytest.mark.parametrize("repeated", [[], CHAT])
def test_responses_of_messages_answer_a_prompt_in_chat(tiny_tokenizer, prompt, repeated):
    """As in UltraFeedback: the prompt is text, and the responses are whole conversations."""
    chosen, rejected = ([*repeated, {"role": "assistant", "content": t}] for t in "ab")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for rows in ([row], Dataset.from_list([row])):
        [encoded] = tokenize_dataset(rows, tiny_tokenizer, max_length=32)
        text = text_of(tiny_tokenizer, encoded["prompt_ids"])
        assert text == "<|bos|><|user|>hi<|end|><|assistant|>"
        texts = [text_of(tiny_tokenizer, ids) for ids in encoded["response_ids"]]
        assert texts == ["a<|end|>", "b<|end|>"]


def test_a_template_that_marks_no_end_still_teaches_to_stop(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    group = encode_group(tokenizer, CHAT, ["yes"], max_length=64)
    assert text_of(tokenizer, group["prompt_ids"]) == "user: hi\nassistant: "
    assert text_of(tokenizer, group["response_ids"][0]) == "yes<|end|>"


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
    texts = [text_of(tool_tokenizer, ids) for ids in data["prompt_ids"]]
    plain = "<|bos|><|user|>hi<|end|><|assistant|>"
    assert texts == [json.dumps(TOOLS) + "hm" + plain, plain]
    assert all(
        [text_of(tool_tokenizer, ids) for ids in responses] == ["a<|end|>", "b<|end|>"]
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
        [text_of(tool_tokenizer, ids) for ids in data["prompt_ids"]]
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


TOKENS = {"prompt_ids": [3, 4], "response_ids": [[5, 6, 7], [8]]}


def test_token_ids_of_somebody_else_are_checked(tiny_tokenizer):
    found = tokenize_dataset([TOKENS, TOKENS], tiny_tokenizer, max_length=64)
    assert found["length"] == [5, 5]
    scored = {**TOKENS, "scores": [1.0, 0.5]}
    first = tokenize_dataset([scored], tiny_tokenizer, max_length=64, first_only=True)
    assert first.to_list() == [
        {"prompt_ids": [3, 4], "response_ids": [[5, 6, 7]], "scores": [1.0], "length": 5}
    ]
    for wrong, message in (
        ({**TOKENS, "prompt_ids": []}, "row 2: the prompt_ids are empty"),
        ({**TOKENS, "response_ids": []}, "row 2: the response_ids are empty"),
        ({**TOKENS, "response_ids": [[5], [6], [7]]}, "have 2 or 3 responses"),
        ({**TOKENS, "prompt_ids": None}, "row 2: the prompt_ids are empty"),
        ({**TOKENS, "response_ids": [[5], None]}, "row 2: the response_ids are empty"),
        ({**TOKENS, "prompt_ids": [3, 4.5]}, "prompt_ids should be lists of whole numbers"),
        ({**TOKENS, "prompt_ids": [2**70]}, "do not make a table"),
        ({**TOKENS, "prompt_ids": "3 4"}, "do not make a table"),
    ):
        with pytest.raises(UsageError, match=message):
            tokenize_dataset([TOKENS, wrong], tiny_tokenizer, max_length=64)
    for wrong, message in (
        ({**TOKENS, "prompt_ids": 3}, "prompt_ids should be lists of whole numbers, .* int64"),
        ({**TOKENS, "response_ids": [5, 6]}, "response_ids should be lists of lists of whole"),
        ({**TOKENS, "prompt_ids": ["3"]}, "prompt_ids should be lists of whole numbers, .*string"),
    ):
        with pytest.raises(UsageError, match=message):
            tokenize_dataset([wrong], tiny_tokenizer, max_length=64)


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
    assert text_of(tool_tokenizer, found["prompt_ids"]).startswith(json.dumps(TOOLS))


def test_a_default_of_null_in_a_list_of_tools_stays(tool_tokenizer):
    tools = [{"name": "f", "parameters": {"city": {"type": "string", "default": None}}}]
    row = {"prompt": CHAT, "chosen": "a", "rejected": "b", "tools": tools}
    [found] = tokenize_dataset([row], tool_tokenizer, max_length=200)
    assert text_of(tool_tokenizer, found["prompt_ids"]).startswith(json.dumps(tools))


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufeff \u2060", "\u00ad", "\u3164", "\x00"])
def test_a_prompt_that_shows_nothing_is_empty(tiny_tokenizer, text):
    import copy

    from tokenizers import processors

    assert is_blank(text)
    assert not is_blank(text + ".")
    bare = copy.deepcopy(tiny_tokenizer)
    bare._tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(UsageError, match="empty"):
        encode_prompt(bare, text)
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
