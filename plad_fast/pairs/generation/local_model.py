"""A transformers model in this process as a source of text."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from plad_fast.data.chat import decode_answer, turn_end_token
from plad_fast.data.chat_template import opened_thought
from plad_fast.data.packing import padded
from plad_fast.data.prompts import Prompt, as_messages
from plad_fast.errors import UsageError, located
from plad_fast.models.adapters import base_model, steady_length
from plad_fast.models.encoder_decoder import decoder_start_token
from plad_fast.pairs.generation.refill import Row, refilled, require_finite, why_not_refill
from plad_fast.pairs.generation.sampling import RowSampler, Sampling
from plad_fast.pairs.generation.text_model import Answer, TextModel, Wanted

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LONGEST_MARK = 24  # tokens, where each is a byte


class LocalModel(TextModel):
    """A transformers language model in this process, causal or encoder-decoder.

    To an encoder-decoder model a prompt is the encoder's text, with the special tokens that its
    tokenizer gives one.

    An answer depends on the model, the prompt, the number of its sample, the `Sampling` less its
    batch size and `n`, and on nothing else but rounding, which differs with the other rows of the
    batch: in float32 it hardly ever decides a token, in bfloat16 it does in many answers.

    Args:
        model: on any device. It may be in training; its mode and settings are left as they were.
        tokenizer: of the model.
        name: for progress and messages.
        chat: ask plain-text prompts as a user message if the tokenizer has a chat template, as
            `build_pairs` writes them. False: continue plain text as it is, which is how rows of
            plain text are trained and scored.
        thinks: go on with the thought that the chat template opens, if it does; an answer then
            begins with that mark. False: leave the mark out of the prompt, as a student has it that
            was trained on answers without a thought.
        refill: a finished row of a batch makes room for another prompt. False, and wherever the
            model's cache or the length of a prompt does not allow it: batches last as long as their
            longest answer.
    """

    sharded = True
    """Every process of a run has a model of its own and answers its share of the prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        chat: bool = True,
        thinks: bool = True,
        refill: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.chat = chat
        self.thinks = thinks
        self._refills: bool | None = None if refill else False
        self._start_token = decoder_start_token(model)

    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Iterator[list[Answer]]:
        """Answers the prompts, longest first, so that memory runs out early or never.

        Raises:
            UsageError: from this call, before anything is generated: a prompt is empty, too long
                for the model, or has tokens the model does not know. From the iterator: the model
                produced NaN or infinite logits.
        """
        prompts = {prompt.id: prompt for prompt, _ in wanted}.values()
        has_encoder = self._start_token is not None
        ids = prompt_ids(
            self.tokenizer,
            prompts,
            chat=self.chat,
            thinks=self.thinks,
            encoder_decoder=has_encoder,
        )
        self._check(ids, sampling)
        rows = [Row(prompt.id, ids[prompt.id], sample) for prompt, sample in wanted]
        rows.sort(key=lambda row: (-len(row.prompt), row.prompt_id, row.sample))
        return self._batches(rows, sampling)

    def _check(self, ids: Mapping[str, list[int]], sampling: Sampling) -> None:
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        limit = sampling.max_new_tokens
        if limit > positions:
            raise UsageError(
                f"max_new_tokens={limit}, and model {self.name} has {positions} positions; lower it"
            )
        if self._start_token is None:
            room = positions - limit
            why = f"of {positions} positions max_new_tokens={limit} leaves {room}"
        else:  # prompt and answer have positions of their own
            room, why = positions, f"the encoder has {positions} positions"
        if too_long := [prompt_id for prompt_id, tokens in ids.items() if len(tokens) > room]:
            longest = max(too_long, key=lambda prompt_id: len(ids[prompt_id]))
            raise UsageError(
                f"{len(too_long)} of {len(ids)} prompts are too long for model {self.name}: "
                f"prompt {longest!r} has {len(ids[longest])} tokens, and {why}; drop such prompts"
            )
        for prompt_id, tokens in ids.items():
            if max(tokens) >= config.vocab_size:
                raise UsageError(
                    f"prompt {prompt_id!r} has token {max(tokens)}, but model {self.name} knows "
                    f"{config.vocab_size} tokens; use the tokenizer that belongs to the model"
                )

    def _batches(self, rows: list[Row], sampling: Sampling) -> Iterator[list[Answer]]:
        ends = end_tokens(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        pad = min(ends, default=0) if pad is None else pad
        config = self._generation_config(sampling, ends, pad)
        apart = len(rows)  # of the rows, the longest
        if rows and self._can_refill(config, pad):
            room = steady_length(self.model) - sampling.max_new_tokens  # keys would not fit
            apart = sum(len(row.prompt) > room for row in rows)
        batches = itertools.chain(
            self._generated(rows[:apart], sampling, config),
            refilled(self.model, rows[apart:], sampling, ends, pad),
        )
        while True:
            # The model is in its own mode whenever answers are handed out.
            here = located(f"model {self.name}")
            with _generating(self.model, config), torch.inference_mode(), here:
                finished = next(batches, None)
            if finished is None:
                return
            yield [self._finish(row, ends) for row in finished]

    def _can_refill(self, config: GenerationConfig, pad: int) -> bool:
        if self._refills is None:
            with _generating(self.model, config), torch.inference_mode():
                reason = why_not_refill(self.model, pad)
            self._refills = reason is None
            if reason is not None:
                logger.info("%s: batches are not refilled: %s", self.name, reason)
        return self._refills

    def _generation_config(self, sampling: Sampling, ends: set[int], pad: int) -> GenerationConfig:
        from transformers import GenerationConfig

        # The first token of every text a decoder was trained on, such as the mark of a language.
        own = None if self._start_token is None else self.model.generation_config
        return GenerationConfig(
            do_sample=False,
            forced_bos_token_id=getattr(own, "forced_bos_token_id", None),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
            decoder_start_token_id=self._start_token,
            use_cache=True,
        )

    def _generated(
        self, rows: list[Row], sampling: Sampling, config: GenerationConfig
    ) -> Iterator[list[Row]]:
        """Rows answered by transformers' `generate`, batch by batch; what follows an end is pad."""
        from transformers import LogitsProcessorList

        device = self.model.device
        side: Literal["left", "right"] = "left" if self._start_token is None else "right"
        generate: Any = self.model.generate
        for start in range(0, len(rows), sampling.batch_size):
            batch = rows[start : start + sampling.batch_size]
            read = padded([row.prompt for row in batch], config.pad_token_id, side)
            prompts, mask = (tensor.to(device) for tensor in read)
            # Tokens in front of an answer in what `generate` gives.
            before = prompts.shape[1] if self._start_token is None else 1
            uniforms = torch.stack([sampling.uniforms(row.prompt_id, row.sample) for row in batch])
            sampler = RowSampler(sampling, uniforms.to(device), before)
            output = generate(  # by name, as PEFT's takes them
                input_ids=prompts,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                **_cache(self.model),
            )
            require_finite(batch, sampler.broken.tolist())
            for row, tokens in zip(batch, output[:, before:].tolist(), strict=True):
                row.tokens = tokens
            yield batch

    def _finish(self, row: Row, ends: set[int]) -> Answer:
        tokens = row.tokens
        length = next((i for i, token in enumerate(tokens) if token in ends), None)
        # Not every end token is special to the tokenizer: cut before it rather than skip it.
        text = decode_answer(self.tokenizer, tokens[:length]).strip()
        if text:
            text = thought_before(self.tokenizer, row.prompt) + text
        if length is None:
            return Answer(row.prompt_id, text, "length", len(tokens), row.sample)
        return Answer(row.prompt_id, text, "stop", length + 1, row.sample)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    *,
    chat: bool = True,
    thinks: bool = True,
    encoder_decoder: bool = False,
) -> dict[str, list[int]]:
    """The tokens of prompts by their ids, as a student is trained on them; see `LocalModel`."""
    from plad_fast.data.text_ids import TextIds

    encoder = TextIds(tokenizer, encoder_decoder=encoder_decoder)
    ids = {}
    for prompt in prompts:
        content = as_messages(tokenizer, prompt.content) if chat else prompt.content
        with located(f"prompt {prompt.id!r}"):
            ids[prompt.id] = encoder.prompt(content, prompt.template, thinks=thinks)
    return ids


