"""Reference log-probabilities of a dataset's responses, computed once and cached.

A loss on a reference needs one number per response that training never changes. It is computed
before training and, given a folder, written there batch by batch: a killed run goes on where it
stopped, and a finished one is read back without running the model. A file is named by a digest of
all that its numbers depend on, so another model or other data never meet it.

B groups of K responses to one prompt.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from plad_fast.data.packing import (
    PADDED_LAYOUTS,
    PreferenceCollator,
    count_tokens,
    to_device,
    token_counts,
)
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
from plad_fast.models.adapters import token_limits, vocabulary_size, without_adapters
from plad_fast.models.head import causal_lm_logprobs, evaluating
from plad_fast.training.config import PLaDConfig
from plad_fast.training.fingerprint import Autocast, fingerprint
from plad_fast.training.micro_batches import pack
from plad_fast.training.processes import whole_in_every_process
from plad_fast.training.setup import BASE, prepare_layout

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedModel

    from plad_fast.data.packing import PreferenceBatch

Collate = Callable[[Sequence[Mapping[str, Any]]], "PreferenceBatch"]
Logps = dict[int, list[float]]
"""Row number -> its K log-probabilities."""

_COLUMNS = ["prompt_ids", "response_ids"]
_TOKENS = 4096  # of a forward without a backward, where the user set no limit


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
    whole_responses: bool = True,
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
        whole_responses: False takes a `collate` that leaves end tokens out
            (`rank_end_token=False`). The column does not say so, and `PLaDTrainer` takes such a
            column for that of whole responses: it is for a loop of your own that uses the same
            `collate`.

    Raises:
        UsageError: a `collate` that leaves end tokens out where that is not asked for; rows without
            token ids, or with ids that the reference does not know, a log-probability that is not
            finite, a file that cannot be written, is damaged or is being written by another
            process, or what `plad_fast.models.head.causal_lm_logprobs` refuses.
    """
    if max_tokens_per_batch < 1:
        raise UsageError(f"max_tokens_per_batch must be at least 1, got {max_tokens_per_batch}")
    if whole_responses and not getattr(collate, "rank_end_token", True):
        raise UsageError(
            f"{name}: this collate leaves end tokens out (rank_end_token=False), and a column "
            "reference_logps is taken for that of whole responses; collate with "
            "rank_end_token=True, let PLaDTrainer compute its own, or pass whole_responses=False "
            "for a loop of yours"
        )
    given, dataset = dataset, _token_rows(dataset, name)
    if "reference_logps" in dataset.column_names:
        for index, row in enumerate(dataset):
            _check(row["reference_logps"], len(row["response_ids"]), name, index)
        return given if type(given) is type(dataset) else dataset
    rows = dataset.select_columns(_COLUMNS).with_format(None)
    layout = getattr(collate, "layout", "padded")
    _require_known(rows, model, name, encoder_decoder=layout == "encoder_decoder")
    options = {"temperature": temperature, "impl": impl, "scratch_bytes": scratch_bytes}
    autocast = autocast or contextlib.nullcontext
    scorer = _Scorer(rows, model, collate, options, autocast, name, progress)

    def read() -> Iterable[Mapping[str, Any]]:
        return tqdm(rows, desc=f"reading {name}", unit="row", leave=False, disable=not progress)

    batches = _batches(read(), layout, max_tokens_per_batch)
    known: Logps = {}
    if cache is None:
        scorer.run(batches, (), known.update)
    else:
        settings = fingerprint(read(), model, temperature, autocast)
        if not getattr(collate, "rank_end_token", True):
            settings["rank_end_token"] = False
        path = Path(cache).expanduser() / f"{digest(settings)}.jsonl"
        known = _read_finished(path)
        if len(known) != len(rows):
            with RowStore.open(path, settings) as store:
                done = {int(key) for key in store.rows}
                scorer.run(batches, done, lambda new: store.append(_to_rows(new)))
                known = _from_rows(store.rows.values())
    return dataset.add_column("reference_logps", [known[index] for index in range(len(rows))])


def _token_rows(dataset: Any, name: str) -> Dataset:
    rows = plain_rows(dataset, name)
    missing = sorted(set(_COLUMNS) - set(require_rows(rows, name)))
    if missing:
        raise UsageError(
            f"{name} has no {' and no '.join(missing)}; make token ids of its texts with "
            "plad_fast.data.tokenization.tokenize_dataset"
        )
    return token_dataset(rows, name)


def _require_known(
    rows: Dataset, model: PreTrainedModel, name: str, *, encoder_decoder: bool
) -> None:
    """Raises UsageError for rows that the trained model may take, and the reference cannot."""
    limits = token_limits(model)
    try:
        require_dataset_ids(rows, limits, name)
    except UsageError as error:
        raise UsageError(f"under the reference model, {error}") from None
    if limits.positions is None:
        return
    for index, row in enumerate(rows):
        length = longest(row["prompt_ids"], row["response_ids"], encoder_decoder)
        if length > limits.positions:
            raise UsageError(
                f"{name}, row {index + 1} has {length} tokens, and the reference model has "
                f"{limits.positions} positions; cut the prompts to fit, or take another reference"
            )


@dataclass(frozen=True)
class _Scorer:
    """Runs the reference model over rows of a dataset."""

    rows: Dataset
    model: PreTrainedModel
    collate: Collate
    options: Mapping[str, Any]
    autocast: Autocast
    name: str
    progress: bool

    def run(
        self,
        batches: Sequence[Sequence[int]],
        done: Container[int],
        keep: Callable[[Logps], Any],
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
                disable=not self.progress,
            ) as bar,
        ):
            for batch in pending:
                keep(self._score(batch))
                bar.update(len(batch))

    # Not in inference mode: a cache the model keeps of its forward must stay usable in training.
    @torch.no_grad()
    def _score(self, batch: Sequence[int]) -> Logps:
        inputs = self.collate([self.rows[index] for index in batch])
        device = next(self.model.parameters()).device
        with self.autocast():
            found = causal_lm_logprobs(self.model, to_device(inputs, device), **self.options)
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


