"""Token ids, row numbers and offsets decide which probabilities are trained: checked one by one."""

from __future__ import annotations

import copy
import logging
import math

import pytest
from datasets import Dataset

from plad_fast.data.rows import TokenLimits
from plad_fast.data.text_ids import TextIds
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError

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
        assert tokenizer.decode(TextIds(tokenizer).prompt(prompt)) == expected


def test_responses_end_their_turn_once(tiny_tokenizer, eos_tokenizer):
    """The end mark is trained, and a tokenizer that appends EOS does not double it."""
    for tokenizer in (tiny_tokenizer, eos_tokenizer):
        group = TextIds(tokenizer).encode(
            CHAT, ["yes", [{"role": "assistant", "content": "no"}]], max_length=64
        )
        texts = [tokenizer.decode(ids) for ids in group["response_ids"]]
        assert texts == ["yes<|end|>", "no<|end|>"]
        assert (group["truncated"], group["fits"]) == (False, True)


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_text_that_ends_in_eos_gets_no_other(tiny_tokenizer, eos_tokenizer, encoder_decoder):
    """As in TRL, where it is added only if it is missing."""
    for tokenizer in (tiny_tokenizer, eos_tokenizer):
        encoder = TextIds(tokenizer, encoder_decoder=encoder_decoder)
        group = encoder.encode("p", ["yes<|end|>", "no"], max_length=64)
        ends = [ids.count(tokenizer.eos_token_id) for ids in group["response_ids"]]
        assert ends == [1, 1]
        assert all(ids[-1] == tokenizer.eos_token_id for ids in group["response_ids"])


def test_left_cut_keeps_bos_and_the_end_of_the_prompt(tiny_tokenizer):
    group = TextIds(tiny_tokenizer).encode("abcdef", ["xyz", "x"], max_length=7)
    # The longest response is xyz and its end mark: three tokens are left for the prompt.
    assert tiny_tokenizer.decode(group["prompt_ids"]) == "<|bos|>ef"
    assert (group["truncated"], group["fits"]) == (True, True)


def test_right_cut_keeps_the_start_of_the_prompt(tiny_tokenizer):
    group = TextIds(tiny_tokenizer).encode("abcdef", ["xyz"], max_length=7, truncation_side="right")
    assert tiny_tokenizer.decode(group["prompt_ids"]) == "<|bos|>ab"


def test_response_is_never_cut(tiny_tokenizer):
    group = TextIds(tiny_tokenizer).encode("p", ["x" * 20], max_length=10)
    assert not group["fits"]
    assert len(group["response_ids"][0]) == 21


def test_empty_prompt_without_bos_is_refused(tiny_tokenizer):
    """Nothing would predict the first response token."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(UsageError, match="empty"):
        TextIds(tokenizer).prompt("")


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
    decoded = [tiny_tokenizer.decode(ids) for ids in data[0]["response_ids"]]
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
    assert [tiny_tokenizer.decode(row["prompt_ids"]) for row in data] == [
        "<|bos|>p",
        "<|bos|><|user|>hi<|end|><|assistant|>",
    ]


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
