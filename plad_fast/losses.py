"""Preference losses: pure functions from sequence log-likelihoods to one number per group.

A group is the K responses to one prompt, best first: the teacher's answer, then the student's.
B groups. `logps` holds s(y) = sum_t log p(y_t | x, y_<t), divided by |y| ** alpha when length
normalisation is on.

A new loss is one function under `@register_loss`. Its first argument is `logps` (B, K); it may
ask for `scores` (B, K) or `counts` (B, K) by naming them; its other keyword arguments are its
options. It returns one loss per group, (B,), and must treat groups independently: the one-pass
loss calls it on some groups at a time.

References: PLaD, Zhang et al. 2024, arXiv 2406.02886. SLiC, Zhao et al. 2022, arXiv 2210.00045.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plad_fast.errors import UsageError

_TENSOR_ARGUMENTS = ("scores", "counts")


@dataclass(frozen=True)
class LossSpec:
    """A loss function with what its signature says of it."""

    name: str
    fn: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Option names with their default values; `inspect.Parameter.empty` means required."""
    needs: tuple[str, ...] = ()
    """Which of `scores` and `counts` the function asks for."""
    mean_over: str = "groups"
    """`groups`, or `tokens` of the groups' first sequences: what the sum is divided by."""
    length_normalized: bool = True
    """False: the function always gets plain sums, whatever the caller's length normalisation."""

    @property
    def needs_scores(self) -> bool:
        return "scores" in self.needs


_REGISTRY: dict[str, LossSpec] = {}


