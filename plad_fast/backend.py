"""What a backend is: a module with the functions of `Backend`, on the types below.

Backends see checked inputs and know nothing of autograd: `plad_fast.autograd` joins forward and
backward. N tokens, V vocabulary, D hidden, S sequences.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from plad_fast.logit_spec import LogitSpec
from plad_fast.objective import Objective

Denominators = tuple[float | Tensor, float | Tensor]


class LinearProblem(NamedTuple):
    """Sequences under an LM head."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,) int64, in [0, V) or ignore_index
    cu_seqlens: Tensor  # (S + 1,) int64
    spec: LogitSpec
    ignore_index: int
    scratch_bytes: int


class LinearStatistics(NamedTuple):
    """Results of the forward, float32 (float64 for float64); 0 for ignored tokens."""

    sums: Tensor  # (S,), divided by count ** length_normalization
    counts: Tensor  # (S,) int64, tokens that are not ignored
    token_logprobs: Tensor  # (N,)
    lse: Tensor  # (N,)
    tail: Tensor  # (N,) what rounding took from lse, or 0 from a backend that has no use for it
    miss: Tensor  # (N,) 1 - p(target)
    entropy: Tensor | None  # (N,)


class HeadGradient(NamedTuple):
    """In the dtypes of what they belong to; None where none was asked for."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


class Upstream(NamedTuple):
    """Gradients of the token outputs, (N,) each, 0 for ignored tokens."""

    logprobs: Tensor
    lse: Tensor | None

    def active(self) -> Tensor:  # (N,) bool
        """Which rows have a gradient at all."""
        active = self.logprobs != 0
        return active if self.lse is None else active | (self.lse != 0)


class Backend(Protocol):
    """A module's functions."""

    def unavailable(self, tensor: Tensor) -> str | None:
        """Why the backend cannot take a tensor of this dtype and device here, or None."""

    def preferred(self, tensor: Tensor) -> bool:
        """Whether impl="auto" should take this backend for a tensor it can take."""

    def linear_forward(
        self, problem: LinearProblem, length_normalization: float, with_entropy: bool
    ) -> LinearStatistics: ...

    def linear_backward(
        self,
        problem: LinearProblem,
        lse: Tensor,  # (N,)
        tail: Tensor,  # (N,)
        miss: Tensor,  # (N,)
        upstream: Upstream,
        needs: tuple[bool, bool, bool],
        skip_inactive: bool,
    ) -> HeadGradient:
        """needs: whether gradients of hidden, weight and bias are wanted.

        skip_inactive: leave rows without a gradient out of the products, for which their number
        must be known; a GPU is waited for.
        """

    def linear_preference_loss(
        self,
        problem: LinearProblem,
        scores: Tensor | None,  # (S,)
        reference_logps: Tensor | None,  # (S,)
        objective: Objective,
        denominators: Denominators,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadGradient]:
        """Of targets of which none is ignored: loss (), sums (S,), group losses (B,), whether a
        group is active (B,), and the gradients of the loss, in float32 for float16 inputs.
        """

    def stored_forward(
        self,
        logits: Tensor,  # (N, V) or (S, T, V), of any strides
        targets: Tensor,  # (N,) or (S, T) int64
        spec: LogitSpec,
        ignore_index: int,
        scratch_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token log-probabilities, lse, tail and miss, of the targets' shape."""

    def stored_backward(
        self,
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        tail: Tensor,
        miss: Tensor,
        grad: Tensor,  # of the targets' shape
        spec: LogitSpec,
        ignore_index: int,
        scratch_bytes: int,
    ) -> Tensor:
        """The gradient of the logits."""
