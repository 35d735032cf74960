"""Preparation of model and data for training: checks, token ids, layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import nn

from plad_fast.data.packing import PADDED_LAYOUTS
from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.registry import get_loss
from plad_fast.models.adapters import (
    base_model,
    require_whole_loss,
    token_limits,
    vocabulary_size,
    warn_of_length,
    without_adapters,
)
from plad_fast.models.attention.register import enable
from plad_fast.models.encoder_decoder import decoder_start_token, is_encoder_decoder
from plad_fast.models.head import check_architecture
from plad_fast.models.router import check_router_loss
from plad_fast.models.sharing import prepare
from plad_fast.models.wrappers import gathered
from plad_fast.training.config import PLaDConfig
from plad_fast.training.processes import of_first_process

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plad_fast.data.streams import StreamedRows


logger = logging.getLogger(__name__)

Rows = Union["Dataset", Sequence[Mapping[str, Any]], "StreamedRows"]

BASE = "base"
"""As the reference model: the model without its adapters."""


def check_inputs(
    model: PreTrainedModel,
    args: PLaDConfig,
    tokenizer: PreTrainedTokenizerBase,
    reference_model: PreTrainedModel | str | None,
) -> None:
    """Raises UsageError for a model that cannot be trained so; warns of weights of 16 bits."""
    if not isinstance(args, PLaDConfig):
        raise UsageError(f"args must be a PLaDConfig, got {type(args).__name__}")
    require_whole_loss(model)
    embeddings = vocabulary_size(model)
    if len(tokenizer) > embeddings:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {embeddings} embeddings; "
            "pass the model's own tokenizer, or call model.resize_token_embeddings first"
        )
    if isinstance(reference_model, str) and reference_model != BASE:
        raise UsageError(
            f"reference_model is {reference_model!r}; pass a model, {BASE!r} for a PEFT model "
            "without its adapters, or None for the model as it is"
        )
    if reference_model == BASE:
        with without_adapters(model):  # says so if it has none
            pass
    if args.neftune_noise_alpha and is_encoder_decoder(model):
        raise UsageError(
            "neftune_noise_alpha is set, and its noise need not reach the embeddings of an "
            f"encoder-decoder model such as {type(base_model(model)).__name__}; leave it out"
        )
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if narrow := trained & {torch.bfloat16, torch.float16}:
        logger.warning(
            "the weights to train are %s: an update below half a unit of a weight's last digit is "
            "lost, and at the learning rates of preference training many are. Load the model with "
            "dtype=torch.float32 and set bf16=True, which multiplies in bfloat16 all the same",
            str(narrow.pop()).removeprefix("torch."),
        )


def of_each(change: Callable[[Any, str], Any], evaluation: Any) -> Any:
    """Applies `change` to the evaluation set, or to each one of several by name."""
    if not isinstance(evaluation, dict):
        return change(evaluation, "eval_dataset")
    return {key: change(rows, f"eval_dataset[{key!r}]") for key, rows in evaluation.items()}


def numbered(dataset: Dataset) -> Dataset:
    """With the number of each row as the column `index`."""
    if "index" in dataset.column_names:
        dataset = dataset.remove_columns("index")
    return dataset.add_column("index", list(range(len(dataset))))


def tokenize(
    model: PreTrainedModel,
    args: PLaDConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows | None,
    name: str,
) -> Dataset | None:
    """Rows with the token ids and the columns that the loss takes; None for None."""
    if rows is None:
        return None
    spec = get_loss(args.loss)
    # One that can go without takes them where there are some.
    with_scores = None if "scores" in spec.takes and not spec.needs_scores else spec.needs_scores
    limits = token_limits(model)
    dataset = tokenize_dataset(
        rows,
        tokenizer,
        max_length=args.max_length,
        truncation_side=args.truncation_side,
        first_only=args.fine_tunes,
        with_scores=with_scores,
        with_reference="reference_logps" in spec.takes,
        encoder_decoder=decoder_start_token(model) is not None,
        split_special_tokens=args.split_special_tokens,
        limits=limits,
        name=name,
    )
    positions = limits.positions
    longest = max(dataset["length"])
    if positions is not None and longest > positions:
        raise UsageError(
            f"{name} has sequences of {longest} tokens and the model has {positions} positions; "
            f"set max_length={positions} or less"
        )
    warn_of_length(model, longest, f"the rows of {name}")
    return dataset


def bind_objective(args: PLaDConfig, train: Dataset | None, evaluation: Any) -> Objective:
    """The objective for the group size that all datasets share."""
    sets = {"train_dataset": train}
    sets |= evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    sizes = {n: len(rows[0]["response_ids"]) for n, rows in sets.items() if rows is not None}
    if not sizes:
        raise UsageError("there is nothing to train on; pass train_dataset or eval_dataset")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise UsageError(f"the datasets differ in responses per prompt ({listed}); make them equal")
    group_size = next(iter(sizes.values()))
    if group_size == 1 and not args.fine_tunes:
        raise UsageError(
            f"loss {args.loss!r} compares responses, but the rows have one response each; add a "
            "rejected column, or set loss='sft'"
        )
    return args.objective(group_size=group_size)


def prepare_model(model: PreTrainedModel, args: PLaDConfig, accelerator: Accelerator) -> str:
    """The layout, found by the first process: the others may not have their weights yet."""

    def find() -> str:
        check_architecture(model)
        check_router_loss(model)
        return prepare_layout(model, args.layout, args, accelerator)

    with gathered(model):
        layout = of_first_process(accelerator, find)
    if accelerator.num_processes > 1 and layout not in PADDED_LAYOUTS:
        enable(base_model(model), args.attention)
    return layout


def prepare_layout(
    model: nn.Module, layout: str, args: PLaDConfig, accelerator: Accelerator
) -> str:
    """See `plad_fast.models.sharing.prepare`."""
    # As in training: autocast decides which attention can run, and how it rounds.
    with accelerator.autocast():
        return prepare(model, layout, attention=args.attention, check=args.self_check)


def disable_dropout(model: nn.Module) -> None:
    """Sets every probability of dropout in the model to 0, for good; its config keeps them.

    They are those of dropout layers, also of adapters, and those that modules of transformers hold
    as numbers (`attention_dropout`, `layerdrop`). One that a model reads off its config in every
    forward, as Falcon does, stays.
    """
    for module in model.modules():
        names = [name for name in vars(module) if "dropout" in name or "layerdrop" in name]
        names += ["p"] if "dropout" in type(module).__name__.lower() else []
        for name in names:
            # Not a bool, nor a count.
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
