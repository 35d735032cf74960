"""Token ids of preference groups as tensors: padded, packed, or packed with shared prompts.

B groups of K responses to one prompt, best first; S = B * K sequences, each of them the prompt
followed by one response; N response tokens in all. Only rows of the hidden states that predict a
response token are taken from them: no other row reaches the LM head.

* "padded": a row of its own for every sequence, (S, T), T tokens in the longest. Any model.
* "packed": all sequences side by side in one row, (1, T), no padding.
* "shared": as packed, but a group's prompt stands there once: [x | y+ | y-]. Positions restart
  behind the prompt for every response, and responses of a group do not see each other.

The last two need `plad_fast.attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from plad_fast.errors import UsageError
from plad_fast.row_layout import RowLayout

LAYOUTS = ("padded", "packed", "shared")


class PreferenceBatch(TypedDict, total=False):
    """What `PreferenceCollator` makes; R rows, which are S in the padded layout and else 1."""

    input_ids: Tensor  # (R, T) int64, padded on the right
    attention_mask: Tensor  # (S, T) int64; padded layout only
    position_ids: Tensor  # (1, T) int64; not in the padded layout
    row_layout: RowLayout  # not in the padded layout
    loss_rows: Tensor  # (N,) int64, rows of hidden.view(S * T, D) that predict a response token;
    # padded layout only: others have `row_layout.predicting`
    targets: Tensor  # (N,) int64, the response tokens
    cu_seqlens: Tensor  # (S + 1,) int64, offsets of the sequences' response tokens
    group_tokens: Tensor  # (B, 2) int64, tokens of a group in the model, and of its sequences
    scores: Tensor  # (S,) float32, present when the rows have scores
    reference_logps: Tensor  # (S,) float32, present when the rows have them
    index: list[int]  # (B,) rows of the training set; the trainer adds them


class PreferenceCollator:
    """Makes a `PreferenceBatch` of rows from `plad_fast.tokenization.tokenize_dataset`.

    Sequences of a group lie next to each other, best first. Padding is on the right, so that
    position ids need no correction.

    Args:
        pad_token_id: what fills the masked tail; any id of the vocabulary will do.
        group_size: K, the number of responses every row must have.
        layout: "padded", "packed" or "shared"; see the module.
    """

    def __init__(self, pad_token_id: int, group_size: int, *, layout: str = "padded") -> None:
        if layout not in LAYOUTS:
            raise UsageError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        self.pad_token_id = pad_token_id
        self.group_size = group_size
        self.layout = layout

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        for feature in features:
            found = len(feature["response_ids"])
            if found != self.group_size:
                raise UsageError(
                    f"a row has {found} responses where groups of {self.group_size} were "
                    "expected; all rows need the same number"
                )
        groups = [_Group(f["prompt_ids"], f["response_ids"]) for f in features]
        batch = self._padded(groups) if self.layout == "padded" else self._packed(groups)
        responses = [response for group in groups for response in group.responses]
        batch["targets"] = torch.tensor([token for ids in responses for token in ids]).long()
        batch["cu_seqlens"] = torch.tensor([0] + [len(ids) for ids in responses]).cumsum(0)
        batch["group_tokens"] = torch.tensor(
            [[g.shared if self.layout == "shared" else g.unshared, g.unshared] for g in groups]
        )
        for name in ("scores", "reference_logps"):
            if name in features[0]:
                values = [value for feature in features for value in feature[name]]
                batch[name] = torch.tensor(values, dtype=torch.float32)
        return batch

    def _padded(self, groups: Sequence[_Group]) -> PreferenceBatch:
        sequences = [(group.prompt, ids) for group in groups for ids in group.responses]
        width = max(len(prompt) + len(response) for prompt, response in sequences)
        input_ids = torch.full((len(sequences), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        loss_rows = []
        for index, (prompt, response) in enumerate(sequences):
            length = len(prompt) + len(response)
            input_ids[index, :length] = torch.tensor([*prompt, *response])
            attention_mask[index, :length] = 1
            # The last prompt token predicts the first response token.
            first = index * width + len(prompt) - 1
            loss_rows.append(torch.arange(first, first + len(response)))
        return PreferenceBatch(
            input_ids=input_ids, attention_mask=attention_mask, loss_rows=torch.cat(loss_rows)
        )

    def _packed(self, groups: Sequence[_Group]) -> PreferenceBatch:
        if self.layout == "packed":
            groups = [_Group(g.prompt, [response]) for g in groups for response in g.responses]
        tokens = [id for g in groups for ids in (g.prompt, *g.responses) for id in ids]
        layout = RowLayout(tuple((len(g.prompt), *map(len, g.responses)) for g in groups))
        return PreferenceBatch(
            input_ids=torch.tensor(tokens)[None],
            position_ids=layout.position_ids()[None],
            row_layout=layout,
        )


def count_tokens(feature: Mapping[str, Any], layout: str) -> int:
    """Tokens of a group in a layout; in the padded one other groups may make it longer."""
    group = _Group(feature["prompt_ids"], feature["response_ids"])
    if layout == "padded":
        longest = max(map(len, group.responses))
        return (len(group.prompt) + longest) * len(group.responses)
    return group.shared if layout == "shared" else group.unshared


def to_device(batch: PreferenceBatch, device: torch.device) -> PreferenceBatch:
    """The batch with its tensors on a device."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return PreferenceBatch(**moved)  # type: ignore[typeddict-item]


class _Group(NamedTuple):
    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]

    @property
    def shared(self) -> int:
        """Tokens of the group if its prompt stands there once."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def unshared(self) -> int:
        """Tokens of its sequences."""
        return self.shared + (len(self.responses) - 1) * len(self.prompt)