def register_loss(
    name: str, *, mean_over: str = "groups", length_normalized: bool = True
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a loss function known under `name`; see the module's docstring for its form."""
    assert mean_over in ("groups", "tokens")

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _REGISTRY:
            raise ValueError(f"a loss named {name!r} is registered already")
        _REGISTRY[name] = _spec_of(name, fn, mean_over, length_normalized)
        return fn

    return register


def available() -> list[str]:
    """Names that `get_loss` knows, sorted."""
    return sorted(_REGISTRY)


def get_loss(loss: str | Callable[..., Tensor]) -> LossSpec:
    """The registered loss of that name, or a description of the caller's own function.

    Raises:
        UsageError: unknown name; the message lists the known ones.
    """
    if callable(loss):
        return _spec_of(getattr(loss, "__name__", "custom"), loss, "groups", True)
    if loss not in _REGISTRY:
        raise UsageError(f"unknown loss {loss!r}; known losses: {', '.join(available())}")
    return _REGISTRY[loss]


def _spec_of(
    name: str, fn: Callable[..., Tensor], mean_over: str, length_normalized: bool
) -> LossSpec:
    parameters = list(inspect.signature(fn).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return LossSpec(
        name=name,
        fn=fn,
        options={p.name: p.default for p in named if p.name not in _TENSOR_ARGUMENTS},
        needs=tuple(p.name for p in named if p.name in _TENSOR_ARGUMENTS),
        mean_over=mean_over,
        length_normalized=length_normalized,
    )


@register_loss("plad_ranking")
def plad_ranking(
    logps: Tensor,  # (B, K)
    *,
    beta: float = 1.0,
) -> Tensor:  # (B,)
    """Ranking calibration: max(0, beta - s(y+) + s(y-)).

    PLaD's ranking loss, of the form of SLiC's rank loss. With more than one rejected response it
    is the mean over them. At the hinge itself the gradient is 0.
    """
    _check_beta(beta)
    _check_group_size(logps, at_least=2)
    chosen, rejected = logps[:, :1], logps[:, 1:]
    return torch.relu(beta - chosen + rejected).mean(dim=1)


@register_loss("plad_margin")
def plad_margin(
    logps: Tensor,  # (B, K)
    *,
    scores: Tensor,  # (B, K)
    beta: float = 1.0,
) -> Tensor:  # (B,)
    """Margin calibration: max(0, beta (q(y+) - q(y-)) - s(y+) + s(y-)).

    PLaD's margin loss, of the form of SLiC's margin loss; q is a score of the text (a reward
    model, ROUGE to a reference, a judge). The mean over the rejected responses if they are many.
    """
    _check_beta(beta)
    _check_group_size(logps, at_least=2)
    gaps = beta * (scores[:, :1] - scores[:, 1:])
    return torch.relu(gaps - logps[:, :1] + logps[:, 1:]).mean(dim=1)


@register_loss("plad_listwise")
def plad_listwise(
    logps: Tensor,  # (B, K)
    *,
    beta: float = 1.0,
) -> Tensor:  # (B,)
    """Listwise ranking: sum over i < j of max(0, beta (j - i) - s(y_i) + s(y_j)).

    SLiC's list rank loss over K candidates that lie in order, best first.
    """
    _check_beta(beta)
    _check_group_size(logps, at_least=2)
    better, worse = torch.triu_indices(
        logps.shape[1], logps.shape[1], offset=1, device=logps.device
    )
    margins = beta * (worse - better).to(logps.dtype)
    return torch.relu(margins - logps[:, better] + logps[:, worse]).sum(dim=1)


@register_loss("sft", mean_over="tokens", length_normalized=False)
def sft(
    logps: Tensor,  # (B, K)
) -> Tensor:  # (B,)
    """Negative log-likelihood of each group's first response: sequence-level distillation.

    Kim and Rush 2016, arXiv 1606.07947, equation 5. The mean is over tokens, as everywhere.
    """
    return -logps[:, 0]


@dataclass(frozen=True)
class Objective:
    """A loss bound to its options: sequence sums in, the number to minimise out.

    value = sum of group losses / num_groups + sft_weight * sum of NLL(y+) / num_tokens

    For a loss whose mean is over tokens the first denominator is `num_tokens` too. The second
    term is SLiC's regulariser (section 2.3).
    """

    spec: LossSpec
    group_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    sft_weight: float = 0.0
    length_normalization: float = 0.0

    @classmethod
    def bind(
        cls,
        loss: str | Callable[..., Tensor],
        *,
        group_size: int,
        sft_weight: float = 0.0,
        length_normalization: float = 0.0,
        has_scores: bool,
        **options: Any,
    ) -> Objective:
        """Check names, options and shapes by one call on two groups of zeros.

        Raises:
            UsageError: unknown loss or option, missing scores, negative weights, or a function
                that does not return one number per group.
        """
        spec = get_loss(loss)
        unknown = sorted(set(options) - set(spec.options))
        if unknown:
            known = ", ".join(spec.options) or "none"
            raise UsageError(
                f"loss {spec.name!r} has no option {', '.join(map(repr, unknown))}; it has: {known}"
            )
        missing = [
            name
            for name, default in spec.options.items()
            if default is inspect.Parameter.empty and name not in options
        ]
        if missing:
            raise UsageError(f"loss {spec.name!r} needs the option {', '.join(missing)}")
        if spec.needs_scores and not has_scores:
            raise UsageError(
                f"loss {spec.name!r} needs scores: one number per sequence, higher is better"
            )
        if group_size < 1:
            raise UsageError(f"group_size must be at least 1, got {group_size}")
        if sft_weight < 0:
            raise UsageError(f"sft_weight must not be negative, got {sft_weight}")
        if length_normalization < 0:
            raise UsageError(f"length_normalization must be at least 0, got {length_normalization}")
        objective = cls(spec, group_size, options, sft_weight, length_normalization)
        objective._probe()
        return objective

    def _probe(self) -> None:
        zeros = torch.zeros(2, self.group_size)
        losses = self.group_losses(zeros, counts=zeros.long() + 1, scores=zeros)
        if not isinstance(losses, Tensor) or losses.shape != (2,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UsageError(
                f"loss {self.spec.name!r} must return one number per group: for 2 groups the "
                f"shape (2,), got {got}"
            )

    def group_losses(
        self,
        sums: Tensor,  # (B, K), plain sums of token log-probabilities
        counts: Tensor,  # (B, K)
        scores: Tensor | None = None,  # (B, K)
    ) -> Tensor:  # (B,)
        """The loss of every group, without the regulariser."""
        tensors = {"counts": counts, "scores": scores}
        logps = self.normalize(sums, counts) if self.spec.length_normalized else sums
        return self.spec.fn(logps, **{k: tensors[k] for k in self.spec.needs}, **self.options)

    def normalize(self, sums: Tensor, counts: Tensor) -> Tensor:
        """sums / counts ** alpha; an empty sequence stays 0."""
        if self.length_normalization == 0:
            return sums
        return sums / counts.clamp(min=1).to(sums.dtype) ** self.length_normalization

    def denominators(
        self,
        counts: Tensor,  # (B, K)
        num_groups: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
    ) -> tuple[float | Tensor, float | Tensor]:
        """What the group losses and the regulariser are divided by; never 0."""
        groups = len(counts) if num_groups is None else num_groups
        tokens = counts[:, 0].sum() if num_tokens is None else num_tokens
        groups, tokens = _nonzero(groups), _nonzero(tokens)
        return (tokens if self.spec.mean_over == "tokens" else groups), tokens

    def value(
        self,
        group_losses: Tensor,  # (B,)
        sums: Tensor,  # (B, K)
        denominators: tuple[float | Tensor, float | Tensor],
    ) -> Tensor:  # ()
        """The number to minimise."""
        loss = group_losses.sum() / denominators[0]
        if self.sft_weight:
            loss = loss - self.sft_weight * sums[:, 0].sum() / denominators[1]
        return loss


def preference_loss(
    sums: Tensor,  # (S,) or (B, K)
    counts: Tensor,  # same shape
    *,
    loss: str | Callable[..., Tensor] = "plad_ranking",
    group_size: int = 2,
    scores: Tensor | None = None,  # same shape
    sft_weight: float = 0.0,
    length_normalization: float = 0.0,
    num_groups: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    **options: Any,
) -> Tensor:  # ()
    """A preference loss on sequence log-probabilities that exist already.

    Give it `sums` and `counts` of `linear_sequence_logprobs` (with its `length_normalization`
    left at 0: the loss applies it). It equals `fused_linear_preference_loss` in value and
    gradients, at the price of one more matrix product.

    Raises:
        UsageError: as in `Objective.bind`; a number of sequences that `group_size` does not divide.
    """
    objective = Objective.bind(
        loss,
        group_size=group_size,
        sft_weight=sft_weight,
        length_normalization=length_normalization,
        has_scores=scores is not None,
        **options,
    )
    check_groups(sums.numel(), group_size)
    shape = (-1, group_size)
    sums, counts = sums.reshape(shape), counts.reshape(shape)
    scores = None if scores is None else scores.reshape(shape).to(sums.dtype)
    losses = objective.group_losses(sums, counts, scores)
    return objective.value(losses, sums, objective.denominators(counts, num_groups, num_tokens))


def check_groups(num_sequences: int, group_size: int) -> None:
    """Raise a UsageError unless the sequences form whole groups."""
    if num_sequences % group_size:
        raise UsageError(
            f"{num_sequences} sequences do not form groups of {group_size}; sequences of a group "
            "lie next to each other, best first"
        )


def _nonzero(count: float | Tensor) -> float | Tensor:
    if not isinstance(count, Tensor):
        return count or 1
    # float64: an integer tensor would turn the weight it divides into float32.
    return torch.where(count > 0, count, 1).double()


def _check_beta(beta: float) -> None:
    if not beta >= 0:
        raise UsageError(f"beta is a margin of log-likelihood and must be at least 0, got {beta}")


def _check_group_size(logps: Tensor, at_least: int) -> None:
    if logps.ndim != 2 or logps.shape[1] < at_least:
        raise UsageError(
            f"this loss compares responses: it needs groups of {at_least} or more sequences, "
            f"got log-probabilities of shape {tuple(logps.shape)}"
        )
