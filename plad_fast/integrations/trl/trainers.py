"""Fronts for TRL's trainers with the fused loss in place of theirs; `use` mixes them in.

Every class stands in front of one of TRL's and keeps all the rest of it: data, reference model,
accumulation, logging, checkpoints. B pairs in a batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from plad_fast.data.packing import PreferenceBatch
from plad_fast.errors import UsageError
from plad_fast.integrations.trl.head_loss import HeadLoss, Loss, Measured
from plad_fast.integrations.trl.pair_rows import pair_batch
from plad_fast.losses.registry import get_loss
from plad_fast.losses.terms import (
    MAX_EXPONENT,
    MAX_SQUARED_EXPONENT,
    NEAREST_TO_ONE,
    means,
    power_rewards,
)

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

_LAYOUTS = {
    "shared": "what a pair begins with runs once, and no padding",
    "packed": "no padding",
    "padded": "as TRL's own",
}
_DPO_INPUTS = {"input_ids", "attention_mask", "completion_mask"}
_DPO_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
DIVIDING_BY_LENGTH = {"ipo", "sigmoid_norm"}
"""Losses of the DPOTrainer that see a token which nothing predicts: they count it."""

NO_PROMPT = (
    "a row has no prompt token: TRL counts its first token in the length that {} divides by, "
    "though nothing predicts it; give every row a prompt"
)


class WithHeadLoss(Trainer):
    _own_head_loss: HeadLoss
    args: Any
    accelerator: Any

    _said = False

    @property
    def _head_loss(self) -> HeadLoss:
        return self._own_head_loss.follow(self)

    def _say_once(self, padded: Tensor, batch: PreferenceBatch) -> None:
        """Prints what is done to the first batch, of which TRL would run the `padded` rows."""
        if self._said or not self.is_world_process_zero():
            return
        self._said = True
        head_loss = self._head_loss
        places, tokens, scored = padded.numel(), batch["input_ids"].numel(), len(batch["targets"])
        # Not through a logger: at INFO nobody sees it, and a warning it is not.
        tqdm.write(
            f"plad_fast in {type(self).__bases__[1].__name__}: loss {head_loss.loss}, "
            f"{head_loss.layout} rows ({_LAYOUTS[head_loss.layout]}). Of the first batch's "
            f"{places} tokens {tokens} run through the model ({1 - tokens / places:.0%} saved) and "
            f"{scored} reach the head."
        )


class FastDPO(WithHeadLoss):
    """In front of `trl.DPOTrainer`."""

    replaces = ("_compute_loss",)
    beta: float
    loss_types: list[str]
    precompute_ref_logps: bool
    ref_model: nn.Module | None
    _metrics: Any
    _total_train_tokens: int

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        extra = sorted(inputs.keys() - _DPO_INPUTS - set(_DPO_REFERENCE))
        if extra:
            raise UsageError(
                f"the batch has the entries {', '.join(extra)}, which are not known here; use "
                "TRL's data collator for text"
            )
        completion = inputs["completion_mask"]
        by_length = sorted(DIVIDING_BY_LENGTH & set(self.loss_types))
        if by_length and bool(completion[:, 0].any()):
            raise UsageError(NO_PROMPT.format(by_length[0]))
        batch = pair_batch(
            inputs["input_ids"],
            inputs["attention_mask"],
            completion,
            layout=self._head_loss.layout,
            vocabulary=self._head_loss.vocabulary,
        )
        self._say_once(inputs["input_ids"], batch)
        reference = self._reference_logps(inputs, batch)  # (2 B,)
        out = self._head_loss.measure(self.accelerator, model, batch, reference_logps=reference)
        self._note(out, reference, inputs["attention_mask"])
        if not return_outputs:
            return out.loss
        with torch.no_grad():  # for compute_metrics; TRL makes these logits anew, too
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            )
        return out.loss, outputs

    def _reference_logps(self, inputs: dict[str, Any], batch: PreferenceBatch) -> Tensor:  # (2 B,)
        if self.precompute_ref_logps:
            chosen, rejected = (inputs[name] for name in _DPO_REFERENCE)
            return torch.stack([chosen, rejected], dim=1).flatten().float()
        checkpointing = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(self.model, checkpointing), self._as_reference() as ref:
            return self._head_loss.logps(self.accelerator, ref, batch)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        """The reference model, or the model itself without what its adapters have learnt."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    def _note(self, out: Measured, reference: Tensor, attention_mask: Tensor) -> None:
        """TRL's metrics, by its names."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        gather = self.accelerator.gather
        logps = out.logps.detach().view(-1, 2)  # (B, 2)
        rewards = self.beta * (logps - reference.view(-1, 2))
        better = (rewards[:, 0] > rewards[:, 1]).float()
        rows = torch.cat([rewards, logps, better[:, None]], dim=1)  # (B, 5)
        means = gather(rows).mean(0).tolist()
        metrics["rewards/chosen"].append(means[0])
        metrics["rewards/rejected"].append(means[1])
        metrics["rewards/margins"].append(means[0] - means[1])
        metrics["rewards/accuracies"].append(means[4])
        metrics["logps/chosen"].append(means[2])
        metrics["logps/rejected"].append(means[3])

        counts = out.counts.view(-1, 2)
        sequences = torch.arange(out.counts.numel(), device=counts.device)
        is_chosen = (sequences % 2 == 0).repeat_interleave(out.counts)  # (N,)
        sums = {
            "tokens": attention_mask.sum(),
            "chosen": counts[:, 0].sum(),
            "rejected": counts[:, 1].sum(),
        }
        for name, values in out.tokens.items():
            sums[f"chosen {name}"] = values[is_chosen].sum(dtype=torch.float64)
            sums[f"rejected {name}"] = values[~is_chosen].sum(dtype=torch.float64)
        vector = torch.stack([value.double() for value in sums.values()])
        totals = dict(zip(sums, gather(vector[None]).sum(0).tolist(), strict=True))
        if mode == "train":
            # Text is not split over the processes: where a batch is, this is refused.
            self._total_train_tokens += int(totals["tokens"])
        metrics["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = totals["chosen"], totals["rejected"]
        if "mean_logit" in out.tokens:
            for side, count in (("chosen", chosen), ("rejected", rejected)):
                metrics[f"logits/{side}"].append(totals[f"{side} mean_logit"] / max(count, 1))
        if "entropy" in out.tokens:
            entropy = totals["chosen entropy"] + totals["rejected entropy"]
            metrics["entropy"].append(entropy / max(chosen + rejected, 1))
            metrics["mean_token_accuracy"].append(totals["chosen is_top1"] / max(chosen, 1))


class _FastConcatenated(WithHeadLoss):
    """Common parts of the fronts of CPO's and ORPO's trainers."""

    pad_token_id: int
    concatenated_inputs: Any
    _predicting = False

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """TRL's, whose predictions are the metrics of logits."""
        self._predicting = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._predicting = False

    def _both(self, batch: dict[str, Any], padding: int) -> dict[str, Tensor]:
        return self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=padding,
            device=self.accelerator.device,
        )

    def _pairs(self, both: dict[str, Tensor], *, with_prompts: bool) -> PreferenceBatch:
        batch = pair_batch(
            both["concatenated_input_ids"],
            both["concatenated_attention_mask"],
            both["concatenated_labels"] != -100,
            layout=self._head_loss.layout,
            vocabulary=self._head_loss.vocabulary,
            with_prompts=with_prompts,
        )
        self._say_once(both["concatenated_input_ids"], batch)
        return batch

    def _logits(
        self, model: nn.Module, both: dict[str, Tensor], places: slice
    ) -> dict[str, Tensor]:
        """Mean logits, where they are asked for; TRL's are over prompts and padding, too."""
        if not self._predicting and self._head_loss.metrics != "all":
            return {}
        means = self._head_loss.mean_logits(
            self.accelerator,
            model,
            both["concatenated_input_ids"],
            both["concatenated_attention_mask"],
        )
        chosen, rejected = means[:, places].chunk(2)
        return {"logits/chosen": chosen.mean(), "logits/rejected": rejected.mean()}

    def _means(self, train_eval: str, values: dict[str, Tensor]) -> dict[str, float]:
        prefix = "eval_" if train_eval == "eval" else ""
        gather = self.accelerator.gather_for_metrics
        return {f"{prefix}{k}": gather(v.detach()).mean().item() for k, v in values.items()}


