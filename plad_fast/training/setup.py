"""The data of a training: rows to token ids, and what they must agree on with model and loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import nn

from plad_fast.data.tokenization import tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.registry import get_loss
from plad_fast.models.adapters import require_whole_loss, token_limits, vocabulary_size
from plad_fast.models.encoder_decoder import decoder_start_token
from plad_fast.training.config import PLaDConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

Rows = Union["Dataset", Sequence[Mapping[str, Any]]]
Features = list[dict[str, Any]]


class Groups:
    """Rows as they are. What moves batches to devices would go through lists token by token."""

    def __init__(self, features: Features) -> None:
        self.features = features


def as_they_are(features: Features) -> dict[str, Groups]:
    """A collator: rows become tensors where it is known which of them run together."""
    return {"groups": Groups(features)}


def of_each(change: Callable[[Any, str], Any], evaluation: Any) -> Any:
    """What `change` makes of the evaluation set, or of each one of several by name."""
    if not isinstance(evaluation, dict):
        return change(evaluation, "eval_dataset")
    return {key: change(rows, f"eval_dataset[{key!r}]") for key, rows in evaluation.items()}


def numbered(dataset: Dataset) -> Dataset:
    """With the number of each row as the column `index`."""
    if "index" in dataset.column_names:
        dataset = dataset.remove_columns("index")
    return dataset.add_column("index", list(range(len(dataset))))


def require_supported(
    model: PreTrainedModel, args: PLaDConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    if not isinstance(args, PLaDConfig):
        raise UsageError(f"args must be a PLaDConfig, got {type(args).__name__}")
    require_whole_loss(model)
    embeddings = vocabulary_size(model)
    if len(tokenizer) > embeddings:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {embeddings} embeddings; "
            "pass the model's own tokenizer, or call model.resize_token_embeddings first"
        )
    parallelism = args.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise UsageError("tensor, context and sequence parallelism are not supported")


def warn_of_narrow_weights(model: torch.nn.Module) -> None:
    """Logs that weights of 16 bits are to be trained, which lose most of what AdamW would add."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    narrow = trained & {torch.bfloat16, torch.float16}
    if narrow:
        logger.warning(
            "the weights to train are %s: an update below half a unit of a weight's last digit is "
            "lost, and at the learning rates of calibration many are. Load the model with "
            "dtype=torch.float32 and set bf16=True, which multiplies in bfloat16 all the same",
            str(narrow.pop()).removeprefix("torch."),
        )


def tokenize(
    rows: Rows,
    model: PreTrainedModel,
    args: PLaDConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Dataset:
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
