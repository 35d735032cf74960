"""Token ids of preference groups as tensors: padded, packed, or in ways that share the prompt.

B groups of K responses to one prompt, best first; S = B * K sequences, each of them the prompt
followed by one response; N response tokens in all. Only rows of the hidden states that predict a
response token are taken from them: no other row reaches the LM head.

* "padded": a row of its own for every sequence, (S, T), T tokens in the longest. Any model without
  an encoder.
* "packed": all sequences side by side in one row, (1, T), no padding.
* "shared": as packed, but a group's prompt stands there once: [x | y+ | y-]. Positions restart
  behind the prompt for every response, and responses of a group do not see each other.
* "encoder_decoder": prompts (B, T) for the encoder, and responses (S, R) for the decoder, behind
  its start token and without their last token. Padding on the right of both.

"packed" and "shared" need `plad_fast.models.attention`; "encoder_decoder" needs an encoder-decoder
model, which takes no other layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plad_fast.data.row_layout import RowLayout
from plad_fast.errors import UsageError

LAYOUTS = ("padded", "packed", "shared", "encoder_decoder")
PADDED_LAYOUTS = ("padded", "encoder_decoder")
"""Those in which a row takes the room of the longest."""


class PreferenceBatch(TypedDict, total=False):
    """What `PreferenceCollator` makes.

    The first dimension of `input_ids` is S when padded, B for an encoder, and else 1.
    """

    input_ids: Tensor  # (S | B | 1, T) int64, padded on the right
    attention_mask: Tensor  # (S | B, T) int64; padded and encoder-decoder layouts
    position_ids: Tensor  # (1, T) int64; packed and shared layouts
    row_layout: RowLayout  # packed and shared layouts
    decoder_input_ids: Tensor  # (S, R) int64; encoder-decoder layout
    decoder_attention_mask: Tensor  # (S, R) int64; encoder-decoder layout
    loss_rows: Tensor  # (N,) int64, rows of hidden.flatten(0, 1) that predict a response token;
    # padded and encoder-decoder layouts: others have `row_layout.predicting`
    targets: Tensor  # (N,) int64, the response tokens
    cu_seqlens: Tensor  # (S + 1,) int64, offsets of the sequences' response tokens; on the CPU
    group_tokens: Tensor  # (B, 2) int64, tokens of a group in the model, and of its sequences
    scores: Tensor  # (S,) float32, present when the rows have scores
    reference_logps: Tensor  # (S,) float32, present when the rows have them
    index: list[int]  # (B,) rows of the training set; the trainer adds them


class PreferenceCollator:
    """Makes a `PreferenceBatch` of rows from `plad_fast.data.tokenization.tokenize_dataset`.

    Sequences of a group lie next to each other, best first. Padding is on the right, so that
    position ids need no correction.

    Args:
        pad_token_id: what fills the masked tail; any id of the vocabulary will do.
        group_size: K, the number of responses every row must have.
        layout: one of `LAYOUTS`; see the module.
        decoder_start_token_id: what the decoder reads before a response, for the encoder-decoder
            layout; see `plad_fast.models.encoder_decoder.decoder_start_token`.
        rank_end_token: False ignores the last token of all responses but the best, unless it is
            their only one. Every rejected response ends, and a loss that lowers the likelihood of
            its end teaches the model not to stop.
    """

    def __init__(
        self,
        pad_token_id: int,
        group_size: int,
        *,
        layout: str = "padded",
        decoder_start_token_id: int | None = None,
        rank_end_token: bool = True,
    ) -> None:
        if layout not in LAYOUTS:
            raise UsageError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        if layout == "encoder_decoder" and decoder_start_token_id is None:
            raise UsageError(
                "layout 'encoder_decoder' needs decoder_start_token_id; pass "
                "plad_fast.models.encoder_decoder.decoder_start_token(model)"
            )
        self.pad_token_id = pad_token_id
        self.group_size = group_size
        self.layout = layout
        self.decoder_start_token_id = decoder_start_token_id
        self.rank_end_token = rank_end_token

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        for feature in features:
            found = len(feature["response_ids"])
            if found != self.group_size:
                raise UsageError(f"a row has {found} responses in place of {self.group_size}")
            if not len(feature["prompt_ids"]) and self.layout != "encoder_decoder":
                raise UsageError(
                    "a row has empty prompt_ids, and nothing would predict the first token of its "
                    "responses; begin them with the tokenizer's BOS token"
                )
        groups = [_Group(f["prompt_ids"], f["response_ids"]) for f in features]
        if self.layout == "encoder_decoder":
            batch = self._encoder_decoder(groups)
        else:
            batch = self._padded(groups) if self.layout == "padded" else self._packed(groups)
        responses = [response for group in groups for response in group.responses]
        batch["targets"] = torch.tensor([token for ids in responses for token in ids]).long()
        counts = torch.tensor([len(ids) for ids in responses])
        batch["cu_seqlens"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if not self.rank_end_token:
            ends = batch["cu_seqlens"][1:] - 1
            is_best = torch.arange(len(counts)) % self.group_size == 0
            batch["targets"][ends[(counts > 1) & ~is_best]] = -100
        shares = self.layout in ("shared", "encoder_decoder")
        batch["group_tokens"] = torch.tensor(
            [[g.shared if shares else g.unshared, g.unshared] for g in groups]
        )
        for name in ("scores", "reference_logps"):
            having = sum(name in feature for feature in features)
            if 0 < having < len(features):
                raise UsageError(
                    f"{having} of {len(features)} rows of a batch have {name}; all or none must"
                )
            if having:
                values = [value for feature in features for value in feature[name]]
                batch[name] = torch.tensor(values, dtype=torch.float32)
        return batch

    def _padded(self, groups: Sequence[_Group]) -> PreferenceBatch:
        sequences = [(group.prompt, ids) for group in groups for ids in group.responses]
        input_ids, attention_mask = padded(
            [[*prompt, *ids] for prompt, ids in sequences], self.pad_token_id
        )
        loss_rows = []
        for index, (prompt, response) in enumerate(sequences):
            # The last prompt token predicts the first response token.
            first = index * input_ids.shape[1] + len(prompt) - 1
            loss_rows.append(torch.arange(first, first + len(response)))
        return PreferenceBatch(
            input_ids=input_ids, attention_mask=attention_mask, loss_rows=torch.cat(loss_rows)
        )

    def _encoder_decoder(self, groups: Sequence[_Group]) -> PreferenceBatch:
        input_ids, attention_mask = padded([group.prompt for group in groups], self.pad_token_id)
        responses = [ids for group in groups for ids in group.responses]
        start = self.decoder_start_token_id
        assert start is not None
        # An empty response has its start token, which predicts nothing.
        decoder_input_ids, decoder_mask = padded(
            [[start, *ids[:-1]] for ids in responses], self.pad_token_id
        )
        counts = torch.tensor([len(ids) for ids in responses])
        predicts = torch.arange(decoder_input_ids.shape[1]) < counts[:, None]
        return PreferenceBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_mask,
            loss_rows=predicts.flatten().nonzero()[:, 0],
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


def padded(
    rows: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:  # (B, T) int64 each
    """Rows of token ids as one tensor, and 1 where there is one of theirs."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, pad, side), pad_sequence(masks, True, 0, side)


def count_tokens(feature: Mapping[str, Any], layout: str) -> int:
    """Tokens of a group in a layout; in a padded one other groups may make it longer."""
    return sum(token_counts(feature, layout))


def token_counts(feature: Mapping[str, Any], layout: str) -> tuple[int, ...]:
    """As `count_tokens`, of parts that are padded each on its own: of encoder and decoder."""
    group = _Group(feature["prompt_ids"], feature["response_ids"])
    group_size, longest = len(group.responses), max(map(len, group.responses))
    if layout == "padded":
        return ((len(group.prompt) + longest) * group_size,)
    if layout == "encoder_decoder":
        return (len(group.prompt), longest * group_size)
    return (group.shared if layout == "shared" else group.unshared,)


def to_device(batch: PreferenceBatch, device: torch.device) -> PreferenceBatch:
    """The batch with its tensors on a device; offsets stay, as the ops read them on the host."""
    moved = {
        k: v.to(device) if isinstance(v, Tensor) and k != "cu_seqlens" else v
        for k, v in batch.items()
    }
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