class FastCPO(_FastConcatenated):
    """In front of `trl.experimental.cpo.CPOTrainer`."""

    replaces = ("get_batch_loss_metrics", "concatenated_forward", "cpo_loss", "get_batch_logps")
    alpha: float
    beta: float
    cpo_alpha: float
    loss_type: str

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """TRL's loss and its metrics; those of logits where they are asked for."""
        both = self._both(batch, self.pad_token_id)
        pairs = self._pairs(both, with_prompts=False)
        out = self._head_loss.measure(self.accelerator, model, pairs, logits=False)
        logps, counts = out.logps.detach().view(-1, 2), out.counts.view(-1, 2)
        nll = logps.new_zeros(())
        if self.cpo_alpha:
            nll = -logps[:, 0].sum() / counts[:, 0].sum().clamp(min=1)
        # A response of no tokens has the mean 0, as in the loss, where TRL's is NaN; nor do
        # AlphaPO's rewards end in infinity.
        if self.loss_type in ("ipo", "simpo"):
            logps = means(logps, counts)
        limit = MAX_SQUARED_EXPONENT if self.loss_type == "ipo" else MAX_EXPONENT
        chosen_rewards, rejected_rewards = (
            self.beta * power_rewards(logps, self.alpha, limit)
        ).unbind(1)
        return out.loss, self._means(
            train_eval,
            _rewards(chosen_rewards, rejected_rewards, logps)
            | {"nll_loss": nll}
            | self._logits(model, both, slice(None)),
        )


