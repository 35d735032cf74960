"""Log-probabilities of a dataset's responses under the reference model, computed once and kept.

A loss on a reference needs one number per response that training never changes. It is computed
before training and, given a folder, written there batch by batch: a killed run goes on where it
stopped, and a finished one is read back without running the model. A file is named by a digest of
all that its numbers depend on, so another model or other data never meet it.

B groups of K responses to one prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from plad_fast.data.packing import PADDED_LAYOUTS, to_device, token_counts
from plad_fast.data.plain_rows import plain_rows
from plad_fast.data.records import digest
from plad_fast.data.row_sets import (
    longest,
    require_dataset_ids,
    require_rows,
    token_dataset,
)
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.models.adapters import token_limits
from plad_fast.models.head import causal_lm_logprobs, evaluating
from plad_fast.training.bins import pack

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from plad_fast.data.packing import PreferenceBatch

Collate = Callable[[Sequence[Mapping[str, Any]]], "PreferenceBatch"]
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]
Logps = dict[int, list[float]]
"""Row number -> its K log-probabilities."""

_TOKENS = ["prompt_ids", "response_ids"]
# Entries of a config that do not change what the model computes.
_SILENT = {
    *("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
}
_BLOCK = 2**20  # entries of a weight hashed at once


def add_reference_logps(
    dataset: Dataset,
    model: PreTrainedModel,
    *,
    collate: Collate,
    max_tokens_per_batch: int,
    cache: str | os.PathLike[str] | None,
    temperature: float = 1.0,
    impl: str = "auto",
    scratch_bytes: int | None = None,
    name: str = "dataset",
    progress: bool = True,
    autocast: Autocast | None = None,
) -> Dataset:
    """The dataset with a column `reference_logps`: K sums of token log-probabilities, in nats.

    Of processes that share `cache` one must go first: a file is written by one process. The
    others then read the finished file, which any number of them may do at once.

    Args:
        dataset: with the columns `prompt_ids` and `response_ids`. If it has `reference_logps`
            already they are kept, and only checked.
        model: the reference, whole and on its device; in eval mode meanwhile.
        collate: makes a batch of rows; see `plad_fast.data.packing.PreferenceCollator`.
        max_tokens_per_batch: tokens of one forward pass, padding included; a group of more than
            that has a pass of its own.
        cache: folder of the files; None keeps nothing.
        temperature, impl, scratch_bytes: as in `plad_fast.linear_sequence_logprobs`.
        name: what to call the dataset in messages.
        progress: show a bar on the standard error stream.
        autocast: makes the context of a forward pass.

    Raises:
        UsageError: rows without token ids, or with ids that the reference does not know, a
            log-probability that is not finite, a file that cannot be written, is
            damaged or is being written by another process, or what
            `plad_fast.models.head.causal_lm_logprobs` refuses.
    """
    if max_tokens_per_batch < 1:
        raise UsageError(f"max_tokens_per_batch must be at least 1, got {max_tokens_per_batch}")
    given, dataset = dataset, _token_rows(dataset, name)
    if "reference_logps" in dataset.column_names:
        for index, row in enumerate(dataset):
            _check(row["reference_logps"], len(row["response_ids"]), name, index)
        return given if type(given) is type(dataset) else dataset
    limits = token_limits(model)
    try:
        require_dataset_ids(dataset, limits, name)
    except UsageError as error:  # the model that is trained may know them
        raise UsageError(f"under the reference model, {error}") from None
    rows = dataset.select_columns(_TOKENS).with_format(None)
    options = {"temperature": temperature, "impl": impl, "scratch_bytes": scratch_bytes}
    scorer = _Scorer(rows, model, collate, options, autocast or contextlib.nullcontext, name)

    def read() -> Iterable[Mapping[str, Any]]:
        return tqdm(rows, desc=f"reading {name}", unit="row", leave=False, disable=not progress)

    layout = getattr(collate, "layout", "padded")
    if limits.positions is not None:
        _require_positions(rows, limits.positions, layout == "encoder_decoder", name)
    batches = _batches(read(), layout, max_tokens_per_batch)
    known: Logps | None
    if cache is None:
        known = {}
        scorer.run(batches, (), known.update, progress)
    else:
        settings = fingerprint(read(), model, temperature, scorer.autocast)
        path = Path(cache).expanduser() / f"{digest(settings)}.jsonl"
        known = _read_finished(path, len(rows))
        if known is None:
            with RowStore.open(path, settings) as store:
                done = {int(key) for key in store.done}
                scorer.run(batches, done, lambda new: store.append(_to_rows(new)), progress)
                known = _from_rows(store.rows.values())
    return dataset.add_column("reference_logps", [known[index] for index in range(len(rows))])


def _token_rows(dataset: Any, name: str) -> Dataset:
    rows = plain_rows(dataset, name)
    missing = sorted(set(_TOKENS) - set(require_rows(rows, name)))
    if missing:
        raise UsageError(
            f"{name} has no {' and no '.join(missing)}; make token ids of its texts with "
            "plad_fast.data.tokenization.tokenize_dataset"
        )
    return token_dataset(rows, name)


def _require_positions(
    rows: Iterable[Mapping[str, Any]], positions: int, encoder_decoder: bool, name: str
) -> None:
    for index, row in enumerate(rows):
        length = longest(row["prompt_ids"], row["response_ids"], encoder_decoder)
        if length > positions:
            raise UsageError(
                f"{name}, row {index + 1} has {length} tokens, and the reference model has "
                f"{positions} positions; cut the prompts to fit, or take another reference"
            )


def fingerprint(
    rows: Iterable[Mapping[str, Any]],
    model: PreTrainedModel,
    temperature: float,
    autocast: Autocast,
) -> dict[str, Any]:
    """What reference log-probabilities depend on but for rounding, as JSON values.

    Batch size, layout and backend change the rounding only and are left out.
    """
    device = _device(model).type
    with autocast():
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    config = {k: v for k, v in model.config.to_dict().items() if k not in _SILENT}
    hashed = hashlib.blake2b(digest_size=16)
    for row in rows:
        hashed.update(json.dumps([row[name] for name in _TOKENS]).encode())
    return {
        "model": type(model).__name__,
        "config": digest(config),
        "weights": weights_digest(model),
        "adapters": _adapters(model),
        "tokens": hashed.hexdigest(),
        "temperature": temperature,
        "autocast": None if dtype is None else str(dtype),
    }


def _adapters(model: nn.Module) -> str | None:
    """Of PEFT's settings and of which adapters are in use, which no weight shows."""
    settings = getattr(model, "peft_config", None)
    if not isinstance(settings, Mapping):
        return None
    used = [
        (name, repr(module.active_adapters), repr(getattr(module, "scaling", None)))
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "adapter_layer_names")
    ]
    return digest([_ordered({name: vars(config) for name, config in settings.items()}), used])


