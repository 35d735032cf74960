"""`transformers.Trainer` with the fused preference loss in place of a model's own loss.

B groups of K responses to one prompt, best first. Loss and metrics are means over groups and
over response tokens of everything they cover: micro-batches, gradient accumulation, processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from plad_fast.dispatch import BACKENDS
from plad_fast.errors import UsageError
from plad_fast.fused import fused_linear_preference_loss
from plad_fast.head import call_inside, check_head, head_arguments, unwrap
from plad_fast.losses import Objective, get_loss
from plad_fast.packing import (
    TRUNCATION_SIDES,
    PreferenceBatch,
    PreferenceCollator,
    tokenize_dataset,
)
from plad_fast.training_metrics import PreferenceMeter

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_utils import EvalLoopOutput

Rows = Union["Dataset", Sequence[Mapping[str, Any]]]


@dataclass
class PLaDConfig(TrainingArguments):
    """All of `transformers.TrainingArguments`, and what the preference loss needs."""

    loss: str = "plad_ranking"
    """Name in `plad_fast.losses.available()`. "sft" fine-tunes on the best response alone."""
    beta: float | None = None
    """The margin of the hinge, in nats; None takes the loss's default."""
    sft_weight: float = 0.0
    """Weight of the mean negative log-likelihood of the best responses, added to the loss."""
    length_normalization: float = 0.0
    """alpha in s(y) = sum of log-probabilities / |y| ** alpha: 0 for sums, 1 for means."""
    temperature: float = 1.0
    """Divides the logits before the softmax; 1 scores with the model as it is."""
    max_length: int = 1024
    """Tokens of prompt and response. Longer prompts are cut; a response never is."""
    truncation_side: str = "left"
    """The side from which a long prompt loses tokens: "left" or "right"."""
    impl: str = "auto"
    """Backend of the op, by name; "auto" takes the first that can."""
    scratch_mib: int | None = None
    """Scratch memory of the op in MiB; None lets the op choose."""
    # HfArgumentParser wants the types in this order.
    report_to: None | str | list[str] = "none"  # noqa: RUF036
    """Where to log; nothing leaves the machine unless asked."""
    remove_unused_columns: bool = False
    """The datasets hold token ids by the time the trainer sees them: nothing to remove."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_finite_numbers()
        self.objective(group_size=2, has_scores=True)
        if self.fine_tunes and self.sft_weight:
            raise UsageError(f"loss {self.loss!r} is the likelihood itself; set sft_weight to 0")
        if self.temperature <= 0:
            raise UsageError(f"temperature must be positive, got {self.temperature}")
        if self.max_length < 2:
            raise UsageError(f"max_length must be at least 2 tokens, got {self.max_length}")
        if self.truncation_side not in TRUNCATION_SIDES:
            raise UsageError(f"truncation_side must be left or right, got {self.truncation_side!r}")
        if self.impl != "auto" and self.impl not in BACKENDS:
            raise UsageError(f"unknown impl {self.impl!r}; known: auto, {', '.join(BACKENDS)}")
        if self.scratch_mib is not None and self.scratch_mib < 1:
            raise UsageError(f"scratch_mib must be at least 1, got {self.scratch_mib}")
        if self.label_smoothing_factor:
            raise UsageError("label smoothing is not part of this loss; set it to 0")
        if self.torch_compile:
            raise UsageError(
                "torch_compile=True would compile the loss again for every step; call "
                "model.base_model.compile() before training instead"
            )

    def _require_finite_numbers(self) -> None:
        for name in ("beta", "sft_weight", "length_normalization", "temperature"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} must be a finite number, got {value}")

    def objective(self, *, group_size: int, has_scores: bool) -> Objective:
        """The loss with its options, checked."""
        return Objective.bind(
            self.loss,
            group_size=group_size,
            sft_weight=self.sft_weight,
            length_normalization=self.length_normalization,
            has_scores=has_scores,
            **self.loss_options,
        )

    @property
    def fine_tunes(self) -> bool:
        """Whether the loss is a likelihood of the best responses, which needs no others."""
        return get_loss(self.loss).mean_over == "tokens"

    @property
    def loss_options(self) -> dict[str, Any]:
        """The loss's own options that were set."""
        return {} if self.beta is None else {"beta": self.beta}


