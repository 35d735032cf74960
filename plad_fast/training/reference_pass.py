"""The reference pass of a training: its share of the rows for every process, the whole for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from plad_fast.data.packing import PreferenceCollator, count_tokens
from plad_fast.errors import UsageError
from plad_fast.models.adapters import vocabulary_size
from plad_fast.training.config import PLaDConfig
from plad_fast.training.reference_logps import add_reference_logps

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedModel

# Tokens of a forward without a backward, where the user set no limit.
_TOKENS = 4096


@dataclass(frozen=True)
class Reference:
    """Scores datasets under a reference model.

    Args:
        args, accelerator, collate, scratch_bytes: of the training.
        prepare: finds the layout of a model; see `plad_fast.models.sharing.prepare`.
    """

    args: PLaDConfig
    accelerator: Accelerator
    collate: PreferenceCollator
    scratch_bytes: int | None
    prepare: Callable[[Any, str], str]

    def score_with_another(self, model: PreTrainedModel, dataset: Dataset, name: str) -> Dataset:
        """As `score`, with a model that is not trained: it is on the device only meanwhile."""
        home = model.device
        # A model that accelerate has spread over devices stays there.
        moves = getattr(model, "hf_device_map", None) is None
        if moves:
            model.to(self.args.device)
        try:
            layout = self.prepare(model, "padded" if self.collate.layout == "padded" else "auto")
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
            )
            return replace(self, collate=collate).score(model, dataset, name)
        finally:
            if moves:
                model.to(home)

    def score(self, model: PreTrainedModel, dataset: Dataset, name: str) -> Dataset:
        """The dataset with the column `reference_logps`; one that has it is checked.

        Raises:
            UsageError: as in `add_reference_logps`, in every process if in one.
        """
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        cache = Path(self.args.reference_cache or Path(self.args.output_dir, "reference"))
        if count == 1 or "reference_logps" in dataset.column_names:
            return self._add(model, dataset, cache, name)
        scored, error = [], None
        try:
            share = dataset.select(range(rank, len(dataset), count))
            if len(share):
                folder = cache / f"{rank + 1}-of-{count}"
                label = f"{name}, of which every {count}th row from {rank + 1} on"
                scored = list(self._add(model, share, folder, label)["reference_logps"])
        except Exception as caught:  # the others wait for this process
            error = f"process {rank}: {caught}"
        shares = gather_object([(scored, error)])
        errors = [text for _, text in shares if text]
        if errors:
            raise UsageError(f"reference log-probabilities of {name}: {'; '.join(errors)}")
        logps = [shares[i % count][0][i // count] for i in range(len(dataset))]
        return dataset.add_column("reference_logps", logps)

    def _add(self, model: PreTrainedModel, dataset: Dataset, cache: Path, name: str) -> Dataset:
        longest = max(count_tokens(row, self.collate.layout) for row in dataset)
        return add_reference_logps(
            dataset,
            model,
            collate=self.collate,
            max_tokens_per_batch=self.args.max_tokens_per_batch or max(_TOKENS, longest),
            cache=cache,
            temperature=self.args.temperature,
            impl=self.args.impl,
            scratch_bytes=self.scratch_bytes,
            name=name,
            progress=not self.args.disable_tqdm,
            autocast=self.accelerator.autocast,
        )
