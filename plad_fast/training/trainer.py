"""`transformers.Trainer` with the fused preference loss in place of a model's own loss.

B groups of K responses to one prompt, best first. Loss and metrics are means over groups and
over response tokens of everything they cover: micro-batches, gradient accumulation, processes.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer

from plad_fast.data.packing import PreferenceBatch, PreferenceCollator, to_device
from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model, pad_token_id
from plad_fast.models.encoder_decoder import decoder_start_token
from plad_fast.models.head import through_head
from plad_fast.models.router import asks_for_router_loss, router_losses
from plad_fast.models.wrappers import call_inside, unwrap
from plad_fast.ops.preference_losses import FusedLoss, fused_linear_preference_loss
from plad_fast.training.config import NO_PREDICTIONS, PLaDConfig
from plad_fast.training.metrics import AtBegin, PreferenceMeter, check_best_metric
from plad_fast.training.micro_batches import (
    FILLER,
    BackwardSkipper,
    Groups,
    MicroBatches,
    as_they_are,
)
from plad_fast.training.processes import (
    require_finite,
    require_processes,
    whole_in_every_process,
)
from plad_fast.training.reference_logps import ReferencePass
from plad_fast.training.setup import (
    Rows,
    bind_objective,
    check_inputs,
    disable_dropout,
    numbered,
    of_each,
    prepare_model,
    tokenize,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_utils import EvalLoopOutput


class PLaDTrainer(Trainer):
    """Trains a causal or encoder-decoder LM on preference groups.

    Beside the loss it logs, as means since the last log and, with the prefix `eval_`, over a
    whole evaluation set:

    * `nll`: per token of the best responses, at `temperature`
    * `logps/chosen`, `logps/rejected`: s(y) as the loss sees it
    * `margin`: s of the best response minus the mean of the others
    * `ranking_accuracy`: the share of the others that score below the best
    * `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, for losses on a
      reference, as in TRL: of beta times what the log-probability, a plain sum, has gained on the
      reference's. beta is 1 for a loss without one (`mixture`); `margin` and `ranking_accuracy`
      leave the reference out
    * `active_pairs`: the share of groups whose loss has a gradient
    * `saved_tokens`: the share of tokens that shared prompts spared the model
    * `skipped_backwards`: the share of micro-batches that had no gradient and ran no backward,
      under a loss that groups can satisfy
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
        check_inputs(model, args, processing_class, reference_model)
        if args.disable_dropout and not args.fine_tunes:
            disable_dropout(model)
        encode = functools.partial(tokenize, model, args, processing_class)
        with args.main_process_first(desc="tokenising"):
            train = encode(train_dataset, "train_dataset")
            evaluation = of_each(encode, eval_dataset)
        train = train if train is None else numbered(train)
        self._objective = bind_objective(args, train, evaluation)
        self._has_router_loss = asks_for_router_loss(model)
        self._train_meter, self._eval_meter = (
            PreferenceMeter(self._objective, router_loss=self._has_router_loss) for _ in range(2)
        )
        # A method or a callback of the caller's may add metrics of its own.
        own = type(self).evaluation_loop is PLaDTrainer.evaluation_loop
        own &= type(self).evaluate is Trainer.evaluate
        if own and all(isinstance(each, EarlyStoppingCallback) for each in callbacks or []):
            check_best_metric(args.metric_for_best_model, self._eval_meter.names, evaluation)
        super().__init__(
            model=model,
            args=args,
            data_collator=as_they_are,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        require_processes(self.args, self.accelerator, deepspeed=self.is_deepspeed_enabled)
        # The loss is normalised over the accumulation window: the Trainer must not do it again.
        self.model_accepts_loss_kwargs = True
        always = self._objective.sft_weight or args.fine_tunes or self._has_router_loss
        self._skipper = BackwardSkipper(
            self.accelerator,
            may_be_inactive=not (always or self._objective.always_active),
            wanted=args.skip_inactive,
        )
        self.add_callback(self._skipper.rows)
        self.add_callback(AtBegin(self._begin))
        self.layout = prepare_model(self.model, self.args, self.accelerator)
        collate = PreferenceCollator(
            pad_token_id(processing_class, model),
            self._objective.group_size,
            layout=self.layout,
            decoder_start_token_id=decoder_start_token(self.model),
            rank_end_token=args.rank_end_token,
        )
        self._batches = MicroBatches(collate, args.max_tokens_per_batch, self.accelerator)
        self._reference = ReferencePass(args, self.accelerator, collate, reference_model)
        self.train_dataset = self._with_reference(train, "train_dataset")
        self.eval_dataset = of_each(self._with_reference, evaluation)

    def _begin(self) -> None:
        """Drops what a training before this one has counted."""
        self._train_meter.reset()
        self._skipper.begin(self.callback_handler.callbacks)

    def get_eval_dataloader(self, eval_dataset: Rows | str | None = None) -> DataLoader:
        """As in `transformers.Trainer`; rows may also be as those of the constructor."""
        return super().get_eval_dataloader(self._tokenized(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Rows) -> DataLoader:
        """As in `transformers.Trainer`; rows may also be as those of the constructor."""
        return super().get_test_dataloader(self._tokenized(test_dataset, "test_dataset"))

    def _tokenized(self, rows: Rows | str | None, name: str) -> Any:
        # None is the constructor's dataset, and a text names one of several; `evaluate` passes it.
        found = self.eval_dataset
        own = found.values() if isinstance(found, dict) else [found]
        own = [None, self.train_dataset, *own]
        if isinstance(rows, str) or any(rows is each for each in own):
            return rows
        with self.args.main_process_first(desc="tokenising"):
            tokenized = tokenize(self.model, self.args, self.processing_class, rows, name)
        return self._with_reference(tokenized, name)

    def _with_reference(self, dataset: Dataset | None, name: str) -> Dataset | None:
        if dataset is None or not self._objective.needs_reference:
            return dataset
        trained = self.state.global_step > 0
        return self._reference.add_to(dataset, name, self.model, trained=trained)

    def get_batch_samples(
        self, epoch_iterator: Iterator[PreferenceBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PreferenceBatch], Tensor | None]:
        """Adds the window's numbers of groups and best-response tokens over all processes, (2,)."""
        self._train_meter.start()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._drop_repeated(batches[-1]["groups"])
        for batch in batches if self.args.include_num_input_tokens_seen != "no" else []:
            # The Trainer counts the tokens seen on tensors of these names.
            count = self._batches.count_tokens(batch["groups"].features)
            shown = torch.ones(count, dtype=torch.long)
            batch[getattr(self.model, "main_input_name", "input_ids")] = shown
            batch["attention_mask"] = shown
        groups = [feature for batch in batches for feature in batch["groups"].features]
        tokens = sum(len(feature["response_ids"][0]) for feature in groups)
        totals = torch.tensor([len(groups), tokens], dtype=torch.float32, device=device)
        return batches, self.accelerator.reduce(totals, "sum")

    def _drop_repeated(self, last: Groups) -> None:
        """Drops the rows by which accelerate fills up the last batch of an epoch for all processes:
        they would count twice."""
        several = self.accelerator.num_processes > 1 and not self.args.dataloader_drop_last
        if several and self.accelerator.gradient_state.end_of_dataloader:
            rows: Any = self.train_dataset
            size = len(last.features)
            # Not accelerate's own `remainder`, which an epoch that is resumed does not have.
            if left := len(rows) % (size * self.accelerator.num_processes):
                last.keep(left - self.accelerator.process_index * size)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of forward and backward, by the rule of 6 a parameter and token."""
        parameters = base_model(unwrap(self.model)).num_parameters(exclude_embeddings=True)
        return 6 * self._batches.count_tokens(inputs["groups"].features) * parameters

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "response_ids", "scores", "length", "index"]
        self._signature_columns.append("reference_logps")

    def _prepare_inputs(self, inputs: Any) -> Any:
        # That of DeepSpeed would round scores and reference log-probabilities to 16 bits.
        if "cu_seqlens" in inputs:
            return to_device(inputs, self.args.device)
        return super()._prepare_inputs(inputs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Groups],
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Forward and backward of the batch in micro-batches; those without a gradient skip it."""
        groups = inputs["groups"]
        micro_batches = self._batches.pack(groups.features, self._skipper.parts(groups.features))
        several = self.accelerator.num_processes > 1
        losses = []
        for index, numbers in enumerate(micro_batches):
            # DDP adds the gradients of all processes once, in the last backward. (FSDP does it in
            # every one: gradients that wait for it are whole, and take the memory of the model.)
            last = index == len(micro_batches) - 1
            waits = several and not last and whole_in_every_process(self.accelerator)
            reduces = several and last and self.accelerator.sync_gradients
            with (
                self.accelerator.no_sync(model) if waits else contextlib.nullcontext(),
                self._skipper.micro_batch(unwrap(model), reduces=reduces),
            ):
                batch: Any = self._batches.collate(groups, numbers)
                losses.append(super().training_step(model, batch, num_items_in_batch))
        if self.accelerator.sync_gradients:
            self._skipper.end_step()
        total = torch.stack(losses).sum()
        if not self.is_deepspeed_enabled:
            self._require_finite(total)  # once a batch, since a GPU is waited for
        return total

    def _require_finite(self, loss: Tensor) -> None:
        """Before the optimizer's step; see `require_finite`."""
        require_finite(loss, unwrap(self.model), self.accelerator, self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PreferenceBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,  # (2,) groups, tokens
    ) -> Any:
        """The loss of a micro-batch: its share of the window's loss in training."""
        module = unwrap(model)
        groups, tokens = (None, None) if num_items_in_batch is None else num_items_in_batch

        def forward(_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with router_losses(module, wanted=self._has_router_loss) as routing:
                out = through_head(module, inputs, loss_of)
            own = routing[0] if routing else None
            rows = self._train_meter.rows(
                out,
                inputs["group_tokens"],
                reference_logps=inputs.get("reference_logps"),
                router_loss=own,
            )
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
                scratch_bytes=self.args.scratch_bytes,
                **self.args.loss_options,
            )

        # Wrappers look at their inputs, and FSDP rounds those of floating point (scores): they
        # get to see the token ids only.
        with self.accelerator.autocast():
            loss, rows, active = call_inside(model, module, forward, inputs["input_ids"])
        if num_items_in_batch is not None:
            if self.is_deepspeed_enabled:  # whose backward makes the step
                self._require_finite(loss)
            if inputs.get("index") == [FILLER]:
                loss, rows = loss * 0, rows[:0]
            self._train_meter.add(rows)
            if "index" in inputs:
                loss = self._skipper.loss_to_run(loss, active, inputs["index"])
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
        for numbers in self._batches.pack(features, [list(range(len(features)))]):
            batch = self._prepare_inputs(self._batches.collate(inputs["groups"], numbers))
            with torch.no_grad():
                loss, rows = self.compute_loss(model, batch, return_outputs=True)
            losses.append(loss.detach() * len(numbers))
            parts.append(rows)
            order += numbers
        rows = torch.cat(parts)[torch.tensor(order).argsort().to(loss.device)]
        # Drops the rows by which the last batch was filled up for all processes.
        self._eval_meter.add(self.accelerator.gather_for_metrics(rows))
        return torch.stack(losses).sum() / len(features), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Replaces the mean of batch losses by means over groups and tokens."""
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            raise UsageError(f"compute_metrics is set, and {NO_PREDICTIONS}")
        self._eval_meter.reset()
        self._eval_meter.start()
        with self.paused():
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = self._eval_meter.summary()
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no part of the time in `tokens_per_second`."""
        start = time.perf_counter()
        yield
        self._train_meter.skip(time.perf_counter() - start)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last training log."""
        if "loss" in logs and self._train_meter.total is not None:
            total = self.accelerator.reduce(self._train_meter.total, "sum")
            metrics = self._train_meter.summary(total) | self._skipper.metrics()
            del metrics["loss"]  # the Trainer's own is the mean over optimizer steps
            logs.update(metrics)
            self._train_meter.reset()
        super().log(logs, start_time)
