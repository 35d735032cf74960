"""Scores from models in this process: a likelihood, or a reward model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from plad_fast.data.chat import render_conversation
from plad_fast.data.packing import padded
from plad_fast.data.prompts import Prompt, as_messages
from plad_fast.data.records import model_digest
from plad_fast.data.special_tokens import SpecialText
from plad_fast.errors import UsageError, located, reported_as
from plad_fast.models.adapters import merge_for_inference
from plad_fast.models.devices import best_device
from plad_fast.models.head import evaluating
from plad_fast.models.loading import load_model, load_tokenizer, place_of
from plad_fast.models.response_scores import score_responses
from plad_fast.pairs.build import as_response
from plad_fast.pairs.scoring.scorers import Item, Scorer, by_prompt, finite_scores

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class _ModelScorer(Scorer):
    """A model that is loaded when it is first needed, and kept as long as the scorer.

    Args:
        model: hub id or folder, or model and tokenizer.
        batch_size: rows in one forward pass; the scores do not depend on it but for rounding.
        dtype: to load the model in; "auto" keeps that of the checkpoint.
        device: to load the model to; by default a GPU if there is one.
    """

    kind: str

    sharded = True
    """Every process of a run has a model of its own and scores its share of the batches."""

    def __init__(
        self,
        model: str | LoadedModel,
        *,
        batch_size: int = 8,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; pass 1 or more")
        self.batch_size = batch_size
        self._dtype = dtype
        self._device = device
        self._given = None if isinstance(model, str) else model
        self._source = model if isinstance(model, str) else model[0].config.name_or_path
        self.name = f"{self.kind} {Path(self._source).name}"

    def settings(self) -> dict[str, Any]:
        settings = {"scorer": self.kind, "model": self._source, "dtype": str(self._dtype)}
        # A folder may get other weights. Those of a loaded model are the caller's to know.
        return settings | ({} if self._given else {"weights": model_digest(place_of(self._source))})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UsageError where there is no such model, and for prompts with tools."""
        if with_tools := next((prompt for prompt in prompts if prompt.tools), None):
            raise UsageError(
                f"prompt {with_tools.id!r} has tools, and {self.name} is shown the prompt alone; "
                "take another scorer"
            )
        _ = self._tokenizer  # what is quick to load tells whether the rest is there

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._given[1] if self._given else load_tokenizer(self._source)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return self._given[0] if self._given else self._load(self._device or best_device())

    def __getstate__(self) -> dict[str, Any]:
        """Another process loads the model itself."""
        return {key: value for key, value in vars(self).items() if key != "_model"}

    @abstractmethod
    def _load(self, device: str) -> PreTrainedModel: ...


class Likelihood(_ModelScorer):
    """Mean log-probability of an answer's tokens under a causal language model, in nats.

    The end of the answer counts as one of its tokens. Plain-text prompts are asked in chat if the
    tokenizer has a template, as `LocalModel` asks them. All answers to a prompt that are scored
    together share its computation where the model allows it.
    """

    kind = "likelihood"

    def score(self, items: Sequence[Item]) -> list[float]:
        if not items:
            return []
        groups = by_prompt(items)
        contents = [as_messages(self._tokenizer, items[group[0]][0].content) for group in groups]
        rows = [
            (content, [as_response(content, items[index][1]) for index in group])
            for content, group in zip(contents, groups, strict=True)
        ]
        logps = score_responses(
            self._model,
            self._tokenizer,
            rows,
            length_normalization=1.0,
            batch_size=self.batch_size,
            max_length=_positions(self._model) or 2**20,
            progress=False,
            names=[repr(items[group[0]][0].id) for group in groups],
        )
        scores = [0.0] * len(items)
        for group, values in zip(groups, logps, strict=True):
            for index, value in zip(group, values, strict=True):
                scores[index] = float(value)
        return scores

    def _load(self, device: str) -> PreTrainedModel:
        return merge_for_inference(load_model(self._source, dtype=self._dtype, device=device))


