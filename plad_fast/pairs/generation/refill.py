"""Decoding a batch of fixed size whose finished rows leave and make room for new prompts.

Under `generate` a batch lasts as long as its longest answer. Here a row is dropped the moment it
ends. transformers has continuous batching too, but no random numbers by row in it, and on a CPU it
was several times slower than `generate` (SmolLM2-135M, transformers 5.23).

Letters: R rows in use, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plad_fast.data.packing import padded
from plad_fast.errors import NotFiniteError, UsageError
from plad_fast.models.adapters import base_model, vocabulary_size
from plad_fast.pairs.generation.sampling import Sampling, TokenSampler


@dataclass
class Row:
    """A prompt to be answered, and its answer so far."""

    prompt_id: str
    prompt: list[int]
    sample: int = 0
    tokens: list[int] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)


def require_finite(rows: Sequence[Row], broken: Sequence[bool]) -> None:
    """Raises NotFiniteError for the first row with NaN or infinite logits."""
    for row, is_broken in zip(rows, broken, strict=True):
        if is_broken:
            raise NotFiniteError(
                f"it produced NaN or infinite logits for prompt {row.prompt_id!r}; load it in "
                "bfloat16 or float32, and check that its training did not diverge"
            )


class RowDecoder:
    """Next-token logits of rows that come and go. Call it in evaluation and inference mode.

    Keys and values of all rows end at the same column, and begin at the first that a row uses. The
    model is a causal LM that `why_not_refill` has nothing against; the pad token, which fills up
    shorter prompts, may be any.
    """

    def __init__(self, model: Any, pad_token: int) -> None:
        from transformers import DynamicCache

        self._model = model
        self._pad_token = pad_token
        self._device = model.device
        self._cache: Any = DynamicCache()
        self._lengths: list[int] = []
        # No logits of a prompt's tokens but for the last: they would be the largest tensor of all.
        # An index copies the states of the last tokens; of a slice, whose rows lie apart, PyTorch
        # would make a product for each row, with a copy of the head for each.
        supports = getattr(base_model(model), "_supports_logits_to_keep", None)
        places = set((getattr(base_model(model), "hf_device_map", None) or {}).values())
        last = 1 if len(places) > 1 else torch.tensor([-1], device=self._device)
        self._options = {"logits_to_keep": last} if supports is not None and supports() else {}

    def admit(self, prompts: Sequence[list[int]], copies: Sequence[int]) -> Tensor:  # (new, V)
        """Reads new prompts and adds rows for them, `copies` of each, after those there are."""
        from transformers import DynamicCache

        ids, mask = (t.to(self._device) for t in padded(prompts, self._pad_token, "left"))
        prefilled = DynamicCache()
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), prefilled)
        depth = base_model(self._model).config.get_text_config().num_hidden_layers
        filled = [layer.get_seq_length() for layer in prefilled.layers]
        if filled != [ids.shape[1]] * depth:
            raise ValueError("its layers do not all keep keys and values of every token")
        there = [(self._cache, [*range(len(self._lengths))])] if self._lengths else []
        sources = [i for i, count in enumerate(copies) for _ in range(count)]
        self._lengths += [len(prompts[i]) for i in sources]
        self._arrange([*there, (prefilled, sources)])
        return logits[sources]

    def step(self, tokens: Sequence[int]) -> Tensor:  # (R, V)
        """Logits of the next token of each row after these."""
        ids, lengths = (
            torch.tensor(v, device=self._device)[:, None] for v in (tokens, self._lengths)
        )
        width = max(self._lengths)
        mask = (torch.arange(width + 1, device=self._device) >= width - lengths).long()
        logits = self._forward(ids, mask, lengths, self._cache)
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self._lengths = [self._lengths[row] for row in rows]
        if rows:
            self._arrange([(self._cache, rows)])

    def _arrange(self, parts: Sequence[tuple[Any, list[int]]]) -> None:
        """Puts rows of several caches together, with the columns that they use."""
        width = max(self._lengths)

        def fitted(tensor: Tensor, rows: list[int]) -> Tensor:  # (rows, heads, width, head size)
            # Zeros: what a mask hides is still multiplied, by 0.
            return functional.pad(tensor[rows], (0, 0, width - tensor.shape[2], 0))

        self._cache = parts[-1][0]
        for number, layer in enumerate(self._cache.layers):
            given = [(cache.layers[number], rows) for cache, rows in parts]
            keys = torch.cat([fitted(each.keys, rows) for each, rows in given])
            layer.values = torch.cat([fitted(each.values, rows) for each, rows in given])
            layer.keys = keys

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._options,
        )
        return output.logits[:, -1]


def refilled(
    model: Any, rows: Sequence[Row], sampling: Sampling, ends: set[int], pad: int
) -> Iterator[list[Row]]:
    """Answers rows in the order given, `sampling.batch_size` at a time; yields what is finished.

    The longest prompts come first, the samples of a prompt side by side. Go on in evaluation and
    inference mode.
    """
    if not rows:
        return
    waiting = deque(rows)
    running: list[Row] = []
    size = min(sampling.batch_size, len(rows))
    decoder, choose = RowDecoder(model, pad), TokenSampler(sampling)
    while waiting or running:
        free = min(size - len(running), len(waiting))
        # One prompt alone costs nearly as much to read as several together.
        if free and free >= min(max(1, size // 4), len(waiting)):
            first, new = len(running), [waiting.popleft() for _ in range(free)]
            groups = [[*group] for _, group in itertools.groupby(new, lambda row: row.prompt_id)]
            if sampling.temperature:
                for row in new:
                    row.uniforms = sampling.uniforms(row.prompt_id, row.sample).tolist()
            logits = decoder.admit([group[0].prompt for group in groups], [*map(len, groups)])
            running += new
        else:
            first, logits = 0, decoder.step([row.tokens[-1] for row in running])
        grown = running[first:]
        uniforms = [row.uniforms[len(row.tokens)] if row.uniforms else 0.0 for row in grown]
        drawn = choose(logits, torch.tensor(uniforms, device=logits.device))
        tokens, broken = torch.stack([part.long() for part in drawn]).tolist()  # one transfer
        require_finite(grown, broken)
        for row, token in zip(grown, tokens, strict=True):
            row.tokens.append(token)
        is_done = [
            r.tokens[-1] in ends or len(r.tokens) == sampling.max_new_tokens for r in running
        ]
        if any(is_done):
            kept = [place for place, done in enumerate(is_done) if not done]
            decoder.keep(kept)
            finished = [row for row, done in zip(running, is_done, strict=True) if done]
            running = [running[place] for place in kept]
            yield finished


_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_KNOWN_CACHES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
# Nats by which log-probabilities may differ in the mean, rounding (TF32 too) and no more: see
# `plad_fast.models.sharing` for what errors amount to.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2}
_TOLERANCE_16_BIT = 0.15


def why_not_refill(model: Any, pad: int) -> str | None:
    """None, or what stands against rows that come and go.

    Call it in evaluation and inference mode. Takes a few forward passes of a few tokens.
    """
    from transformers import DynamicCache

    lm = base_model(model)
    family = type(lm).__name__
    if lm.config.is_encoder_decoder:
        return f"{family} has an encoder"
    config = lm.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or []) - _KNOWN_LAYERS
    if unknown:
        return f"{family} has layers of the kind {', '.join(sorted(unknown))}"
    if getattr(config, "attention_chunk_size", None):
        return f"{family} attends in chunks"
    try:
        unknown = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
        unknown -= _KNOWN_CACHES
        if unknown:
            return f"{family} keeps {', '.join(sorted(unknown))} in its cache"
        difference = _difference(model, pad)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a forward that takes other arguments, say
        return f"{family} does not decode row by row ({type(error).__name__}: {error})"
    dtype = next(model.parameters()).dtype
    # NaN passes: generation reports it, with the prompt.
    if difference > _TOLERANCE.get(dtype, _TOLERANCE_16_BIT):
        return f"{family} then gives other log-probabilities (by {difference:.2g} nats a token)"
    return None


def _difference(model: Any, pad: int) -> float:
    """Mean difference from whole sequences, one at a time and without a cache."""
    vocab = vocabulary_size(model)
    draw = torch.Generator().manual_seed(0)
    first, stays, comes = (
        torch.randint(vocab, (length + 2,), generator=draw).tolist() for length in (9, 5, 7)
    )
    decoder = RowDecoder(model, pad)
    found = [decoder.admit([first[:9], stays[:5]], [1, 1]), decoder.step([first[9], stays[5]])]
    decoder.keep([1])
    found += [decoder.admit([comes[:7]], [1]), decoder.step([stays[6], comes[7]])]
    whole = [
        model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        for ids in (first[:10], stays, comes[:8])
    ]
    places = ((0, 8), (1, 4), (0, 9), (1, 5), (2, 6), (1, 6), (2, 7))
    expected = torch.stack([whole[row][place] for row, place in places])
    distance = torch.cat(found).float().log_softmax(-1)
    distance -= expected.float().log_softmax(-1)
    # Masked logits are -inf both ways.
    return float(distance[distance.isfinite()].abs().mean())
