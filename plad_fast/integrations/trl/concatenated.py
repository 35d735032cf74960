"""Fronts of TRL's CPOTrainer and ORPOTrainer, which concatenate y+ and y-; see `trainers`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from plad_fast.data.packing import PreferenceBatch
from plad_fast.integrations.trl.head_loss import Measured
from plad_fast.integrations.trl.pair_losses import with_prompt_nll
from plad_fast.integrations.trl.pair_rows import encoder_decoder_batch, pair_batch
from plad_fast.integrations.trl.trainers import WithHeadLoss
from plad_fast.losses.terms import (
    MAX_EXPONENT,
    MAX_SQUARED_EXPONENT,
    NEAREST_TO_ONE,
    means,
    power_rewards,
)


class _FastConcatenated(WithHeadLoss):
    """Common parts of the fronts of CPO's and ORPO's trainers."""

    pad_token_id: int
    is_encoder_decoder: bool
    aux_loss_enabled: bool
    aux_loss_coef: float
    concatenated_inputs: Any
    _shift_right: Any
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
            is_encoder_decoder=self.is_encoder_decoder,
            padding_value=padding,
            device=self.accelerator.device,
        )

    def _pairs(self, both: dict[str, Tensor], *, with_prompts: bool) -> PreferenceBatch:
        places = both["concatenated_input_ids"].numel()
        if self.is_encoder_decoder:
            places += both["concatenated_labels"].numel()
            batch = self._encoder_decoder_pairs(both)
        else:
            batch = pair_batch(
                both["concatenated_input_ids"],
                both["concatenated_attention_mask"],
                both["concatenated_labels"] != -100,
                layout=self._head_loss.layout,
                limits=self._head_loss.limits,
                with_prompts=with_prompts,
            )
        self._say_once(places, batch)
        return batch

    def _encoder_decoder_pairs(
        self, both: dict[str, Tensor], *, every_place: bool = False
    ) -> PreferenceBatch:
        labels = both["concatenated_labels"]
        return encoder_decoder_batch(
            both["concatenated_input_ids"],
            both["concatenated_attention_mask"],
            labels,
            self._shift_right(labels),
            every_place=every_place,
            limits=self._head_loss.limits,
        )

    def _measure(self, model: nn.Module, batch: PreferenceBatch, **options: Any) -> Measured:
        coefficient = self.aux_loss_coef if self.aux_loss_enabled else None
        return self._head_loss.measure(
            self.accelerator, model, batch, logits=False, router_coefficient=coefficient, **options
        )

    def _logits(
        self, model: nn.Module, both: dict[str, Tensor], places: slice
    ) -> dict[str, Tensor]:
        """Mean logits, where they are asked for; TRL's are over prompts and padding, too."""
        if not self._predicting and self._head_loss.metrics != "all":
            return {}
        if self.is_encoder_decoder:
            batch = self._encoder_decoder_pairs(both, every_place=True)
            found = self._head_loss.mean_logits(self.accelerator, model, batch)
            chosen, rejected = found.view(-1, 2, both["concatenated_labels"].shape[1]).unbind(1)
            return {"logits/chosen": chosen.mean(), "logits/rejected": rejected.mean()}
        ids = both["concatenated_input_ids"]
        batch = PreferenceBatch(
            input_ids=ids,
            attention_mask=both["concatenated_attention_mask"],
            loss_rows=torch.arange(ids.numel(), device=ids.device),
            targets=ids.flatten(),  # which are not looked at
            cu_seqlens=torch.tensor([0, ids.numel()], device=ids.device),
        )
        found = self._head_loss.mean_logits(self.accelerator, model, batch).view_as(ids)
        chosen, rejected = found[:, places].chunk(2)
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
        out = self._measure(model, pairs)
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
        # TRL's regulariser is the likelihood of y+ with its prompt; no decoder predicts a prompt.
        with_prompts = not self.is_encoder_decoder
        groups, size = self._pairs(both, with_prompts=with_prompts), 3 if with_prompts else 2
        head_loss, loss = self._head_loss, None
        if with_prompts:
            loss = functools.partial(
                with_prompt_nll,
                name=head_loss.loss,
                options=head_loss.options,
                nll_weight=head_loss.nll_weight(groups["cu_seqlens"].diff().view(-1, 3)[:, ::2]),
            )
        out = self._measure(model, groups, loss=loss, group_size=size)
        logps, counts = out.logps.detach().view(-1, size), out.counts.view(-1, size)
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


def _rewards(chosen: Tensor, rejected: Tensor, logps: Tensor) -> dict[str, Tensor]:
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/rejected": logps[:, 1],
        "logps/chosen": logps[:, 0],
    }
