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
from plad_fast.segments import length_normalized
from plad_fast.validation import check_length_normalization

_TENSOR_ARGUMENTS = ("scores", "counts")
# Arguments of the ops: an option of this name would never reach the loss.
_RESERVED = {
    *("hidden", "weight", "bias", "targets", "cu_seqlens", "loss", "group_size", "sft_weight"),
    *("softcap", "logit_scale", "temperature", "length_normalization", "ignore_index"),
    *("num_groups", "num_tokens", "impl", "scratch_bytes"),
}


@dataclass(frozen=True)
class LossSpec:
    """A loss function with what its signature says of it."""

    name: str
    fn: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Option names with their default values; `inspect.Parameter.empty` means required."""
    takes: tuple[str, ...] = ()
    """Which of `scores` and `counts` the function has a parameter for."""
    needs_scores: bool = False
    """`scores` has no default."""
    mean_over: str = "groups"
    """`groups`, or `tokens` of the groups' first sequences: what the sum is divided by."""
    length_normalized: bool = True
    """False: the function always gets plain sums, whatever the caller's length normalisation."""


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
    try:
        parameters = list(inspect.signature(fn).parameters.values())[1:]
    except ValueError:
        raise UsageError(f"loss {name!r} shows no signature; wrap it in a function") from None
    named = {
        p.name: p.default for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    if clash := sorted(_RESERVED & named.keys()):
        raise UsageError(
            f"loss {name!r} has a parameter named {clash[0]!r}, which is an argument of the op; "
            "give it another name"
        )
    return LossSpec(
        name=name,
        fn=fn,
        options={key: value for key, value in named.items() if key not in _TENSOR_ARGUMENTS},
        takes=tuple(key for key in named if key in _TENSOR_ARGUMENTS),
        needs_scores=named.get("scores") is inspect.Parameter.empty,
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
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Objective:
        """Check names, options and, unless a graph is being traced, shapes: by calls on two groups
        of random numbers.

        Raises:
            UsageError: unknown loss or option, missing scores, negative weights, or a function
                that does not return one number per group, each group on its own.
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
        if not isinstance(group_size, int) or group_size < 1:
            raise UsageError(f"group_size must be a whole number of at least 1, got {group_size}")
        if not sft_weight >= 0:
            raise UsageError(f"sft_weight must not be negative, got {sft_weight}")
        check_length_normalization(length_normalization)
        objective = cls(spec, group_size, options, sft_weight, length_normalization)
        if not torch.compiler.is_compiling():
            objective._probe(torch.device(device))
        return objective

    def _probe(self, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        sums = -5 * torch.rand(2, self.group_size, generator=draw).to(device)
        scores = torch.rand(2, self.group_size, generator=draw).to(device)
        counts = torch.randint(1, 9, sums.shape, generator=draw).to(device)
        try:
            both = self.group_losses(sums, counts, scores)
            parts = [self.group_losses(sums[[i]], counts[[i]], scores[[i]]) for i in (0, 1)]
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"loss {self.spec.name!r} failed on two groups of {self.group_size} random "
                f"log-probabilities: {error}"
            ) from error
        if not isinstance(both, Tensor) or both.shape != (2,):
            got = tuple(both.shape) if isinstance(both, Tensor) else type(both).__name__
            raise UsageError(
                f"loss {self.spec.name!r} must return one number per group: for 2 groups the "
                f"shape (2,), got {got}"
            )
        if not torch.allclose(both, torch.cat(parts), atol=1e-4, equal_nan=True):
            raise UsageError(
                f"loss {self.spec.name!r} gives a group another value when it is alone; a loss "
                "must treat groups independently, since chunks of them are evaluated apart"
            )

    def group_losses(
        self,
        sums: Tensor,  # (B, K), plain sums of token log-probabilities
        counts: Tensor,  # (B, K)
        scores: Tensor | None = None,  # (B, K)
    ) -> Tensor:  # (B,)
        """The loss of every group, without the regulariser."""
        tensors = {"counts": counts, "scores": scores}
        alpha = self.length_normalization if self.spec.length_normalized else 0.0
        # A copy: the function may work in place.
        logps = length_normalized(sums, counts, alpha).clone()
        return self.spec.fn(logps, **{k: tensors[k] for k in self.spec.takes}, **self.options)

    def denominators(
        self,
        counts: Tensor,  # (B, K)
        num_groups: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
    ) -> tuple[float | Tensor, float | Tensor]:
        """What the group losses and the regulariser are divided by; 1 in place of 0.

        Raises:
            UsageError: a negative number, or a tensor that is not a scalar.
        """
        groups = _denominator("num_groups", len(counts) if num_groups is None else num_groups)
        tokens = counts[:, 0].sum() if num_tokens is None else num_tokens
        tokens = _denominator("num_tokens", tokens)
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
        return loss.to(sums.dtype)


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
    if sums.ndim == 2 and sums.shape[1] != group_size:
        raise UsageError(f"sums have groups of {sums.shape[1]}, but group_size is {group_size}")
    for name, tensor in (("counts", counts), ("scores", scores)):
        if tensor is not None and tensor.shape != sums.shape:
            raise UsageError(
                f"{name} must have the shape of sums, {tuple(sums.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
    objective = Objective.bind(
        loss,
        group_size=group_size,
        sft_weight=sft_weight,
        length_normalization=length_normalization,
        has_scores=scores is not None,
        device=sums.device,
        **options,
    )
    check_groups(sums.numel(), group_size)
    shape = (-1, group_size)
    sums, counts = sums.reshape(shape), counts.reshape(shape)
    scores = None if scores is None else scores.reshape(shape).to(sums.dtype)
    losses = objective.group_losses(sums, counts, scores)
    return objective.value(losses, sums, objective.denominators(counts, num_groups, num_tokens))


def refuse_outside_gradients(losses: Tensor, leaf: Tensor) -> None:
    """Raise a UsageError if the losses depend on another tensor than `leaf` that wants a gradient.

    A loss whose gradients are made chunk by chunk during the forward cannot give it one.
    """
    pending, seen = [losses.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf:
            raise UsageError(
                "the loss function uses a tensor that requires a gradient; the one-pass loss "
                "differentiates by the log-probabilities only: use preference_loss on "
                "linear_sequence_logprobs, or detach that tensor"
            )
        pending += [parent for parent, _ in node.next_functions]


def check_groups(num_sequences: int, group_size: int) -> None:
    """Raise a UsageError unless the sequences form whole groups."""
    if num_sequences % group_size:
        raise UsageError(
            f"{num_sequences} sequences do not form groups of {group_size}; sequences of a group "
            "lie next to each other, best first"
        )


def _denominator(name: str, count: float | Tensor) -> float | Tensor:
    if not isinstance(count, Tensor):
        if not count >= 0:
            raise UsageError(f"{name} must not be negative, got {count}")
        return count or 1
    if count.ndim:
        raise UsageError(f"{name} must be a number or a scalar, got shape {tuple(count.shape)}")
    # A wide float: an integer tensor would turn the weight it divides into float32.
    wide = torch.float32 if count.device.type == "mps" else torch.float64
    return torch.where(count > 0, count, 1).to(wide)


def _check_beta(beta: float) -> None:
    if not beta >= 0:
        raise UsageError(f"beta is a margin of log-likelihood and must be at least 0, got {beta}")


def _check_group_size(logps: Tensor, at_least: int) -> None:
    if logps.ndim != 2 or logps.shape[1] < at_least:
        raise UsageError(
            f"this loss compares responses: it needs groups of {at_least} or more sequences, "
            f"got log-probabilities of shape {tuple(logps.shape)}"
        )