class PLaDTrainer(Trainer):
    """Trains a causal LM on preference groups.

    Beside the loss it logs, as means since the last log and, with the prefix `eval_`, over a
    whole evaluation set:

    * `nll`: per token of the best responses, at `temperature`
    * `logps/chosen`, `logps/rejected`: s(y) as the loss sees it
    * `margin`: s of the best response minus the mean of the others
    * `ranking_accuracy`: the share of the others that score below the best
    * `active_pairs`: the share of groups whose loss has a gradient
    * `tokens_per_second`: prompts included

    Args:
        model: a transformers causal LM (see `plad_fast.head.find_head`), or PEFT around one.
        args: the configuration.
        train_dataset, eval_dataset: rows as `plad_fast.packing.tokenize_dataset` takes them;
            `eval_dataset` may be a dict of several.
        processing_class: the model's tokenizer; it is saved with every checkpoint.
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
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        _require_supported(model, args, processing_class)

        def tokenize(rows: Rows | None, name: str) -> Dataset | None:
            return None if rows is None else _tokenize(rows, model, args, processing_class, name)

        evaluation: Any
        with args.main_process_first(desc="tokenising"):
            train = tokenize(train_dataset, "train_dataset")
            if isinstance(eval_dataset, dict):
                evaluation = {
                    key: tokenize(rows, f"eval_dataset[{key!r}]")
                    for key, rows in eval_dataset.items()
                }
            else:
                evaluation = tokenize(eval_dataset, "eval_dataset")
        self._objective = _bind(args, train, evaluation)
        self._train_meter = PreferenceMeter(self._objective)
        self._eval_meter = PreferenceMeter(self._objective)
        super().__init__(
            model=model,
            args=args,
            data_collator=PreferenceCollator(
                _pad_token_id(processing_class), self._objective.group_size
            ),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise UsageError(
                "several GPUs in one process (DataParallel) are not supported; start one process "
                "per GPU with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        # The loss is normalised over the accumulation window: the Trainer must not do it again.
        self.model_accepts_loss_kwargs = True
        # Under FSDP the other processes may not have loaded their weights yet.
        if self.is_world_process_zero():
            check_head(self.model)

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
        counts = [
            batch["cu_seqlens"].diff().view(-1, self._objective.group_size)[:, 0]
            for batch in batches
        ]
        totals = torch.stack([torch.stack([c.new_tensor(len(c)), c.sum()]) for c in counts]).sum(0)
        return batches, self.accelerator.reduce(totals.float().to(device), "sum")

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

        def forward(_: Tensor) -> tuple[Tensor, Tensor]:
            out = fused_linear_preference_loss(
                **head_arguments(module, inputs),
                loss=self.args.loss,
                group_size=self._objective.group_size,
                scores=inputs.get("scores"),
                sft_weight=self.args.sft_weight,
                length_normalization=self.args.length_normalization,
                temperature=self.args.temperature,
                num_groups=groups,
                num_tokens=tokens,
                impl=self.args.impl,
                scratch_bytes=self._scratch_bytes,
                **self.args.loss_options,
            )
            return out.loss, self._train_meter.rows(out, inputs["attention_mask"])

        # Wrappers look at their inputs, and FSDP rounds those of floating point (scores): they
        # get to see the token ids only.
        with self.accelerator.autocast():
            loss, rows = call_inside(model, module, forward, inputs["input_ids"])
        if num_items_in_batch is not None:
            self._require_finite(loss, module)
            self._train_meter.add(rows)
            # DDP, FSDP and DeepSpeed average gradients over processes; this loss wants their sum.
            loss = loss * self.accelerator.num_processes
        return (loss, rows) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: PreferenceBatch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Measures one evaluation batch; there are no predictions to hand on."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, rows = self.compute_loss(model, inputs, return_outputs=True)
        # Drops the rows by which the last batch was filled up for all processes.
        self._eval_meter.add(self.accelerator.gather_for_metrics(rows))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Replaces the mean of batch losses by means over groups and tokens."""
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
            logs.update(metrics)
            self._train_meter.reset()
        super().log(logs, start_time)

    @property
    def _scratch_bytes(self) -> int | None:
        mib = self.args.scratch_mib
        return None if mib is None else mib * 2**20

    def _tokenized(self, rows: Rows | str | None, name: str) -> Any:
        # None is the constructor's dataset, and a text names one of several.
        if rows is None or isinstance(rows, str):
            return rows
        with self.args.main_process_first(desc="tokenising"):
            return _tokenize(rows, self.model, self.args, self.processing_class, name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "response_ids", "scores", "length"]

    def _require_finite(self, loss: Tensor, module: nn.Module) -> None:
        if torch.isfinite(loss):
            return
        step = self.state.global_step
        broken = next((n for n, p in module.named_parameters() if not p.isfinite().all()), None)
        if step > 0:
            advice = "lower the learning rate, or set max_grad_norm=1.0"
        elif broken is not None:
            advice = f"its weights were not finite to begin with ({broken}): load the model again"
        else:
            advice = "look for extreme scores in the data"
        raise UsageError(
            f"the loss is {loss.item()} at step {step}; {advice}; in fp16, use bf16 or float32"
        )


def _require_supported(
    model: PreTrainedModel, args: PLaDConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    if not isinstance(args, PLaDConfig):
        raise UsageError(f"args must be a PLaDConfig, got {type(args).__name__}")
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise UsageError(
            "config.output_router_logits asks for a router loss, which is not part of this loss; "
            "set it to False"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {embeddings} embeddings; "
            "pass the model's own tokenizer, or call model.resize_token_embeddings first"
        )
    parallelism = args.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise UsageError("tensor, context and sequence parallelism are not supported")


def _tokenize(
    rows: Rows,
    model: PreTrainedModel,
    args: PLaDConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Dataset:
    dataset = tokenize_dataset(
        rows,
        tokenizer,
        max_length=args.max_length,
        truncation_side=args.truncation_side,
        first_only=args.fine_tunes,
        with_scores=get_loss(args.loss).needs_scores,
        name=name,
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(dataset["length"])
    if positions is not None and longest > positions:
        raise UsageError(
            f"{name} has sequences of {longest} tokens and the model has {positions} positions; "
            f"set max_length={positions} or less"
        )
    return dataset


def _bind(args: PLaDConfig, train: Dataset | None, evaluation: Any) -> Objective:
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
    return args.objective(group_size=group_size, has_scores=True)


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Some token of the vocabulary: it is masked wherever it stands."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)
