"""Results that random calls of the ops should give, and tolerances; see `fuzz_ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plad_fast.losses.registry import get_loss
from plad_fast.ops.reference import (
    reference_logits,
    reference_sequence_sums,
    reference_token_logprobs,
    transform_logits,
)
from tests.support.fuzzing import Draw
from tests.support.problems import assert_within_budget

LOGITS = ("softcap", "logit_scale", "temperature")
# Problems are tiny: torch's own error may happen to be 0.
ROUNDINGS = 8


class Truth:
    """What the arguments should give, computed naively in a dtype."""

    def __init__(self, arguments: dict[str, Any], dtype: torch.dtype, *, cast: Any = None) -> None:
        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        a = arguments
        names = [n for n in ("hidden", "weight", "bias", "logits") if a.get(n) is not None]
        self.leaves = {name: leaf(a[name]) for name in names}
        used = {n: t if cast is None else t.to(cast).to(dtype) for n, t in self.leaves.items()}
        spec = {name: a[name] for name in LOGITS if name in a}
        self.ignore_index = a.get("ignore_index", -100)
        self.targets = a["targets"].long().reshape(-1)
        if "logits" in used:
            flat = used["logits"].reshape(-1, used["logits"].shape[-1])
            logits = transform_logits(flat, **spec)
        else:
            logits = reference_logits(used["hidden"], used["weight"], used.get("bias"), **spec)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        self.logits = logits
        self.tokens = reference_token_logprobs(logits, self.targets, self.ignore_index)
        self.bounds = a["cu_seqlens"].long()
        own = get_loss(a["loss"]).length_normalization if "loss" in a else 0.0
        self.alpha = a.get("length_normalization", own)
        self.sums = self.sums_of(self.tokens, self.alpha)
        self.counts = self.sums_of((self.targets != self.ignore_index).double(), 0.0).long()

    def sums_of(self, values: Tensor, alpha: float) -> Tensor:
        return reference_sequence_sums(values, self.targets, self.bounds, alpha, self.ignore_index)

    def objective(self, a: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The number to minimise and the group losses, from the registered function."""
        spec, size = get_loss(a["loss"]), a["group_size"]
        alpha = self.alpha if spec.length_normalized else 0.0
        counts = self.counts.reshape(-1, size)
        plain = self.sums_of(self.tokens, 0.0).reshape(-1, size)
        divisor = counts.clamp(min=1).to(plain.dtype) ** alpha
        constants = {
            name: a[name].to(plain.dtype).reshape(-1, size)
            for name in ("scores", "reference_logps")
            if a.get(name) is not None
        }
        if "reference_logps" in constants:
            constants["reference_logps"] = constants["reference_logps"] / divisor
        constants |= {"counts": counts, "length_normalization": self.alpha}
        options = {name: value for name, value in a.items() if name in spec.options}
        takes = {name: constants[name] for name in spec.takes if name in constants}
        losses = spec.fn(plain / divisor, **takes, **options)
        tokens = a.get("num_tokens")
        tokens = float(counts[:, 0].sum() if tokens is None else tokens) or 1.0
        groups = a.get("num_groups")
        groups = float(len(counts) if groups is None else groups) or 1.0
        value = losses.sum() / (tokens if spec.mean_over == "tokens" else groups)
        return value - a.get("sft_weight", spec.sft_weight) * plain[:, 0].sum() / tokens, losses


def budget(ours: Tensor, same: Tensor, truth: Tensor, what: str, size: float = 0.0) -> None:
    """In float64 what torch's own tests allow, else no more than twice torch's own error.

    size: of terms that may have cancelled in the result.
    """
    ours, same, truth = ours.detach(), same.detach(), truth.detach()
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, not {truth.shape}"
    if same.dtype == torch.float64 or not same.isfinite().all():
        torch.testing.assert_close(ours.double(), same.double(), msg=lambda m: f"{what}: {m}")
        return
    assert ours.isfinite().all(), f"{what} is not finite"
    # Under autocast a gradient of float32 is one of bfloat16 that was widened.
    rounded = ours.to(same.dtype) if same.dtype.itemsize < ours.dtype.itemsize else ours
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    roundings = ROUNDINGS * max(1.0, size / largest if largest else 1.0)
    assert_within_budget(rounded, same, truth, what, roundings=roundings)


def compare_gradients(
    arguments: dict[str, Any],
    truths: tuple[Truth, Truth],
    outputs: list[tuple[Tensor, Tensor, Tensor]],
    draw: Draw,
) -> None:
    """outputs: (ours, the same dtype's, float64's); upstream gradients random, zero in places."""
    wanted = [n for n in truths[0].leaves if arguments[n].requires_grad]
    live = [triple for triple in outputs if triple[0].requires_grad]
    assert live or not wanted, "no graph"
    if not wanted:
        assert not live, "a graph although nothing needs a gradient"
        return
    generator = torch.Generator().manual_seed(draw.torch_seed())
    upstream = [torch.randn(o[0].shape, generator=generator).double() for o in live]
    if draw.maybe(0.3):
        upstream = [u * (torch.rand(u.shape, generator=generator) < 0.5) for u in upstream]
    found = []
    for index, leaves in enumerate((arguments, truths[0].leaves, truths[1].leaves)):
        found.append(
            torch.autograd.grad(
                [triple[index] for triple in live],
                [leaves[n] for n in wanted],
                [u.to(triple[index].dtype) for u, triple in zip(upstream, live, strict=True)],
                create_graph=draw.maybe(0.2),
                allow_unused=True,
                materialize_grads=True,
            )
        )
    for name, ours, same, truth in zip(wanted, *found, strict=True):
        assert ours.dtype == arguments[name].dtype
        budget(ours, same, truth, f"d_{name}", size=_factor(arguments, name))


def _factor(arguments: dict[str, Any], name: str) -> float:
    """What a gradient of the logits is multiplied by."""
    other = arguments.get({"hidden": "weight", "weight": "hidden"}.get(name, ""))
    slope = abs(arguments.get("logit_scale", 1.0)) / arguments.get("temperature", 1.0)
    return slope * (
        1.0 if other is None or not other.numel() else float(other.detach().abs().max())
    )


def truths_of(arguments: dict[str, Any], mode: str) -> tuple[Truth, Truth]:
    """In the dtype of the call, and in float64."""
    leaf = arguments.get("hidden", arguments.get("logits"))
    cast = None
    if mode == "autocast" and "hidden" in arguments and leaf.dtype != torch.float64:
        cast = torch.bfloat16
    return Truth(arguments, cast or leaf.dtype, cast=cast), Truth(
        arguments, torch.float64, cast=cast
    )