def _read_finished(path: Path) -> Logps:
    """The rows of a file. The lock of `RowStore` would keep other readers out."""
    try:
        _, *lines = path.read_bytes().splitlines()
        return _from_rows(map(json.loads, lines))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}  # the store tells a file to go on with from a damaged one


def _to_rows(logps: Logps) -> list[dict[str, Any]]:
    return [{"id": str(index), "logps": values} for index, values in logps.items()]


def _from_rows(rows: Any) -> Logps:
    return {int(row["id"]): row["logps"] for row in rows}


@dataclass(frozen=True)
class ReferencePass:
    """The reference of a training: every process scores its share of the rows, once.

    Args:
        args, accelerator, collate: of the training.
        reference: a model, `BASE`, or None for the model that is trained, as it is.
    """

    args: PLaDConfig
    accelerator: Accelerator
    collate: PreferenceCollator
    reference: PreTrainedModel | str | None

    def add_to(
        self, dataset: Dataset, name: str, model: PreTrainedModel, *, trained: bool
    ) -> Dataset:
        """The dataset with the column `reference_logps`; one that has it is checked.

        Args:
            model: that is trained.
            trained: whether it is not what it was before training.
        """
        if "reference_logps" in dataset.column_names:
            if not self.collate.rank_end_token:
                raise UsageError(
                    f"{name} has reference_logps, which are of whole responses, and "
                    "rank_end_token=False leaves their ends out; remove the column, or set "
                    "rank_end_token=True (--rank-end-token)"
                )
            return self._add(model, dataset, name)
        if not whole_in_every_process(self.accelerator):
            raise UsageError(
                f"{name} has no reference_logps, and a model that FSDP or DeepSpeed shards is not "
                "whole in any process to compute them; add them to the rows beforehand, in one "
                "process, with plad_fast.training.reference_logps.add_reference_logps, and set "
                "rank_end_token=True (--rank-end-token): they are of whole responses"
            )
        if self.reference is None and trained:
            raise UsageError(
                f"{name} has no reference_logps, and the model is not what it was before "
                "training; pass the data to the constructor, or a reference_model"
            )
        if self.reference is None:
            return self._score(model, dataset, name)
        if self.reference == BASE:
            with without_adapters(model):
                return self._score(model, dataset, name)
        return self._score_with_another(self.reference, dataset, name)

    def _score_with_another(self, model: Any, dataset: Dataset, name: str) -> Dataset:
        """With a model that is not trained: it is on the device only meanwhile."""
        home = model.device
        # A model that accelerate has spread over devices stays there.
        moves = getattr(model, "hf_device_map", None) is None
        if moves:
            model.to(self.args.device)
        try:
            wanted = "padded" if self.collate.layout == "padded" else "auto"
            layout = prepare_layout(model, wanted, self.args, self.accelerator)
            if "encoder_decoder" in {layout, self.collate.layout} and layout != self.collate.layout:
                raise UsageError(
                    f"of the model and its reference, {type(model).__name__}, one alone is an "
                    "encoder-decoder model, and they read the same token ids; pass a reference of "
                    "the model's kind, or add reference_logps to the rows"
                )
            collate = PreferenceCollator(
                min(self.collate.pad_token_id, vocabulary_size(model) - 1),
                self.collate.group_size,
                layout=layout,
                decoder_start_token_id=self.collate.decoder_start_token_id,
                rank_end_token=self.collate.rank_end_token,
            )
            return replace(self, collate=collate)._score(model, dataset, name)
        finally:
            if moves:
                model.to(home)

    def _score(self, model: PreTrainedModel, dataset: Dataset, name: str) -> Dataset:
        """Raises a UsageError in every process if one of them has an error."""
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        if count == 1:
            return self._add(model, dataset, name)
        scored, error = [], None
        try:
            share = dataset.select(range(rank, len(dataset), count))
            if len(share):
                label = f"{name}, of which every {count}th row from {rank + 1} on"
                added = self._add(model, share, label, f"{rank + 1}-of-{count}")
                scored = list(added["reference_logps"])
        except Exception as caught:  # the others wait for this process
            error = f"process {rank}: {caught}"
        shares = gather_object([(scored, error)])
        errors = [text for _, text in shares if text]
        if errors:
            raise UsageError(f"reference log-probabilities of {name}: {'; '.join(errors)}")
        logps = [shares[i % count][0][i // count] for i in range(len(dataset))]
        return dataset.add_column("reference_logps", logps)

    def _add(
        self, model: PreTrainedModel, dataset: Dataset, name: str, folder: str = ""
    ) -> Dataset:
        budget = self.args.max_tokens_per_batch
        if budget is None:  # the largest row, at least
            budget = max([_TOKENS, *(count_tokens(row, self.collate.layout) for row in dataset)])
        cache = self.args.reference_cache or Path(self.args.output_dir, "reference")
        return add_reference_logps(
            dataset,
            model,
            collate=self.collate,
            max_tokens_per_batch=budget,
            cache=Path(cache, folder),
            temperature=self.args.temperature,
            impl=self.args.impl,
            scratch_bytes=self.args.scratch_bytes,
            name=name,
            progress=not self.args.disable_tqdm,
            autocast=self.accelerator.autocast,
            whole_responses=self.collate.rank_end_token,
        )
