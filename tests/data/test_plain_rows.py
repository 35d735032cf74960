"""Rows are what they are in any table: a data set, a frame, tensors, a file made by Arrow."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from datasets import Dataset

from plad_fast.data.plain_rows import plain_rows
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.models.response_scores import score_pairs

CHAT = [{"role": "user", "content": "hi"}]


DRESSED = [
    {
        "prompt": [{"role": "user", "content": "What is 2?"}],
        "chosen": [{"role": "assistant", "content": "two"}],
        "rejected": [{"role": "assistant", "content": "three"}],
        "chosen_score": 0.75,
        "rejected_score": 0.25,
        "reference_logps": [-1.0, -2.5],
    },
    {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "chosen_score": 0.5,
        "rejected_score": -0.5,
        "reference_logps": [-3.0, -2.0],
    },
]


def frame():
    return Dataset.from_list(DRESSED).to_pandas()


class Indexed:
    """As a map-style dataset of torch: no sequence, no iterator."""

    def __len__(self):
        return len(DRESSED)

    def __getitem__(self, index):
        return DRESSED[index]


DRESSES = {
    **{
        name: lambda name=name: Dataset.from_list(DRESSED).with_format(name)
        for name in ("torch", "numpy", "pandas", "arrow")
    },
    "one column shown": lambda: Dataset.from_list(DRESSED).with_format("numpy", ["chosen_score"]),
    "transform": lambda: Dataset.from_list(DRESSED).with_transform(
        lambda batch: {**batch, "chosen_score": np.array(batch["chosen_score"])}
    ),
    "frame": frame,
    "rows of a frame": lambda: frame().to_dict("records"),
    "table": lambda: pyarrow.Table.from_pylist(DRESSED),
    "scalars of arrow": lambda: [
        {key: pyarrow.scalar(value) for key, value in row.items()} for row in DRESSED
    ],
    "scalars of numpy": lambda: [
        {**row, "chosen_score": np.float32(row["chosen_score"])} for row in DRESSED
    ],
    "tensors": lambda: [
        {
            **row,
            "rejected_score": torch.tensor(row["rejected_score"]),
            "reference_logps": torch.tensor(row["reference_logps"]),
        }
        for row in DRESSED
    ],
    "tuples": lambda: tuple({**row, "prompt": tuple(row["prompt"])} for row in DRESSED),
    "map style": Indexed,
    "values of a dict": lambda: dict(enumerate(DRESSED)).values(),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_rows_are_what_they_are_in_any_dress(tiny_model, tiny_tokenizer, dress):
    want = tokenize_dataset(DRESSED, tiny_tokenizer, max_length=64, with_scores=True)
    found = tokenize_dataset(DRESSES[dress](), tiny_tokenizer, max_length=64, with_scores=True)
    assert found.to_list() == want.to_list()
    scores = (
        score_pairs(tiny_model, tiny_tokenizer, rows, progress=False)["chosen"].tolist()
        for rows in (DRESSES[dress](), DRESSED)
    )
    assert next(scores) == next(scores)


@pytest.mark.parametrize("of_frame", [True, False])
def test_what_pandas_has_for_nothing_is_nothing(tiny_tokenizer, of_frame):
    """A column that one row lacks is NaN in the others; a score that is NaN is no score."""
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "tools": None},
        {"prompt": None, "chosen": "p a", "rejected": "p b"},
    ]
    data = pandas.DataFrame([*rows, {"prompt": np.nan, "chosen": "p c", "rejected": "p d"}])
    data["chosen_score"] = np.nan
    if not of_frame:
        data = data.drop(columns="chosen_score").to_dict("records")
    found = tokenize_dataset(data, tiny_tokenizer, max_length=64, with_scores=None)
    want = tokenize_dataset(
        [*rows, {"chosen": "p c", "rejected": "p d"}], tiny_tokenizer, max_length=64
    )
    assert found.to_list() == want.to_list()


def test_token_ids_are_taken_from_tensors(tiny_tokenizer):
    row = {"prompt_ids": torch.tensor([1, 5]), "response_ids": [np.array([2]), np.array([3, 4])]}
    [found] = tokenize_dataset([row], tiny_tokenizer, max_length=9).to_list()
    assert found == {"prompt_ids": [1, 5], "response_ids": [[2], [3, 4]], "length": 4}


def test_a_column_stays_where_the_first_row_has_no_value_in_it(tiny_tokenizer):
    """The ids would else be scored anew, and the values of the other rows be lost."""
    rows = [
        {"prompt_ids": [1, 5], "response_ids": [[2], [3, 4]], "reference_logps": logps}
        for logps in (None, [-1.0, -2.0])
    ]
    for data in (rows, pandas.DataFrame(rows), pyarrow.Table.from_pylist(rows)):
        found = tokenize_dataset(data, tiny_tokenizer, max_length=9)
        assert found["reference_logps"][:] == [None, [-1.0, -2.0]]


class OwnDataset(Dataset):
    """As of a library that builds on datasets."""


class OwnFrame(pandas.DataFrame):
    """As of a library that builds on pandas."""


class OwnSplits(datasets.DatasetDict):
    """Splits, of such a library."""


def test_a_class_of_its_own_is_what_it_is_derived_from():
    data = Dataset.from_list(DRESSED)
    assert isinstance(plain_rows(OwnDataset(data.data), "data"), OwnDataset)
    assert plain_rows(OwnFrame(frame()), "data") == plain_rows(frame(), "data")


NO_ROWS = [
    (lambda data: datasets.DatasetDict(train=data, test=data), "the splits 'train', 'test'"),
    (lambda data: OwnSplits(train=data), "OwnSplits with the splits 'train'"),
    (lambda data: data.info, "data is a DatasetInfo; pass a datasets.Dataset"),
    (lambda data: data.features, "data is a Features; pass a datasets.Dataset"),
    (lambda data: data.to_iterable_dataset(), "IterableDataset, a stream"),
    (lambda data: (row for row in data), "a generator, which can be read once"),
    (lambda data: data.to_dict(), "data is a dict; pass a datasets.Dataset"),
    (lambda data: len(data), "data is a int; pass"),
]


@pytest.mark.parametrize(("make", "message"), NO_ROWS, ids=[m for _, m in NO_ROWS])
def test_what_is_no_collection_of_rows_is_refused_by_name(tiny_tokenizer, make, message):
    with pytest.raises(UsageError, match=message):
        tokenize_dataset(
            make(Dataset.from_list(DRESSED)), tiny_tokenizer, max_length=64, name="data"
        )


@pytest.mark.parametrize("score", [True, "0.5", np.bool_(True), math.nan, None])
def test_a_score_that_is_no_number_is_refused(tiny_tokenizer, score):
    rows = [DRESSED[0], {**DRESSED[1], "chosen_score": score}]
    with pytest.raises(UsageError, match=r"row 2: the scores are .* give one each"):
        tokenize_dataset(rows, tiny_tokenizer, max_length=64, with_scores=True)
