"""The public ops: from hidden states, or from logits, to sequence log-probabilities.

N tokens, V vocabulary, D hidden, S sequences. Tokens of one sequence lie next to each other;
`cu_seqlens` (S + 1,) holds where each sequence starts, and N at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from plad_fast.checks import check_flag, check_length_normalization, shown
from plad_fast.errors import UsageError
from plad_fast.losses.terms import length_normalized, segment_counts, segment_sums
from plad_fast.ops import autograd
from plad_fast.ops import validation as check
from plad_fast.ops.backend import sent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SequenceLogProbs(NamedTuple):
    """Log-probabilities in nat; float32, or float64 for float64 inputs."""

    sums: Tensor
    """(S,) sum over a sequence's tokens, divided by count ** length_normalization."""
    counts: Tensor
    """(S,) int64, tokens that counted: those whose target was not `ignore_index`."""
    token_logprobs: Tensor
    """(N,), 0 where the target was ignored."""
    lse: Tensor | None = None
    """(N,) log of the sum of exponentiated logits, differentiable; on request."""
    entropy: Tensor | None = None
    """(N,) entropy of the next-token distribution, of the order asked for, detached; on request."""


def linear_sequence_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    length_normalization: float = 0.0,
    ignore_index: int = -100,
    impl: str = "auto",
    scratch_bytes: int | None = None,
    skip_inactive: bool = True,
    return_lse: bool = False,
    return_entropy: bool = False,
    entropy_order: int = 1,
    group: ProcessGroup | None = None,
) -> SequenceLogProbs:
    """Log-probabilities of the targets under an LM head, without storing its logits.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature

    Differentiable in hidden, weight and bias, for any upstream gradient of the sums and of the
    token log-probabilities. Tokens whose upstream gradient is zero cost nothing in the backward.
    Same inputs give the same bits, on the CPU for one number of threads. Softmax statistics, sums
    and gradients accumulate in float32 (float64 for float64 inputs).

    Args:
        hidden: last hidden states of the tokens that predict the targets, (N, D); float64, float32,
            bfloat16 or float16. Under `torch.autocast` all three are cast to its dtype.
        weight: of the LM head, (V, D), same dtype and device.
        targets: (N,) int64 in [0, V), or `ignore_index`.
        cu_seqlens: (S + 1,) integers, on the device of the others or on the CPU; an empty sequence
            sums to 0.
        bias: (V,) or None.
        softcap: Gemma 2's `final_logit_softcapping`, or None.
        logit_scale: multiplies the logits (Cohere); for Granite, 1 / `logits_scaling`.
        temperature: divides the logits at last.
        length_normalization: alpha of sum / count ** alpha: 0 for sums, 1 for means.
        ignore_index: targets equal to it count for nothing. Their tokens cost nothing either, but
            for the Triton backend's forward, in tiles that they share with tokens that count (on
            an H100, with 16-bit hidden states of 2048 or more: all of them; many should be left out
            by the caller), and for its backward with `skip_inactive=False`.
        impl: "auto", or a backend by name ("triton", "torch"); a named one never falls back.
        scratch_bytes: bound on the memory beside inputs, results and gradients; by default
            64 MiB on the CPU, and on CUDA a 64th of the memory, up to 1 GiB. At least one row of
            logits is used. Not in it: where targets are ignored, a copy of the hidden states
            that count; for 16-bit weights a float32 gradient accumulator, which the Triton backend
            needs only for more tokens than half of the bound holds in float32.
        skip_inactive: leave tokens whose upstream gradient is zero out of the backward's
            products. Their number must be known for that, so the backward waits once for a GPU;
            with False the Triton backend never waits.
        return_lse: also return `lse`.
        return_entropy: also return `entropy`.
        entropy_order: of it: 1 for Shannon's, 2 for Renyi's of order 2 (collision entropy), -log of
            the sum of squared probabilities.
        group: None. `head_arguments` returns one for a head sharded by tensor parallelism, which
            `plad_fast.ops.vocab_parallel.vocab_parallel_sequence_logprobs` takes.

    Raises:
        UsageError: shapes, dtypes, devices, targets or options that do not fit; says which. Values
            of targets and cu_seqlens on a GPU are an assertion of the device there, which it
            reports when it comes to them.
    """
    check.refuse_group(group, "plad_fast.ops.vocab_parallel.vocab_parallel_sequence_logprobs")
    options = check.checked_options(
        softcap, logit_scale, temperature, ignore_index, impl, scratch_bytes
    )
    problem = check.checked_problem(hidden, weight, bias, targets, cu_seqlens, options)
    problem = problem.on_one_device()
    check_length_normalization(length_normalization)
    check_flag("skip_inactive", skip_inactive)
    check_flag("return_lse", return_lse)
    check_flag("return_entropy", return_entropy)
    if entropy_order not in (1, 2) or isinstance(entropy_order, bool):
        raise UsageError(f"entropy_order must be 1 or 2, got {shown(entropy_order)}")
    sums, counts, token_logprobs, lse, _, _, entropy = autograd.linear_sequence_logprobs(
        *problem.arguments,
        length_normalization,
        skip_inactive,
        entropy_order if return_entropy else 0,
    )
    return SequenceLogProbs(
        sums,
        counts,
        token_logprobs,
        lse=lse if return_lse else None,
        entropy=entropy if return_entropy else None,
    )


def sequence_logprobs(
    logits: Tensor,  # (N, V), or (S, T, V)
    targets: Tensor,  # (N,), or (S, T)
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    length_normalization: float = 0.0,
    ignore_index: int = -100,
    impl: str = "auto",
    scratch_bytes: int | None = None,
) -> SequenceLogProbs:
    """Log-probabilities of the targets under logits that exist already.

    Options as in `linear_sequence_logprobs`. Padded logits (S, T, V) need no `cu_seqlens`: each
    row of the batch is a sequence and padding has `ignore_index` as its target. Ignored rows get
    a zero gradient.

    Raises:
        UsageError: shapes, dtypes, devices, targets or options that do not fit; says which.
    """
    options = check.checked_options(
        softcap, logit_scale, temperature, ignore_index, impl, scratch_bytes
    )
    check_length_normalization(length_normalization)
    check.check_are_tensors(logits=logits)
    check.refuse_transforms(logits)
    check.check_logits(logits, targets, has_seqlens=cu_seqlens is not None)
    flat_targets = targets.reshape(-1)
    check.check_targets(flat_targets, targets.numel(), logits.device)
    if cu_seqlens is None:
        batch, length, _ = logits.shape
        cu_seqlens = torch.arange(batch + 1, device=logits.device) * length
    check.check_cu_seqlens(cu_seqlens, targets.numel(), logits.device)
    cu_seqlens = sent(cu_seqlens.long(), logits.device)
    token_logprobs, *_ = autograd.stored_token_logprobs(
        logits, targets.long(), cu_seqlens, *options
    )
    token_logprobs = token_logprobs.reshape(-1)
    counts = segment_counts(flat_targets != ignore_index, cu_seqlens)
    sums = segment_sums(token_logprobs, cu_seqlens)
    normalized = length_normalized(sums, counts, length_normalization)
    return SequenceLogProbs(normalized, counts, token_logprobs)
