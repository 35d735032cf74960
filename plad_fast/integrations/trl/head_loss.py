"""Forward of a wrapped model to the preference loss and the metrics logged beside it.

S sequences in groups of K; N scored tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from plad_fast.data.packing import PreferenceBatch
from plad_fast.models.head import head_arguments
from plad_fast.models.wrappers import call_inside, unwrap
from plad_fast.ops.logprobs import linear_sequence_logprobs
from plad_fast.ops.preference_losses import fused_linear_preference_loss
from plad_fast.ops.reference import transform_logits
from plad_fast.ops.validation import autocast_head

if TYPE_CHECKING:
    from accelerate import Accelerator


# Bound on the logits of a chunk where metrics are computed from them.
_CHUNK_BYTES = 2**26

METRICS = ("fast", "all")
Loss = str | Callable[..., Tensor]
Translated = tuple[str, Mapping[str, Any], float]
_ATTRIBUTES = {"loss_type": "loss_types"}
"""Names of options and those of the trainer's attributes, where these differ."""


class Measured(NamedTuple):
    """A loss to call `backward()` on, and detached values."""

    loss: Tensor  # ()
    logps: Tensor  # (S,) plain sums
    counts: Tensor  # (S,)
    tokens: dict[str, Tensor]
    """(N,) each: "mean_logit" if it is to be had, "entropy" and "is_top1" on request."""


@dataclass
class HeadLoss:
    """How a trainer's loss is computed.

    Args:
        translate: options of TRL's trainer to the loss, its options and `sft_weight`.
        names: of those options.
        layout: of the batches, see `plad_fast.data.packing`.
        metrics: "fast", or "all" at the price of another pass, see `use_plad_fast`.
        impl, scratch_bytes: of the op.
        vocabulary: of `pair_batch`.
    """

    translate: Callable[[Mapping[str, Any]], Translated]
    names: Collection[str]
    layout: str = "padded"
    metrics: str = "fast"
    impl: str = "auto"
    scratch_bytes: int | None = None
    vocabulary: int | None = None
    loss: Loss = field(init=False)
    options: Mapping[str, Any] = field(init=False)
    sft_weight: float = field(init=False)
    _seen: dict[str, Any] | None = field(default=None, init=False)

    def follow(self, trainer: Any) -> HeadLoss:
        """Translates the trainer's options again where they have changed.

        An option counts as the trainer itself keeps it, else as its arguments have it.

        Raises:
            UsageError: options that do not work here.
        """
        own = vars(trainer)
        present = {}
        for name in self.names:
            attribute = _ATTRIBUTES.get(name, name)
            attribute = attribute if attribute in own else name
            present[name] = own[attribute] if attribute in own else getattr(trainer.args, name)
        if present != self._seen:
            self.loss, self.options, self.sft_weight = self.translate(present)
            self._seen = copy.deepcopy(present)
        return self

    def measure(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batch: PreferenceBatch,
        *,
        reference_logps: Tensor | None = None,  # (S,)
        loss: Loss | None = None,
        group_size: int = 2,
        logits: bool = True,
    ) -> Measured:
        """Runs `model`, which may be wrapped by DDP.

        Args:
            loss: in place of the own one and its regulariser; a function without options.
            logits: whether metrics that need the logits are wanted.
        """
        module = unwrap(model)

        def forward(_: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
            arguments = head_arguments(module, batch)
            out = fused_linear_preference_loss(
                **arguments,
                loss=self.loss if loss is None else loss,
                group_size=group_size,
                reference_logps=reference_logps,
                sft_weight=self.sft_weight if loss is None else 0.0,
                length_normalization=0.0,
                impl=self.impl,
                scratch_bytes=self.scratch_bytes,
                **(self.options if loss is None else {}),
            )
            tokens = _token_metrics(arguments, self.metrics == "all") if logits else {}
            return out.loss, out.sums, out.counts, tokens

        # Wrappers look at their inputs: they get to see the token ids only.
        with accelerator.autocast():
            return Measured(*call_inside(model, module, forward, batch["input_ids"]))

    def logps(
        self, accelerator: Accelerator, model: nn.Module, batch: PreferenceBatch
    ) -> Tensor:  # (S,)
        """Log-probabilities of the batch's sequences under a model that is not trained."""
        module = unwrap(model)

        def forward(_: Tensor) -> Tensor:
            arguments = head_arguments(module, batch)
            return linear_sequence_logprobs(
                **arguments, impl=self.impl, scratch_bytes=self.scratch_bytes
            ).sums

        with torch.no_grad(), accelerator.autocast():
            return call_inside(model, module, forward, batch["input_ids"])

    def mean_logits(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        input_ids: Tensor,  # (R, T)
        attention_mask: Tensor,  # (R, T)
    ) -> Tensor:  # (R, T)
        """Mean over the vocabulary of the logits at every place of padded rows, padding too."""
        count = input_ids.numel()
        batch = PreferenceBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            loss_rows=torch.arange(count, device=input_ids.device),
            targets=input_ids.flatten(),  # which are not looked at
            cu_seqlens=torch.tensor([0, count], device=input_ids.device),
        )
        with torch.no_grad(), accelerator.autocast():
            return _mean_logits(head_arguments(unwrap(model), batch)).view_as(input_ids)


@torch.no_grad()
def _token_metrics(arguments: Mapping[str, Any], everything: bool) -> dict[str, Tensor]:
    if not everything:
        capped = arguments["softcap"] is not None
        return {} if capped else {"mean_logit": _mean_logits(arguments)}
    found: dict[str, list[Tensor]] = {"mean_logit": [], "entropy": [], "is_top1": []}
    for logits, targets in _chunks(arguments):
        found["mean_logit"].append(logits.mean(1))
        found["is_top1"].append(logits.argmax(1) == targets)
        log_probs = logits.log_softmax(1)
        found["entropy"].append(-(log_probs.exp() * log_probs).sum(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def _mean_logits(arguments: Mapping[str, Any]) -> Tensor:  # (N,)
    if arguments["softcap"] is not None:
        return torch.cat([logits.mean(1) for logits, _ in _chunks(arguments)])
    hidden, weight, bias = _head_of(arguments)
    # The mean over the vocabulary is linear in the logits: one row stands for all.
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            mean += bias.float().mean()
        return arguments["logit_scale"] * mean


def _chunks(arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits in float32 of products in the model's dtype, as TRL's are, and their targets."""
    hidden, weight, bias = _head_of(arguments)
    # In float32 the logits, their log-softmax and its exponential.
    size = max(_CHUNK_BYTES // (12 * len(weight)), 1)
    for rows, targets in zip(hidden.split(size), arguments["targets"].split(size), strict=True):
        with torch.autocast(hidden.device.type, enabled=False):
            logits = rows @ weight.T
            if bias is not None:
                logits += bias
            logits = transform_logits(
                logits.float(), arguments["softcap"], arguments["logit_scale"]
            )
        yield logits, targets


def _head_of(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (N, D), weight (V, D) and bias (V,), rounded to what they are multiplied in."""
    return autocast_head(*(arguments[name] for name in ("hidden", "weight", "bias")))
