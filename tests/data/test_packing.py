"""Tokens, positions and loss rows of packed and shared batches, against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from tests.support.naive import places, sequences

# Those with prompt and response in one row; for the other see test_encoder_decoder.py.
LAYOUTS = ["padded", "packed", "shared"]
tokens = st.integers(1, 50)


@st.composite
def batches(draw):
    """(features, K); prompts have a token at least, responses may be empty."""
    size = draw(st.integers(1, 5))
    prompt = st.lists(tokens, min_size=1, max_size=6)
    responses = st.lists(st.lists(tokens, max_size=4), min_size=size, max_size=size)
    group = st.fixed_dictionaries({"prompt_ids": prompt, "response_ids": responses})
    return draw(st.lists(group, min_size=1, max_size=4)), size


@given(batches(), st.sampled_from(LAYOUTS))
def test_rows_hold_the_sequences_and_predict_their_responses(made, layout):
    groups, size = made
    batch = PreferenceCollator(0, size, layout=layout)(groups)
    rows, width = batch["input_ids"].shape
    if layout == "padded":
        positions = batch["attention_mask"].cumsum(1) - 1
    else:
        positions = batch["position_ids"]
    assert positions.shape == (rows, width)
    loss_rows, targets, counts = [], [], []
    for (prompt, response), (row, at) in zip(
        sequences(groups), places(groups, layout), strict=True
    ):
        assert batch["input_ids"][row, at].tolist() == prompt + response
        assert positions[row, at].tolist() == list(range(len(at)))
        loss_rows += [row * width + place for place in at[len(prompt) - 1 : -1]]
        targets += response
        counts.append(len(response))
    assert predicting(batch) == loss_rows
    assert batch["targets"].tolist() == targets
    assert batch["cu_seqlens"].diff().tolist() == counts
    assert batch["cu_seqlens"][0] == 0
    for name in ("input_ids", "targets", "cu_seqlens"):
        assert batch[name].dtype == torch.int64


@given(batches(), st.sampled_from(LAYOUTS))
def test_only_the_best_response_keeps_its_end(made, layout):
    groups, size = made
    whole = PreferenceCollator(0, size, layout=layout)(groups)
    batch = PreferenceCollator(0, size, layout=layout, rank_end_token=False)(groups)
    responses = [ids for group in groups for ids in group["response_ids"]]
    expected = [
        [*ids[:-1], -100] if number % size and len(ids) > 1 else ids
        for number, ids in enumerate(responses)
    ]
    assert batch.pop("targets").tolist() == [token for ids in expected for token in ids]
    del whole["targets"]
    assert str(batch) == str(whole)


def predicting(batch):
    """Rows of the flattened hidden states that predict a response token."""
    if "loss_rows" in batch:
        assert batch["loss_rows"].dtype == torch.int64
        return batch["loss_rows"].tolist()
    numbers = torch.arange(batch["input_ids"].shape[1], dtype=torch.float64)
    return batch["row_layout"].predicting(numbers[None, :, None])[:, 0].long().tolist()


@given(batches())
def test_packed_rows_have_no_padding(made):
    groups, size = made
    for layout, column in (("shared", 0), ("packed", 1)):
        batch = PreferenceCollator(0, size, layout=layout)(groups)
        assert 0 not in batch["input_ids"]
        assert "attention_mask" not in batch
        num_tokens = batch["input_ids"].shape[1]
        assert batch["row_layout"].num_tokens == num_tokens == batch["group_tokens"][:, 0].sum()
        assert batch["group_tokens"][:, 1].tolist() == [
            sum(len(g["prompt_ids"]) + len(r) for r in g["response_ids"]) for g in groups
        ]
        assert batch["group_tokens"][:, column].sum() == num_tokens


def test_a_shared_row_by_hand():
    features = [
        {"prompt_ids": [1, 2, 3], "response_ids": [[4, 5], [6]], "scores": [0.5, 0.25]},
        {"prompt_ids": [7], "response_ids": [[], [8, 9]], "scores": [1.0, 0.0]},
    ]
    batch = PreferenceCollator(0, 2, layout="shared")(features)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    # The last prompt token, in place 2, predicts the first token of both responses.
    assert predicting(batch) == [2, 3, 2, 6, 7]
    assert batch["targets"].tolist() == [4, 5, 6, 8, 9]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 3, 5]
    assert batch["row_layout"].groups == ((3, 2, 1), (1, 0, 2))
    assert batch["scores"].tolist() == [0.5, 0.25, 1.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_the_responses_go_along(layout):
    group = {"prompt_ids": [1], "response_ids": [[2], [3]], "reference_logps": [-1.5, -2.5]}
    batch = PreferenceCollator(0, 2, layout=layout)([group, group])
    assert batch["reference_logps"].dtype == torch.float32
    assert batch["reference_logps"].tolist() == [-1.5, -2.5, -1.5, -2.5]
    assert "scores" not in batch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("having", [0, 1])
def test_numbers_that_only_some_rows_have_are_refused(layout, having):
    groups = [{"prompt_ids": [1], "response_ids": [[2], [3]]} for _ in range(2)]
    groups[having]["scores"] = [0.5, 0.25]
    with pytest.raises(UsageError, match="1 of 2 rows of a batch have scores; all or none must"):
        PreferenceCollator(0, 2, layout=layout)(groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_prompt_is_refused(layout):
    """The token before the response would be another sequence's."""
    groups = [{"prompt_ids": ids, "response_ids": [[2], [3]]} for ids in ([1], [])]
    with pytest.raises(UsageError, match="empty prompt_ids"):
        PreferenceCollator(0, 2, layout=layout)(groups)


def test_unknown_layouts_are_refused():
    with pytest.raises(UsageError, match="unknown layout 'auto'; known: padded, packed, shared"):
        PreferenceCollator(0, 2, layout="auto")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_go_through_a_data_loader(layout):
    groups = [{"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]]}] * 3
    collate = PreferenceCollator(0, 2, layout=layout)
    loader = torch.utils.data.DataLoader(groups, batch_size=2, num_workers=1, collate_fn=collate)
    for batch, expected in zip(loader, (collate(groups[:2]), collate(groups[2:])), strict=True):
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert (
                torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value
            )


def test_collator_rows_predict_their_targets():
    """Checked against the definition: row s * T + t of the batch predicts token t + 1 of s."""
    features = [
        {"prompt_ids": [1, 2, 3], "response_ids": [[4, 5], [6]], "scores": [0.5, 0.25]},
        {"prompt_ids": [7], "response_ids": [[8, 9, 10, 11], []], "scores": [1.0, 0.0]},
    ]
    batch = PreferenceCollator(pad_token_id=0, group_size=2)(features)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 6, 0],
        [7, 8, 9, 10, 11],
        [7, 0, 0, 0, 0],
    ]
    assert batch["attention_mask"].tolist() == (batch["input_ids"] != 0).long().tolist()
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 7, 7]
    predicted = batch["input_ids"].flatten()[batch["loss_rows"] + 1]
    assert torch.equal(predicted, batch["targets"])
    assert batch["loss_rows"].tolist() == [2, 3, 7, 10, 11, 12, 13]
    assert torch.equal(batch["scores"], torch.tensor([0.5, 0.25, 1.0, 0.0]))


def test_collator_refuses_another_group_size():
    with pytest.raises(UsageError, match="3 responses"):
        PreferenceCollator(0, 2)([{"prompt_ids": [1], "response_ids": [[1], [2], [3]]}])
