"""Fronts for TRL's trainers with the fused loss in place of theirs; `use` mixes them in.

Every class stands in front of one of TRL's and keeps all the rest of it: data, reference model,
accumulation, logging, checkpoints. That of the DPOTrainer is here, those of the CPOTrainer and the
ORPOTrainer in `concatenated`. B pairs in a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from plad_fast.data.packing import PreferenceBatch
from plad_fast.errors import UsageError
from plad_fast.integrations.trl.head_loss import HeadLoss, Measured
from plad_fast.integrations.trl.pair_losses import joined
from plad_fast.integrations.trl.pair_rows import pair_batch

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

_LAYOUTS = {
    "shared": "what a pair begins with runs once, and no padding",
    "packed": "no padding",
    "padded": "as TRL's own",
    "encoder_decoder": "the encoder reads every prompt once",
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

    def _say_once(self, places: int, batch: PreferenceBatch) -> None:
        """Prints what is done to the first batch, of which TRL would run so many places."""
        if self._said or not self.is_world_process_zero():
            return
        self._said = True
        head_loss = self._head_loss
        tokens, scored = batch["input_ids"].numel(), len(batch["targets"])
        if "decoder_input_ids" in batch:
            tokens += batch["decoder_input_ids"].numel()
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
    aux_loss_enabled: bool
    router_aux_loss_coef: float
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
        head_loss = self._head_loss
        ld_alpha = head_loss.ld_alpha
        batch = pair_batch(
            inputs["input_ids"],
            inputs["attention_mask"],
            completion,
            layout=head_loss.layout,
            limits=head_loss.limits,
            cut_tails=ld_alpha is not None,
        )
        self._say_once(inputs["input_ids"].numel(), batch)
        reference = self._reference_logps(inputs, batch)  # (S,)
        out = head_loss.measure(
            self.accelerator,
            model,
            batch,
            reference_logps=reference,
            loss=None if ld_alpha is None else head_loss.desensitised(batch),
            group_size=2 if ld_alpha is None else 4,
            router_coefficient=self.router_aux_loss_coef if self.aux_loss_enabled else None,
        )
        self._note(out, reference, inputs["attention_mask"], ld_alpha)
        if not return_outputs:
            return out.loss
        with torch.no_grad():  # for compute_metrics; TRL makes these logits anew, too
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            )
        return out.loss, outputs

    def _reference_logps(self, inputs: dict[str, Any], batch: PreferenceBatch) -> Tensor:  # (S,)
        if self.precompute_ref_logps:
            pairs = torch.stack([inputs[name] for name in _DPO_REFERENCE], dim=1).float()
            if self._head_loss.ld_alpha is not None:  # TRL has added the tails' share to them
                pairs = torch.stack([pairs, torch.zeros_like(pairs)], dim=2)
            return pairs.flatten()
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

    def _note(
        self, out: Measured, reference: Tensor, attention_mask: Tensor, ld_alpha: float | None
    ) -> None:
        """TRL's metrics, by its names."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        gather = self.accelerator.gather

        def pairs(values: Tensor, tail_share: float | None = ld_alpha) -> Tensor:  # (S,) -> (B, 2)
            if ld_alpha is None or tail_share is None:
                return values.view(-1, 2)
            return joined(values.view(-1, 4), tail_share)

        logps = pairs(out.logps.detach())
        rewards = self.beta * (logps - pairs(reference))
        better = (rewards[:, 0] > rewards[:, 1]).float()
        rows = torch.cat([rewards, logps, better[:, None]], dim=1)  # (B, 5)
        means = gather(rows).mean(0).tolist()
        metrics["rewards/chosen"].append(means[0])
        metrics["rewards/rejected"].append(means[1])
        metrics["rewards/margins"].append(means[0] - means[1])
        metrics["rewards/accuracies"].append(means[4])
        metrics["logps/chosen"].append(means[2])
        metrics["logps/rejected"].append(means[3])

        counts = pairs(out.counts, 1)
        sequences = torch.arange(counts.numel(), device=counts.device)
        is_chosen = (sequences % 2 == 0).repeat_interleave(counts.flatten())  # (N,)
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
        if out.router_loss is not None:
            metrics["aux_loss"].append(gather(out.router_loss).mean().item())
        if "mean_logit" in out.tokens:
            for side, count in (("chosen", chosen), ("rejected", rejected)):
                metrics[f"logits/{side}"].append(totals[f"{side} mean_logit"] / max(count, 1))
        if "entropy" in out.tokens:
            entropy = totals["chosen entropy"] + totals["rejected entropy"]
            metrics["entropy"].append(entropy / max(chosen + rejected, 1))
            metrics["mean_token_accuracy"].append(totals["chosen is_top1"] / max(chosen, 1))