def _ordered(value: Any) -> Any:
    """Sets, whose order differs from process to process, as sorted lists."""
    if isinstance(value, Mapping):
        return {str(key): _ordered(value[key]) for key in value}
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [_ordered(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def weights_digest(model: nn.Module) -> str:
    """Of names, dtypes, shapes and bytes of all weights, read a block at a time.

    Adapters that are switched off (PEFT's `disable_adapter`) count as absent.
    """
    absent = tuple(
        f"{name}.{part}."
        for name, module in model.named_modules()
        if getattr(module, "disable_adapters", False)
        for part in getattr(module, "adapter_layer_names", ())
    )
    hashed = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        if not name.startswith(absent):
            hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            for block in weight.reshape(-1).split(_BLOCK):
                hashed.update(block.cpu().view(torch.uint8).numpy())
    return hashed.hexdigest()


@dataclass(frozen=True)
class _Scorer:
    """Runs the reference model over rows of a dataset."""

    rows: Dataset
    model: PreTrainedModel
    collate: Collate
    options: Mapping[str, Any]
    autocast: Autocast
    name: str

    def run(
        self,
        batches: Sequence[Sequence[int]],
        done: Container[int],
        keep: Callable[[Logps], Any],
        progress: bool,
    ) -> None:
        """Hands `keep` the result of every batch of which a row is not done.

        Batches are the same in a run that goes on, so that rounding is, too.
        """
        pending = [batch for batch in batches if not all(index in done for index in batch)]
        total = len(self.rows)
        with (
            evaluating(self.model),
            tqdm(
                total=total,
                initial=total - sum(map(len, pending)),
                desc=f"reference log-probs of {self.name}",
                unit="row",
                disable=not progress,
            ) as bar,
        ):
            for batch in pending:
                keep(self._score(batch))
                bar.update(len(batch))

    # Not in inference mode: a cache the model keeps of its forward must stay usable in training.
    @torch.no_grad()
    def _score(self, batch: Sequence[int]) -> Logps:
        inputs = self.collate([self.rows[index] for index in batch])
        with self.autocast():
            found = causal_lm_logprobs(
                self.model, to_device(inputs, _device(self.model)), **self.options
            )
        groups = found.sums.view(len(batch), -1).tolist()
        for index, logps in zip(batch, groups, strict=True):
            _check(logps, len(logps), self.name, index)
        return dict(zip(batch, groups, strict=True))


def _batches(rows: Iterable[Mapping[str, Any]], layout: str, max_tokens: int) -> list[list[int]]:
    """Rows of like length together, the longest first: what exceeds the memory does so at once."""
    sizes = [token_counts(row, layout) for row in rows]
    batches = pack(sizes, max_tokens, padded=layout in PADDED_LAYOUTS)
    return sorted(batches, key=lambda batch: -max(sum(sizes[index]) for index in batch))


def _check(logps: Sequence[float], count: int, name: str, index: int) -> None:
    where = f"{name}, row {index + 1}"
    if len(logps) != count:
        raise UsageError(f"{where}: {len(logps)} reference_logps for {count} responses")
    if not torch.tensor(logps).isfinite().all():
        raise UsageError(
            f"{where}: the log-probabilities under the reference model are not finite ({logps}); "
            "its weights are broken or overflow in their dtype: load it again, in float32"
        )


def _read_finished(path: Path, count: int) -> Logps | None:
    """The rows of a complete file. The lock of `RowStore` would keep other readers out."""
    try:
        _, *lines = path.read_bytes().splitlines()
        known = _from_rows(map(json.loads, lines))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # the store tells a file to go on with from a damaged one
    return known if len(known) == count else None


def _to_rows(logps: Logps) -> list[dict[str, Any]]:
    return [{"id": str(index), "logps": values} for index, values in logps.items()]


def _from_rows(rows: Any) -> Logps:
    return {int(row["id"]): row["logps"] for row in rows}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
