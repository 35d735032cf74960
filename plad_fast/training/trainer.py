"""`transformers.Trainer` with the fused preference loss in place of a model's own loss.

B groups of K responses to one prompt, best first. Loss and metrics are means over groups and
over response tokens of everything they cover: micro-batches, gradient accumulation, processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer

from plad_fast.data.packing import (
    PADDED_LAYOUTS,
    PreferenceBatch,
    PreferenceCollator,
    count_tokens,
    to_device,
    token_counts,
)
from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model, pad_token_id, without_adapters
from plad_fast.models.attention.register import enable
from plad_fast.models.encoder_decoder import decoder_start_token, is_encoder_decoder
from plad_fast.models.head import check_architecture, through_head
from plad_fast.models.router import asks_for_router_loss, check_router_loss, router_losses
from plad_fast.models.sharing import prepare
from plad_fast.models.wrappers import call_inside, gathered, unwrap
from plad_fast.ops.preference_losses import FusedLoss, fused_linear_preference_loss
from plad_fast.training.bins import pack
from plad_fast.training.config import NO_PREDICTIONS, PLaDConfig
from plad_fast.training.metrics import AtBegin, PreferenceMeter
from plad_fast.training.micro_batches import KnownGradients, Satisfied, split_to
from plad_fast.training.processes import of_first_process, require_finite, require_processes
from plad_fast.training.reference_pass import Reference
from plad_fast.training.setup import (
    Features,
    Groups,
    Rows,
    as_they_are,
    bind_objective,
    disable_dropout,
    numbered,
    of_each,
    require_supported,
    tokenize,
    warn_of_narrow_weights,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_utils import EvalLoopOutput

__all__ = ["PLaDConfig", "PLaDTrainer"]

BASE = "base"
"""As the reference model: the model without its adapters."""


class PLaDTrainer(Trainer):
    """Trains a causal or encoder-decoder LM on preference groups.

    Beside the loss it logs, as means since the last log and, with the prefix `eval_`, over a
    whole evaluation set:

    * `nll`: per token of the best responses, at `temperature`
    * `logps/chosen`, `logps/rejected`: s(y) as the loss sees it
    * `margin`: s of the best response minus the mean of the others
    * `ranking_accuracy`: the share of the others that score below the best
    * `active_pairs`: the share of groups whose loss has a gradient
    * `saved_tokens`: the share of tokens that shared prompts spared the model
    * `skipped_backwards`: the share of micro-batches that had no gradient and ran no backward
    * `tokens_per_second`: tokens that entered the model, prompts included
    * `router_loss`: what a mixture of experts adds to the loss if its config asks for it
      (`output_router_logits`) as the trainer is made, a mean over groups; `loss` includes it

    Args:
        model: a transformers causal or encoder-decoder LM (see `models.find_head`), or PEFT
            around one.
        args: the configuration.
        train_dataset, eval_dataset: rows as `plad_fast.data.tokenize_dataset` takes them;
            `eval_dataset` may be a dict of several.
        processing_class: the model's tokenizer; it is saved with every checkpoint.
        reference_model: what losses that need reference log-probabilities compare with; None takes
            the model as it is before training, also before one that is resumed: pass the model that
            the training began with. "base" takes a model with its adapters of PEFT switched off,
            in place and without a second copy. It runs once over the data, before the first step.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        UsageError: what the model, the data or the configuration lack, and later a loss that is
            not finite.
    """

    args: PLaDConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: PLaDConfig,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase,
        reference_model: PreTrainedModel | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        require_supported(model, args, processing_class)
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
        if args.disable_dropout and not args.fine_tunes:
            disable_dropout(model)
        warn_of_narrow_weights(model)
        self._has_router_loss = asks_for_router_loss(model)

        def encode(rows: Rows | None, name: str) -> Dataset | None:
            return None if rows is None else tokenize(rows, model, args, processing_class, name)

        with args.main_process_first(desc="tokenising"):
            train = encode(train_dataset, "train_dataset")
            evaluation = of_each(encode, eval_dataset)
        train = train if train is None else numbered(train)
        self._objective = bind_objective(args, train, evaluation)
        self._train_meter, self._eval_meter = (
            PreferenceMeter(self._objective, router_loss=self._has_router_loss) for _ in range(2)
        )
        self._require_best_metric(args, evaluation, callbacks or [])
        self._begin()
        super().__init__(
            model=model,
            args=args,
            data_collator=as_they_are,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), Satisfied(), AtBegin(self._begin)],
            optimizers=optimizers,
        )
        require_processes(self.args, self.accelerator, deepspeed=self.is_deepspeed_enabled)
        # The loss is normalised over the accumulation window: the Trainer must not do it again.
        self.model_accepts_loss_kwargs = True
        self.layout = self._prepare_model()
        self._collate = PreferenceCollator(
            pad_token_id(processing_class, model),
            self._objective.group_size,
            layout=self.layout,
            decoder_start_token_id=decoder_start_token(self.model),
        )
        self._reference_model = reference_model
        self.train_dataset = self._with_reference(train, "train_dataset")
        self.eval_dataset = of_each(self._with_reference, evaluation)

    def _begin(self) -> None:
        """Leaves behind what a training before this one has counted."""
        self._train_meter.reset()
        self._gradients = KnownGradients()
        self._backwards = [0, 0]  # micro-batches since the last log, and those without a backward
        self._may_skip = False  # in the micro-batch at hand
        self._skipped = False  # in the accumulation window

    def _require_best_metric(
        self, args: PLaDConfig, evaluation: Any, callbacks: Sequence[TrainerCallback]
    ) -> None:
        """Raises UsageError for a metric to choose by that no evaluation has."""
        wanted = args.metric_for_best_model
        # A method or a callback of the caller's may add metrics of its own.
        known = type(self).evaluate is Trainer.evaluate
        known &= type(self).evaluation_loop is PLaDTrainer.evaluation_loop
        known &= all(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
        if wanted is None or evaluation is None or not known:
            return
        names = self._eval_meter.names | {"runtime", "samples_per_second", "steps_per_second"}
        if isinstance(evaluation, dict):
            names = {f"{key}_{name}" for key in evaluation for name in names}
        if wanted.removeprefix("eval_") not in names:
            raise UsageError(
                f"metric_for_best_model is {wanted!r}, and the evaluation has: "
                f"{', '.join(sorted(names))}"
            )

    def get_eval_dataloader(self, eval_dataset: Rows | str | None = None) -> DataLoader:
        """As in `transformers.Trainer`; rows may also be as those of the constructor."""
        return super().get_eval_dataloader(self._tokenized(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Rows) -> DataLoader:
        """As in `transformers.Trainer`; rows may also be as those of the constructor."""
        return super().get_test_dataloader(self._tokenized(test_dataset, "test_dataset"))

    def get_batch_samples(
        self, epoch_iterator: Iterator[PreferenceBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PreferenceBatch], Tensor | None]:
        """Adds how many groups and best-response tokens the window has over all processes, (2,)."""
        self._train_meter.start()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self.args.include_num_input_tokens_seen != "no":
            for batch in batches:
                self._show_tokens(batch)
        groups = [feature for batch in batches for feature in batch["groups"].features]
        tokens = sum(len(feature["response_ids"][0]) for feature in groups)
        totals = torch.tensor([len(groups), tokens], dtype=torch.float32, device=device)
        return batches, self.accelerator.reduce(totals, "sum")

    def _show_tokens(self, batch: dict[str, Any]) -> None:
        """Something of the shape that the Trainer's count of tokens seen is taken from."""
        count = sum(map(self._num_tokens, batch["groups"].features))
        batch[getattr(self.model, "main_input_name", "input_ids")] = torch.ones(count).long()
        batch["attention_mask"] = torch.ones(count).long()

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Groups],
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The batch in micro-batches, each with its backward unless it has no gradient."""
        micro_batches = self._micro_batches(inputs["groups"].features)
        losses = []
        for index, features in enumerate(micro_batches):
            # DDP adds the gradients of all processes once, in the last backward. (FSDP does it in
            # every one: gradients that wait for it are whole, and take the memory of the model.)
            last = index == len(micro_batches) - 1
            several = self.accelerator.num_processes > 1
            waits = several and not last and self._is_plain
            sums = last and several and self.accelerator.sync_gradients
            self._may_skip = self.args.skip_inactive and not sums and bool(self._gradients)
            with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                batch: Any = self._batch(features)
                losses.append(super().training_step(model, batch, num_items_in_batch))
            self._gradients.remember(unwrap(model))
        if self.accelerator.sync_gradients and self._skipped:
            self._gradients.fill()
            self._skipped = False
        return torch.stack(losses).sum()

    def _micro_batches(self, features: Features) -> list[Features]:
        """Groups that run together; as many micro-batches in every process."""
        rows = self._satisfied.rows if self._may_have_none else set()
        satisfied = [i for i, feature in enumerate(features) if feature.get("index") in rows]
        active = [i for i, feature in enumerate(features) if feature.get("index") not in rows]
        # Also where no backward is skipped: whether one is changes no bit.
        parts = [satisfied, active]
        return [[features[i] for i in packed] for packed in self._pack(features, parts)]

    def _pack(self, features: Features, parts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of features that run together; those of different parts never do.

        There are as many in every process: forwards under FSDP, and under DDP those of models with
        buffers, are for all of them.
        """
        bins = []
        for part in parts:
            lengths = [token_counts(features[i], self.layout) for i in part]
            budget, padded = self.args.max_tokens_per_batch, self.layout in PADDED_LAYOUTS
            bins += [[part[i] for i in packed] for packed in pack(lengths, budget, padded=padded)]
        if self.accelerator.num_processes > 1:
            count = torch.tensor([len(bins)], device=self.accelerator.device)
            bins = split_to(bins, int(self.accelerator.gather(count).max()))
        return bins

    @property
    def _satisfied(self) -> Satisfied:
        # Among the callbacks, since a checkpoint's may take the place of the one made here.
        found = (cb for cb in self.callback_handler.callbacks if isinstance(cb, Satisfied))
        satisfied = next(found, None)
        if satisfied is None:
            satisfied = Satisfied()
            self.add_callback(satisfied)
        return satisfied

    @property
    def _may_have_none(self) -> bool:
        """Whether there are groups without a gradient, and a backward may be left out for them."""
        always = self._objective.sft_weight or self.args.fine_tunes or self._has_router_loss
        return not always and self._is_plain

    @property
    def _is_plain(self) -> bool:
        """One process, or DDP: every process has the whole model."""
        sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        return self.accelerator.distributed_type not in sharded

    def _num_tokens(self, feature: Mapping[str, Any]) -> int:
        return count_tokens(feature, self.layout)

    def _batch(self, features: Features) -> PreferenceBatch:
        batch = self._collate(features)
        if "index" in features[0]:
            batch["index"] = [feature["index"] for feature in features]
        return batch

    def _prepare_inputs(self, inputs: Any) -> Any:
        # That of DeepSpeed would round scores and reference log-probabilities to 16 bits.
        if "cu_seqlens" in inputs:
            return to_device(inputs, self.args.device)
        return super()._prepare_inputs(inputs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of forward and backward, by the rule of 6 a parameter and token."""
        tokens = sum(map(self._num_tokens, inputs["groups"].features))
        return 6 * tokens * base_model(unwrap(self.model)).num_parameters(exclude_embeddings=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PreferenceBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,  # (2,) groups, tokens
    ) -> Any:
        """The loss of a micro-batch, as its share in the window's loss when that is known."""
        module = unwrap(model)
        groups, tokens = (None, None) if num_items_in_batch is None else num_items_in_batch

        def forward(_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with router_losses(module, wanted=self._has_router_loss) as routing:
                out = through_head(module, inputs, loss_of)
            own = routing[0] if routing else None
            rows = self._train_meter.rows(out, inputs["group_tokens"], own)
            if own is None:
                return out.loss, rows, out.active
            # A mean over its tokens already: of several micro-batches it is one over groups.
            share = 1.0 if groups is None else len(inputs["group_tokens"]) / groups
            return out.loss + share * own, rows, out.active

        def loss_of(**arguments: Any) -> FusedLoss:
            return fused_linear_preference_loss(
                **arguments,
                loss=self.args.loss,
                group_size=self._objective.group_size,
                scores=inputs.get("scores"),
                reference_logps=inputs.get("reference_logps"),
                sft_weight=self._objective.sft_weight,
                length_normalization=self._objective.length_normalization,
                temperature=self.args.temperature,
                num_groups=groups,
                num_tokens=tokens,
                impl=self.args.impl,
                scratch_bytes=self._scratch_bytes,
                **self.args.loss_options,
            )

        # Wrappers look at their inputs, and FSDP rounds those of floating point (scores): they
        # get to see the token ids only.
        with self.accelerator.autocast():
            loss, rows, active = call_inside(model, module, forward, inputs["input_ids"])
        if num_items_in_batch is not None:
            require_finite(loss, module, self.accelerator, self.state.global_step)
            self._train_meter.add(rows)
            if self._may_have_none and "index" in inputs:
                loss = self._without_gradient(loss, active, inputs)
            # DDP, FSDP and DeepSpeed average gradients over processes; this loss wants their sum.
            loss = loss * self.accelerator.num_processes
        return (loss, rows) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Groups],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Measures one evaluation batch; there are no predictions to hand on."""
        features = inputs["groups"].features
        losses, parts, order = [], [], []
        for packed in self._pack(features, [range(len(features))]):
            batch = self._prepare_inputs(self._batch([features[i] for i in packed]))
            with torch.no_grad():
                loss, rows = self.compute_loss(model, batch, return_outputs=True)
            losses.append(loss.detach() * len(packed))
            parts.append(rows)
            order += packed
        rows = torch.cat(parts)[torch.tensor(order).argsort().to(loss.device)]
        # Drops the rows by which the last batch was filled up for all processes.
        self._eval_meter.add(self.accelerator.gather_for_metrics(rows))
        return torch.stack(losses).sum() / len(features), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Replaces the mean of batch losses by means over groups and tokens."""
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            raise UsageError(f"compute_metrics is set, and {NO_PREDICTIONS}")
        paused = time.perf_counter()
        self._eval_meter.reset()
        self._eval_meter.start()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = self._eval_meter.summary()
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        self._train_meter.skip(time.perf_counter() - paused)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last training log."""
        if "loss" in logs and self._train_meter.total is not None:
            total = self.accelerator.reduce(self._train_meter.total, "sum")
            metrics = self._train_meter.summary(total)
            del metrics["loss"]  # the Trainer's own is the mean over optimizer steps
            if self._may_have_none and self.args.skip_inactive:
                counts = torch.tensor(self._backwards, device=self.accelerator.device)
                ran, skipped = self.accelerator.reduce(counts, "sum").tolist()
                metrics["skipped_backwards"] = skipped / max(ran, 1)
                self._backwards = [0, 0]
            logs.update(metrics)
            self._train_meter.reset()
        super().log(logs, start_time)

    def _without_gradient(self, loss: Tensor, active: Tensor, inputs: PreferenceBatch) -> Tensor:
        """The loss, or one of the same value and no backward to speak of, where it may be skipped.

        The groups' activity is noted, by all processes for all of them: the next epoch deals the
        rows out anew.
        """
        notes = torch.stack([torch.tensor(inputs["index"], device=active.device), active.long()], 1)
        if self.accelerator.num_processes > 1:
            notes = self.accelerator.pad_across_processes(notes, pad_index=-1)
            notes = self.accelerator.gather(notes)
            notes = notes[notes[:, 0] >= 0]
        rows, flags = notes.T.tolist()
        self._satisfied.note(rows, map(bool, flags))
        self._backwards[0] += 1
        # What counts is the gradient in any process: they run a backward together.
        if any(flags) or not self._may_skip:
            return loss
        self._backwards[1] += 1
        self._skipped = True
        return loss.detach() + torch.zeros_like(loss, requires_grad=True)

    def _prepare_model(self) -> str:
        """The layout, found by the first process: the others may not have their weights yet."""

        def find() -> str:
            check_architecture(self.model)
            check_router_loss(self.model)
            return self._prepare(self.model, self.args.layout)

        with gathered(self.model):
            layout = of_first_process(self.accelerator, find)
        if self.accelerator.num_processes > 1 and layout not in PADDED_LAYOUTS:
            enable(base_model(self.model), self.args.attention)
        return layout

    def _prepare(self, model: nn.Module, layout: str) -> str:
        # As in training: autocast decides which attention can run, and how it rounds.
        with self.accelerator.autocast():
            return prepare(model, layout, attention=self.args.attention, check=self.args.self_check)

    def _with_reference(self, dataset: Dataset | None, name: str) -> Dataset | None:
        """The dataset with reference log-probabilities, if the loss needs them and it has none."""
        if dataset is None or not self._objective.needs_reference:
            return dataset
        has_none = "reference_logps" not in dataset.column_names
        if has_none and not self._is_plain:
            raise UsageError(
                f"{name} has no reference_logps, and a model that FSDP or DeepSpeed shards is not "
                "whole in any process to compute them; add them to the rows beforehand, in one "
                "process, with plad_fast.training.reference_logps.add_reference_logps"
            )
        if has_none and self._reference_model is None and self.state.global_step:
            raise UsageError(
                f"{name} has no reference_logps, and the model is not what it was before "
                "training; pass the data to the constructor, or a reference_model"
            )
        reference = Reference(
            self.args, self.accelerator, self._collate, self._scratch_bytes, self._prepare
        )
        if has_none and isinstance(self._reference_model, str):
            with without_adapters(self.model):
                return reference.score(self.model, dataset, name)
        if has_none and self._reference_model is not None:
            return reference.score_with_another(self._reference_model, dataset, name)
        return reference.score(self.model, dataset, name)

    @property
    def _scratch_bytes(self) -> int | None:
        mib = self.args.scratch_mib
        return None if mib is None else mib * 2**20

    def _tokenized(self, rows: Rows | str | None, name: str) -> Any:
        # None is the constructor's dataset, and a text names one of several.
        if rows is None or isinstance(rows, str):
            return rows
        with self.args.main_process_first(desc="tokenising"):
            tokenized = tokenize(rows, self.model, self.args, self.processing_class, name)
        return self._with_reference(tokenized, name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "response_ids", "scores", "length", "index"]
        self._signature_columns.append("reference_logps")
