"""Forward of a wrapped model to the preference loss and the metrics logged beside it.

S sequences in groups of K; N scored tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from plad_fast.data.packing import PreferenceBatch
from plad_fast.data.rows import TokenLimits
from plad_fast.integrations.trl.pair_losses import (
    Loss,
    length_desensitised,
    pair_losses,
    policy_weights,
)
from plad_fast.losses.terms import segment_sums
from plad_fast.models.head import head_arguments
from plad_fast.models.router import router_losses
from plad_fast.models.wrappers import call_inside, unwrap
from plad_fast.ops.backend import sent
from plad_fast.ops.logprobs import linear_sequence_logprobs
from plad_fast.ops.preference_losses import fused_linear_preference_loss
from plad_fast.ops.reference import transform_logits
from plad_fast.ops.validation import autocast_head

if TYPE_CHECKING:
    from accelerate import Accelerator


# Bound on the logits of a chunk where metrics are computed from them.
_CHUNK_BYTES = 2**26

METRICS = ("fast", "all")
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
    router_loss: Tensor | None  # ()
    """Without its coefficient; None where it is not wanted."""


@dataclass
class HeadLoss:
    """How a trainer's loss is computed.

    Args:
        translate: options of TRL's trainer to the loss, its options and `sft_weight`.
        names: of those options.
        layout: of the batches, see `plad_fast.data.packing`.
        metrics: "fast", or "all" at the price of another pass, see `use_plad_fast`.
        impl, scratch_bytes: of the op.
        limits: of the model.
    """

    translate: Callable[[Mapping[str, Any]], Translated]
    names: Collection[str]
    layout: str = "padded"
    metrics: str = "fast"
    impl: str = "auto"
    scratch_bytes: int | None = None
    limits: TokenLimits | None = None
    loss: Loss = field(init=False)
    options: Mapping[str, Any] = field(init=False)
    sft_weight: float = field(init=False)
    ld_alpha: float | None = field(default=None, init=False)
    """What the tail of the longer response counts in DPO; None where it counts as the rest."""
    weighted: bool = field(default=False, init=False)
    """Whether WPO weighs the pairs."""
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
            self.ld_alpha = None if present.get("ld_alpha") == 1 else present.get("ld_alpha")
            self.weighted = present.get("use_weighting", False)
            self._seen = copy.deepcopy(present)
        return self

    def measure(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batch: PreferenceBatch,
        *,
        reference_logps: Tensor | None = None,  # (S,)
        loss: Callable[..., Tensor] | None = None,
        group_size: int = 2,
        logits: bool = True,
        router_coefficient: float | None = None,
    ) -> Measured:
        """Runs `model`, which may be wrapped by DDP.

        Args:
            loss: in place of the own one and its regulariser; a function without options.
            logits: whether metrics that need the logits are wanted.
            router_coefficient: of the router loss, where that is wanted.
        """
        module = unwrap(model)
        with_router = router_coefficient is not None

        def forward(_: Tensor) -> tuple[Any, ...]:
            with router_losses(module, wanted=with_router, coefficient=1.0) as routing:
                arguments = head_arguments(module, batch)
            run = self._weighted if self.weighted else self._one_pass
            total, sums, counts = run(arguments, reference_logps, loss, group_size)
            tokens = _token_metrics(arguments, self.metrics == "all") if logits else {}
            router = None
            if router_coefficient is not None:
                total = total + router_coefficient * routing[0]
                router = routing[0].detach()
            return total, sums, counts, tokens, router

        # Wrappers look at their inputs: they get to see the token ids only.
        with accelerator.autocast():
            return Measured(*call_inside(model, module, forward, batch["input_ids"]))

    def _one_pass(
        self,
        arguments: Mapping[str, Any],
        reference_logps: Tensor | None,  # (S,)
        loss: Callable[..., Tensor] | None,
        group_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), sums (S,) and counts (S,)."""
        out = fused_linear_preference_loss(
            **arguments,
            loss=self.loss if loss is None else loss,
            group_size=group_size,
            reference_logps=reference_logps,
            sft_weight=self.sft_weight if loss is None else 0.0,
            length_normalization=0.0,  # for plain sums
            impl=self.impl,
            scratch_bytes=self.scratch_bytes,
            **(self.options if loss is None else {}),
        )
        return out.loss, out.sums, out.counts

    def _weighted(
        self,
        arguments: Mapping[str, Any],
        reference_logps: Tensor | None,  # (S,)
        loss: Callable[..., Tensor] | None,
        group_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_one_pass`, each pair weighted by WPO.

        The weights are known when all tokens are, so that gradients take a product more.
        """
        out = linear_sequence_logprobs(
            **arguments,
            impl=self.impl,
            scratch_bytes=self.scratch_bytes,
            return_entropy=True,
            entropy_order=2,
        )
        assert out.entropy is not None
        loss = loss or functools.partial(pair_losses, name=self.loss, options=self.options)
        groups, counts = out.sums.view(-1, group_size), out.counts.view(-1, group_size)
        if reference_logps is not None:
            reference_logps = reference_logps.view_as(groups)
        losses = loss(groups, counts=counts, reference_logps=reference_logps)
        offsets = sent(arguments["cu_seqlens"], out.entropy.device)  # from the host
        aligned = segment_sums(out.token_logprobs.detach() + out.entropy, offsets)
        weights = policy_weights(aligned.view_as(groups), counts)
        return (losses * weights).mean(), out.sums.detach(), out.counts

    def desensitised(self, batch: PreferenceBatch) -> Callable[..., Tensor]:
        """The loss of a batch of pairs with their tails cut, and its regulariser."""
        assert self.ld_alpha is not None
        return functools.partial(
            length_desensitised,
            name=self.loss,
            options=self.options,
            ld_alpha=self.ld_alpha,
            nll_weight=self.nll_weight(batch["cu_seqlens"].diff().view(-1, 4)[:, :2]),
        )

    def nll_weight(
        self,
        counts: Tensor,  # (B, parts), tokens whose likelihood is the regulariser
    ) -> Tensor:  # ()
        """What makes a mean over tokens of a mean over pairs of their sums."""
        return self.sft_weight * len(counts) / counts.sum().clamp(min=1)

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
        batch: PreferenceBatch,
    ) -> Tensor:  # (N,)
        """Mean over the vocabulary of the logits of every scored token."""
        with torch.no_grad(), accelerator.autocast():
            return _mean_logits(head_arguments(unwrap(model), batch))


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
