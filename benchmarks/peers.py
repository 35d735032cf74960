"""The implementations under comparison: plad_fast's, the common way in plain torch, torch's own
chunked op, and three libraries.

Each turns a `PairBatch` into a `Step`, which runs the PLaD ranking (hinge) loss, mean over pairs,
forward and backward to hidden states and head weight. The layout a library wants is prepared
outside of the measured call. Libraries are imported when asked for, as they are installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.data import BETA, IGNORE, PairBatch


@dataclass(frozen=True)
class Step:
    """One forward and backward, ready to run."""

    run: Callable[[], Tensor | None]  # returns the loss; gradients are in `.grad` of the leaves
    hidden: Tensor | None = None  # leaf, in the implementation's own layout
    weight: Tensor | None = None  # leaf (V, D)
    to_rows: Callable[[Tensor], Tensor] = lambda grad: grad  # own layout -> (N, D)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """d_hidden (N, D) and d_weight (V, D) of the last run; zeros where it left none."""
        assert self.hidden is not None
        assert self.weight is not None
        d_hidden, d_weight = (
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for leaf in (self.hidden, self.weight)
        )
        return self.to_rows(d_hidden), d_weight

    def clear(self) -> None:
        for leaf in (self.hidden, self.weight):
            if leaf is not None:
                leaf.grad = None


@dataclass(frozen=True)
class Impl:
    name: str
    prepare: Callable[[PairBatch], Step]
    package: str | None = None  # module that must be importable
    ours: bool = False
    compiled: bool = False  # compiles on the first call, which is then kept out of the measurement
    products_only: bool = False  # no loss, no gradients: a floor to compare times with
    cross_entropy: bool = False  # another loss of the same products, the mean over tokens
    multiplies_in_kernels: bool = False  # on CUDA, where torch's profiler does not see products

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"there is no module {self.package}; pip install -e '.[bench]' or a newer torch"


def _leaves(batch: PairBatch) -> tuple[Tensor, Tensor]:
    return batch.hidden.requires_grad_(), batch.weight.requires_grad_()


def _step(
    loss: Callable[[], Tensor],
    hidden: Tensor,
    weight: Tensor,
    to_rows: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> Step:
    def run() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return Step(run, hidden, weight, to_rows)


def _sequence_sums(token_logprobs: Tensor, batch: PairBatch) -> Tensor:
    """(N,) -> (S,)"""
    return torch.segment_reduce(token_logprobs, "sum", offsets=batch.cu_seqlens)


def hinge(sums: Tensor) -> Tensor:
    """Mean over pairs of max(0, beta - s(chosen) + s(rejected)); `sums` (S,) with chosen first."""
    return (BETA - sums[0::2] + sums[1::2]).clamp(min=0).mean()


def one_pass(batch: PairBatch, *, impl: str = "auto") -> Step:
    from plad_fast.ops.preference_losses import fused_linear_preference_loss

    hidden, weight = _leaves(batch)
    targets, cu_seqlens = batch.targets, batch.cu_seqlens
    return _step(
        lambda: (
            fused_linear_preference_loss(
                hidden,
                weight,
                targets,
                cu_seqlens,
                loss="plad_ranking",
                beta=BETA,
                sft_weight=0.0,
                length_normalization=0.0,
                impl=impl,
            ).loss
        ),
        hidden,
        weight,
    )


def op(batch: PairBatch, *, impl: str = "auto") -> Step:
    from plad_fast.ops.logprobs import linear_sequence_logprobs

    hidden, weight = _leaves(batch)
    inputs = hidden, weight, batch.targets, batch.cu_seqlens
    return _step(lambda: hinge(linear_sequence_logprobs(*inputs, impl=impl).sums), hidden, weight)


def naive(batch: PairBatch) -> Step:
    hidden, weight = _leaves(batch)
    index = batch.targets.unsqueeze(1)

    def loss() -> Tensor:
        logits = (hidden @ weight.T).float()
        return hinge(_sequence_sums(logits.log_softmax(-1).gather(1, index).squeeze(1), batch))

    return _step(loss, hidden, weight)


def trl(batch: PairBatch) -> Step:
    """TRL's chunked function with the tile its trainers use, and none of its optional outputs."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    hidden, weight = _leaves(batch)
    tile = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def loss() -> Tensor:
        logprobs, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, batch.targets, 1.0, tile, None, 1.0, ()
        )
        return hinge(_sequence_sums(logprobs, batch))

    return _step(loss, hidden, weight)