def thought_before(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """The mark of a thought that a prompt, as token ids, ends in; see `opened_thought`."""
    text = tokenizer.decode(prompt[-_LONGEST_MARK:])
    assert isinstance(text, str)
    return opened_thought(text)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that end an answer: the generation config's, and the tokenizer's EOS.

    And the mark that closes an assistant turn in the chat template: a model trained with it learns
    to end in that, also where the config still names the EOS of pre-training.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = set(configured if isinstance(configured, list) else [configured])
    ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        ends.add(turn_end_token(tokenizer))
    return {token for token in ends if token is not None}


def _cache(model: PreTrainedModel) -> dict[str, Any]:
    """A cache for a T5 whose decoder is the deeper half: `generate` makes it for the encoder's."""
    config = model.config
    deeper = getattr(config, "num_decoder_layers", 0) > getattr(config, "num_hidden_layers", 0)
    if not (config.is_encoder_decoder and deeper):
        return {}
    from transformers import DynamicCache, EncoderDecoderCache

    return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and `config` instead of the model's generation config.

    `generate` fills whatever a given config leaves open, such as a repetition penalty, from the
    model's; answers are to depend on `Sampling` alone.
    """
    training = [module for module in model.modules() if module.training]
    # A model of PEFT shows the one inside, unless it was given one of its own; its `generate` may
    # put that into the model inside.
    inner = base_model(model)
    holders = [inner] if "generation_config" not in vars(model) else [inner, model]
    own = [holder.generation_config for holder in holders]
    if training:  # a call passes through all modules, and this is entered for every batch
        model.eval()
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, value in zip(holders, own, strict=True):
            holder.generation_config = value
        for module in training:
            module.training = True