class RewardModel(_ModelScorer):
    """A logit of any sequence-classification model.

    Prompt and answer go through the chat template. Without one, they are the tokenizer's first and
    second text, and the prompt has to be plain text.

    Args:
        label: which of several labels to take, by its name in the config or by number.
    """

    kind = "reward"

    def __init__(
        self, model: str | LoadedModel, *, label: int | str | None = None, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.label = label
        if label is not None:
            self.name += f"#{label}"  # two labels of a model are two scorers, with a file each

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "label": self.label}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UsageError for prompts with tools, and where the model is missing, is no sequence
        classifier, or does not have the label."""
        super().check(prompts)
        if self._config is not None:
            self._label_index(self._config)

    def score(self, items: Sequence[Item]) -> list[float]:
        model = self._model
        label = self._label_index(model.config)
        special = SpecialText(self._tokenizer)
        rows = [self._encode(special, *item) for item in items]
        positions = _positions(model)
        # Rows of like length share a batch, the longest first: a lack of memory shows at once.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        if positions and order and len(rows[order[0]]) > positions:
            raise UsageError(
                f"an answer to prompt {items[order[0]][0].id!r} has {len(rows[order[0]])} tokens "
                f"with its prompt, and {self.name} has {positions} positions; drop long prompts"
            )
        scores = [0.0] * len(items)
        with evaluating(model), torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                logits = _logits(model, [rows[index] for index in batch])[:, label]
                for index, value in zip(batch, logits.double().tolist(), strict=True):
                    scores[index] = value
        return finite_scores(self.name, items, scores)

    def _encode(self, special: SpecialText, prompt: Prompt, text: str) -> list[int]:
        content = as_messages(self._tokenizer, prompt.content)
        if isinstance(content, str):
            return self._tokenizer(content, text)["input_ids"]
        with located(f"prompt {prompt.id!r}"):
            # Special tokens are the template's alone, as in training.
            conversation = special.hide(content), special.hide(text)
            return special.ids([render_conversation(self._tokenizer, *conversation)])[0]

    @cached_property
    def _config(self) -> PretrainedConfig | None:
        return self._given[0].config if self._given else read_reward_config(self._source)

    def _label_index(self, config: Any) -> int:
        names = [config.id2label[index] for index in range(config.num_labels)]
        if self.label is None and len(names) == 1:
            return 0
        if self.label in names:
            return names.index(self.label)
        if isinstance(self.label, int) and 0 <= self.label < len(names):
            return self.label
        wrong = "several labels" if self.label is None else f"no label {self.label!r}"
        labels = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        raise UsageError(
            f"the reward model {self._source!r} has {wrong}; name one, as in "
            f"reward:{self._source}#{names[-1]}: {labels}"
        )

    def _load(self, device: str) -> PreTrainedModel:
        with _loading(self._source):
            loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
                self._source, dtype=self._dtype, output_loading_info=True, trust_remote_code=False
            )
        model, loading = loaded
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"])[:3])
            raise UsageError(
                f"{self._source!r} has no weights for {missing}, which would be random: it is no "
                "reward model"
            )
        return model.to(device)


def _logits(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:  # (B, labels) float32
    """Logits of padded rows, the same as those of each row alone.

    Decoders pool the last token that is not the config's pad token, whatever the mask says. A
    config without one gets a token that occurs in no row meanwhile.
    """
    config = model.config
    given = config.pad_token_id
    there = {token for row in rows for token in row}
    pad = next(t for t in range(len(there) + 1) if t not in there) if given is None else given
    ids, mask = (tensor.to(model.device) for tensor in padded(rows, pad))
    config.pad_token_id = pad
    try:
        output = model(ids, attention_mask=mask)
    finally:
        config.pad_token_id = given
    return output.logits.float()


def _positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _loading(source: str) -> AbstractContextManager[None]:
    return reported_as(
        f"cannot load a reward model from {source!r}; pass a hub id or folder of a "
        "sequence-classification model"
    )


def split_label(rest: str) -> tuple[str, int | str | None]:
    """Model and label of `MODEL#LABEL`; the label is None where none is named.

    A hub id has no `#`, and a folder that has one in its name is found by its whole name.
    """
    model, mark, label = rest.rpartition("#")
    if not mark or Path(rest).expanduser().exists():
        return rest, None
    if not model or not label:
        raise UsageError(f"reward:{rest} lacks a model or a label; write reward:MODEL#LABEL")
    return model, int(label) if label.isdecimal() else label


def read_reward_config(source: str) -> PretrainedConfig | None:
    """The config of a sequence-classification model; None for adapters, which have none."""
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return None
    with _loading(source):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    # A name that transformers does not know may be somebody's own for a model that it can load.
    known = [name for name in config.architectures or () if hasattr(transformers, name)]
    kind = "ForSequenceClassification"
    if known and not any(name.endswith(kind) for name in known):
        raise UsageError(
            f"{source!r} is a {known[0]} and no reward model, which is a sequence classifier "
            f"(...{kind}); pass one that was trained as such, or score by likelihood:MODEL"
        )
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        of_type = f"{source!r} is of type {config.model_type!r}"
        raise UsageError(f"{of_type}, of which transformers has no sequence classifier")
    return config
