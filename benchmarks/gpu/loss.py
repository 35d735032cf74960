"""Time, memory and errors of implementations of the loss, forward and backward, at every shape.

The implementations of `benchmarks.peers` and more that only a GPU can tell apart. Libraries that
have the mean cross-entropy only are measured with it: the same products, and another loss.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.check import Oracle
from benchmarks.data import PairBatch
from benchmarks.gpu.worker import Section, Shape
from benchmarks.loss import Tally, summarise
from benchmarks.measure import measure, save_oracle
from benchmarks.peers import Impl, Step

# What one wants to know first; the others follow.
FIRST = (
    "one-pass", "op", "3 products", "trl", "torch cross-entropy", "cut-cross-entropy",
    "liger tokens", "naive",
)  # fmt: skip
SHARES = (1.0, 0.5, 0.0)
TINY_SHARES = (0.5,)


def compiled_naive(batch: PairBatch) -> Step:
    leaves = peers._leaves(batch)
    index = batch.targets.unsqueeze(1)

    # A dry run on a CPU needs no C++ compiler.
    @torch.compile(dynamic=False, backend="inductor" if batch.hidden.is_cuda else "aot_eager")
    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits.log_softmax(-1).gather(1, index).squeeze(1)

    def loss() -> Tensor:
        return peers.hinge(peers._sequence_sums(logprobs(*leaves), batch))

    return peers._step(loss, *leaves)


def liger_tokens(batch: PairBatch) -> Step:
    """Liger's log-probabilities of tokens: its Hopper kernels, elsewhere chunks in torch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    leaves = peers._leaves(batch)

    def loss() -> Tensor:
        nll = LigerFusedLinearScaledCrossEntropyFunction.apply(*leaves, batch.targets)
        return peers.hinge(peers._sequence_sums(-nll, batch))

    return peers._step(loss, *leaves)


def liger_cross_entropy(batch: PairBatch) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    leaves = peers._leaves(batch)
    return peers._step(lambda: liger_fused_linear_cross_entropy(*leaves, batch.targets), *leaves)


def quack_cross_entropy(batch: PairBatch) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    leaves = peers._leaves(batch)
    # Its own autotuning takes minutes.
    function = partial(chunked_linear_cross_entropy, *leaves, batch.targets, tuned=False)
    return peers._step(function, *leaves)


def torch_cross_entropy(batch: PairBatch) -> Step:
    """PyTorch's own, in chunks of its own choice."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    leaves = peers._leaves(batch)
    options = LinearCrossEntropyOptions()
    return peers._step(
        lambda: linear_cross_entropy(*leaves, batch.targets, options=options), *leaves
    )


def all_implementations() -> dict[str, Impl]:
    """By name, in their order; ours launch the Triton kernels."""
    known = dict(peers.IMPLS)
    del known["1+2a products"]
    found = [
        replace(known.pop("one-pass"), prepare=partial(peers.one_pass, impl="triton")),
        replace(known.pop("op"), prepare=partial(peers.op, impl="triton")),
        *known.values(),
        Impl("torch cross-entropy", torch_cross_entropy, cross_entropy=True),
        Impl("liger tokens", liger_tokens, package="liger_kernel", compiled=True),
        Impl("liger cross-entropy", liger_cross_entropy, "liger_kernel", cross_entropy=True),
        Impl("quack cross-entropy", quack_cross_entropy, "quack", cross_entropy=True),
        Impl("naive compiled", compiled_naive, compiled=True),
    ]
    by_name = {impl.name: impl for impl in found}
    return {name: by_name[name] for name in dict.fromkeys([*FIRST, *by_name])}


def oracle_of(section: Section, shape: Shape, active: float) -> Oracle:
    """Made by the first process that asks for it."""
    path = section.args.truths / f"{shape.name}-{active}.pt"
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        made = save_oracle(shape.case(active, section.device), draft)
        if made["status"] != "ok":
            raise ValueError(made["reason"])
        draft.replace(path)
    return Oracle.load(path)


def measure_one(section: Section, impl: Impl, shape: Shape, active: float) -> None:
    repeats, seconds = (2, 0.0) if section.tiny else (10, 1.0)
    with section.row(shape=shape.name, impl=impl.name, active=active) as row:
        oracle = oracle_of(section, shape, active)
        case = shape.case(active, section.device)
        found = measure(impl, case, oracle, repeats=repeats, seconds=seconds)
        row.update(summarise(case, impl.name, {impl.name: Tally([found])}))
        # Of the products that the loss needs.
        row["tflops"] = (1 + 2 * active) * shape.product / row["median_ms"] / 1e9
        row["loss_kind"] = "cross-entropy" if impl.cross_entropy else "ranking"
        if found["status"] != "ok":
            row["status"] = f"wrong: {found['reason']}"


def main() -> int:
    section = Section("loss", impl={"help": "one alone; all that are installed by default"})
    known = all_implementations()
    wanted = [known[section.args.impl]] if section.args.impl else known.values()
    shares = TINY_SHARES if section.tiny else SHARES
    for impl in wanted:
        if impl.missing():
            continue
        failures = len(section.failures)
        for shape in section.shapes:
            for active in shares if impl.ours else shares[:1]:
                measure_one(section, impl, shape, active)
        if not impl.ours:  # what another library cannot do, or does wrong, is a result
            del section.failures[failures:]
    return section.finish()


if __name__ == "__main__":
    sys.exit(main())