class FastORPO(_FastConcatenated):
    """In front of `trl.experimental.orpo.ORPOTrainer`."""

    replaces = (
        "get_batch_loss_metrics",
        "concatenated_forward",
        "odds_ratio_loss",
        "get_batch_logps",
    )
    odds_ratio_loss: Any
    padding_value: int

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """TRL's loss and its metrics; those of logits where they are asked for."""
        both = self._both(batch, self.padding_value)
        groups = self._pairs(both, with_prompts=True)
        lengths = groups["cu_seqlens"].diff().view(-1, 3)
        # TRL's regulariser is the likelihood of the chosen sequence with its prompt.
        share = len(lengths) / lengths[:, ::2].sum().clamp(min=1)
        head_loss = self._head_loss
        loss = functools.partial(
            _with_prompt_nll,
            name=head_loss.loss,
            options=head_loss.options,
            nll_weight=head_loss.sft_weight * share,
        )
        out = head_loss.measure(
            self.accelerator, model, groups, loss=loss, group_size=3, logits=False
        )
        logps, counts = out.logps.detach().view(-1, 3), out.counts.view(-1, 3)
        nll = -logps[:, ::2].sum() / counts[:, ::2].sum().clamp(min=1)
        # Of a response without tokens, or one that is certain, TRL's odds are infinite or NaN.
        logps = means(logps[:, :2], counts[:, :2])
        odds = self.odds_ratio_loss(*logps.clamp(max=-NEAREST_TO_ONE).unbind(1))
        return out.loss, self._means(
            train_eval,
            _rewards(odds[1], odds[2], logps)
            | {"nll_loss": nll, "log_odds_ratio": odds[3], "log_odds_chosen": odds[4]}
            | self._logits(model, both, slice(-1)),
        )


def _with_prompt_nll(
    logps: Tensor,  # (B, 3): y+, y-, the prompt of y+
    *,
    counts: Tensor,  # (B, 3)
    name: Loss,
    options: Mapping[str, Any],
    nll_weight: Tensor,  # ()
) -> Tensor:  # (B,)
    spec = get_loss(name)
    own = {"counts": counts[:, :2]} if "counts" in spec.takes else {}
    losses = spec.fn(logps[:, :2], **own, **options)
    return losses - nll_weight.to(logps.dtype) * (logps[:, 0] + logps[:, 2])


def _rewards(chosen: Tensor, rejected: Tensor, logps: Tensor) -> dict[str, Tensor]:
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/rejected": logps[:, 1],
        "logps/chosen": logps[:, 0],
    }
