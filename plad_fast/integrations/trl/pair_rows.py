"""TRL's padded pairs as rows that hold the common beginning of a pair once.

B pairs of chosen and rejected; T the width of the padded batch; N tokens that are scored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from plad_fast.data.packing import PreferenceBatch, to_device
from plad_fast.data.row_layout import RowLayout
from plad_fast.data.rows import TokenLimits
from plad_fast.errors import UsageError


@dataclass(frozen=True)
class _IndexedRows(RowLayout):
    """A row layout of which any rows are taken, not only those that predict a branch."""

    rows: Tensor = field(kw_only=True, compare=False)  # (N,)

    def predicting(self, hidden: Tensor) -> Tensor:  # (1, T, D) -> (N, D)
        # A row stands here twice at most, and two numbers have one sum: the backward, which adds
        # in no fixed order on GPUs, gives the same bits each time.
        return hidden[0].index_select(0, self.rows)


def pair_batch(
    input_ids: Tensor,  # (2 B, T), all chosen above all rejected
    attention_mask: Tensor,  # (2 B, T)
    completion_mask: Tensor,  # (2 B, T), tokens whose log-probability counts
    *,
    layout: str,
    with_prompts: bool = False,
    cut_tails: bool = False,
    limits: TokenLimits | None = None,
) -> PreferenceBatch:
    """The batch in the order y+, y-, y+, y-, ... and in a layout of `plad_fast.data.packing`.

    In the shared layout the tokens with which both sequences of a pair begin stand there once: the
    prompt, less what a truncation at its start took, and the responses' common beginning. A token
    without a predecessor is not scored, as in TRL.

    Args:
        with_prompts: a third sequence in every group, the chosen sequence's other tokens.
        cut_tails: both sequences of a pair in two, where the shorter one ends: the order is y+ and
            its tail, y- and its tail.
        limits: of the model; None leaves it to the model to refuse tokens.

    Returns:
        A batch on the device of `input_ids`.

    Raises:
        UsageError: padding that is not on the right, or a token beyond the vocabulary.
    """
    device, width = input_ids.device, input_ids.shape[1]
    ids, real, counted = input_ids.cpu(), attention_mask.cpu().bool(), completion_mask.cpu().bool()
    lengths = real.sum(1)
    if not torch.equal(real, torch.arange(width) < lengths[:, None]):
        raise UsageError(
            "a batch is padded on the left or in the middle; collate it with padding on the right, "
            "as TRL's own collators do"
        )
    _require_known(ids, limits and limits.inputs)
    chosen, rejected = lengths.chunk(2)
    shared = torch.zeros_like(chosen)
    if layout == "padded":
        starts = torch.arange(len(ids)) * width
    else:
        if layout == "shared":
            shared = _common_starts(ids, real)
        sizes = chosen + rejected - shared
        first = sizes.cumsum(0) - sizes
        starts = torch.cat([first, first + chosen - shared])
    # Where a token lies; the shared ones of a rejected sequence are its chosen one's.
    steps = torch.arange(width)
    is_own = steps >= shared.repeat(2)[:, None]
    places = steps + torch.where(is_own, starts[:, None], starts.chunk(2)[0].repeat(2)[:, None])

    taken = [*(counted & real).chunk(2)]
    sources = [*places.chunk(2)]
    tokens = [*ids.chunk(2)]
    if with_prompts:
        taken.append((real & ~counted).chunk(2)[0])
        sources.append(sources[0])
        tokens.append(tokens[0])
    scored = torch.stack([part[:, 1:] for part in taken], dim=1)  # (B, K, T - 1)
    rows = torch.stack([part[:, :-1] for part in sources], dim=1)[scored]
    counts = scored.sum(2)  # (B, K)
    if cut_tails:
        common = counts.amin(1, keepdim=True).expand_as(counts)
        counts = torch.stack([common, counts - common], dim=2)
    batch = PreferenceBatch(
        targets=torch.stack([part[:, 1:] for part in tokens], dim=1)[scored],
        cu_seqlens=_offsets(counts),
    )
    if layout == "padded":
        batch["input_ids"], batch["attention_mask"] = input_ids, attention_mask
        batch["loss_rows"] = rows
    else:
        packed = ids.new_empty(int(sizes.sum()))
        packed[places[real]] = ids[real]
        groups = _groups(shared.tolist(), chosen.tolist(), rejected.tolist())
        indexed = _IndexedRows(groups, rows=rows.to(device))
        batch["input_ids"] = packed[None]
        batch["position_ids"] = indexed.position_ids()[None]
        batch["row_layout"] = indexed
    return to_device(batch, device)


def encoder_decoder_batch(
    input_ids: Tensor,  # (2 B, T), the prompts twice
    attention_mask: Tensor,  # (2 B, T)
    labels: Tensor,  # (2 B, R), all chosen above all rejected; -100 behind them
    decoder_input_ids: Tensor,  # (2 B, R)
    *,
    every_place: bool = False,
    limits: TokenLimits | None = None,
) -> PreferenceBatch:
    """The batch in the order y+, y-, y+, y-, ..., in the layout "encoder_decoder".

    Args:
        every_place: score padding too, as token 0.
        limits: as in `pair_batch`.

    Returns:
        A batch on the device of `input_ids`.

    Raises:
        UsageError: a token beyond the vocabulary.
    """
    device = input_ids.device
    _require_known(input_ids.cpu(), limits and limits.inputs)
    labels, decoder_ids = (
        x.cpu().unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
        for x in (labels, decoder_input_ids)
    )
    scored = labels != -100
    _require_known(labels[scored], limits and limits.outputs)
    if every_place:
        labels, scored = labels.where(scored, 0), torch.ones_like(scored)
    batch = PreferenceBatch(
        input_ids=input_ids.chunk(2)[0],
        attention_mask=attention_mask.chunk(2)[0],
        decoder_input_ids=decoder_ids,
        # The decoder is causal: what lies behind a response changes nothing of it.
        decoder_attention_mask=torch.ones_like(decoder_ids),
        loss_rows=scored.flatten().nonzero()[:, 0],
        targets=labels[scored],
        cu_seqlens=_offsets(scored.sum(1)),
    )
    return to_device(batch, device)


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))


def _require_known(ids: Tensor, vocabulary: int | None) -> None:
    if vocabulary is None or not ids.numel():
        return
    low, high = ids.aminmax()
    if low < 0 or high >= vocabulary:
        wrong = int(low if low < 0 else high)
        raise UsageError(
            f"a batch has the token id {wrong}, and the model knows the ids 0 to "
            f"{vocabulary - 1}; take the model's own tokenizer, also for its pad token"
        )


def _common_starts(ids: Tensor, real: Tensor) -> Tensor:  # (2 B, T), (2 B, T) -> (B,)
    """How many tokens the two sequences of a pair have in common before they differ."""
    chosen, rejected = ids.chunk(2)
    equal = (chosen == rejected) & real.chunk(2)[0] & real.chunk(2)[1]
    return equal.long().cumprod(1).sum(1)


def _groups(
    shared: list[int], chosen: list[int], rejected: list[int]
) -> tuple[tuple[int, ...], ...]:
    groups: list[tuple[int, ...]] = []
    for trunk, a, b in zip(shared, chosen, rejected, strict=True):
        # Sequences that share nothing stand each for themselves.
        groups += [(trunk, a - trunk, b - trunk)] if trunk else [(a,), (b,)]
    return tuple(groups)