def liger(batch: PairBatch) -> Step:
    """Liger's DPO loss, hinge form without a reference model: with its beta at 1 the same loss as
    ours.

    It takes padded rows, all chosen before all rejected.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    assert BETA == 1.0
    function = LigerFusedLinearDPOLoss(beta=1.0, loss_type="hinge", use_ref_model=False)
    order = [*range(0, 2 * batch.num_pairs, 2), *range(1, 2 * batch.num_pairs, 2)]

    def stack(rows: Tensor, padding: float) -> Tensor:
        sequences = rows.split(batch.lengths)
        return pad_sequence([sequences[i] for i in order], batch_first=True, padding_value=padding)

    hidden = stack(batch.hidden, 0.0).requires_grad_()  # (S, T, D)
    weight = batch.weight.requires_grad_()
    targets = stack(batch.targets, IGNORE)  # (S, T)

    def to_rows(grad: Tensor) -> Tensor:
        place = {sequence: row for row, sequence in enumerate(order)}
        return torch.cat([grad[place[s], :length] for s, length in enumerate(batch.lengths)])

    return _step(lambda: function(weight, hidden, targets)[0], hidden, weight, to_rows)


def cut_cross_entropy(batch: PairBatch) -> Step:
    """Per-token cross-entropy: the Triton kernels on CUDA, the library's torch_compile
    elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = _leaves(batch)
    impl = "cce" if hidden.is_cuda else "torch_compile"

    def loss() -> Tensor:
        nll = linear_cross_entropy(hidden, weight, batch.targets, reduction="none", impl=impl)
        return hinge(_sequence_sums(-nll.float(), batch))

    return _step(loss, hidden, weight)


def torch_linear_cross_entropy(batch: PairBatch) -> Step:
    """Per-token cross-entropy by torch's op, in chunks, with the options it chooses itself."""
    hidden, weight = _leaves(batch)
    options = torch.nn.LinearCrossEntropyOptions()

    def loss() -> Tensor:
        nll = torch.nn.functional.linear_cross_entropy(
            hidden, weight, batch.targets, reduction="none", options=options
        )
        return hinge(_sequence_sums(-nll.float(), batch))

    return _step(loss, hidden, weight)


def three_products(batch: PairBatch) -> Step:
    return _bare_products(batch, batch.hidden.shape[0])


def floor(batch: PairBatch) -> Step:
    """One product over all rows and two over as many as active pairs have: the work left under a
    hinge."""
    return _bare_products(batch, batch.active_tokens)


def _bare_products(batch: PairBatch, backward_rows: int) -> Step:
    """The head's library products alone, into buffers that are already there."""
    hidden, weight = batch.hidden, batch.weight
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if backward_rows:
            torch.mm(logits[:backward_rows], weight, out=d_hidden[:backward_rows])
            torch.mm(logits[:backward_rows].T, hidden[:backward_rows], out=d_weight)

    return Step(run)


IMPLS: dict[str, Impl] = {
    impl.name: impl
    for impl in (
        Impl("one-pass", one_pass, ours=True),
        Impl("op", op, ours=True, multiplies_in_kernels=True),
        Impl("naive", naive),
        Impl("trl", trl, package="trl"),
        Impl("liger", liger, package="liger_kernel", compiled=True),
        Impl(
            "cut-cross-entropy",
            cut_cross_entropy,
            package="cut_cross_entropy",
            compiled=True,
            multiplies_in_kernels=True,
        ),
        Impl(
            "torch-lce",
            torch_linear_cross_entropy,
            package="torch.nn.modules.linear_cross_entropy_options",
        ),
        Impl("3 products", three_products, products_only=True),
        Impl("1+2a products", floor, products_only=True),
    )
}
