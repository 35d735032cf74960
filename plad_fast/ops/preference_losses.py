"""The public preference losses: in one pass from hidden states, or on sequence log-probabilities.

N tokens, V vocabulary, D hidden, S sequences in B groups of K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from plad_fast.checks import check_group_size
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.ops import validation as check
from plad_fast.ops.preference_autograd import FusedLoss, linear_preference_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def preference_loss(
    sums: Tensor,  # (S,) or (B, K)
    counts: Tensor,  # same shape
    *,
    loss: str | Callable[..., Tensor] = "plad_ranking",
    group_size: int = 2,
    scores: Tensor | None = None,  # same shape
    reference_logps: Tensor | None = None,  # same shape, plain sums
    sft_weight: float | None = None,
    length_normalization: float | None = None,
    num_groups: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    **options: Any,
) -> Tensor:  # ()
    """A preference loss on sequence log-probabilities that exist already.

    `sft_weight` and `length_normalization` are the loss's own where they are None, as in
    `fused_linear_preference_loss`, `PLaDConfig` and the command line.
    Give it `sums` and `counts` of `linear_sequence_logprobs` (with its `length_normalization`
    left at 0: the loss applies it, to `reference_logps` too).
    It equals `fused_linear_preference_loss` in value and gradients, at the price of one more
    matrix product.

    Raises:
        UsageError: as in `Objective.bind`; tensors that do not fit; a number of sequences that
            `group_size` does not divide.
    """
    check.check_sums(sums, counts)
    check.check_constants(sums.shape, sums.device, scores=scores, reference_logps=reference_logps)
    check.check_denominators(num_groups=num_groups, num_tokens=num_tokens)
    check_group_size(group_size)
    if sums.ndim == 2 and sums.shape[1] != group_size:
        raise UsageError(f"sums have groups of {sums.shape[1]}, but group_size is {group_size}")
    check.check_groups(sums.numel(), group_size)
    objective = Objective.bind(
        loss,
        group_size=group_size,
        sft_weight=sft_weight,
        length_normalization=length_normalization,
        has_scores=scores is not None,
        has_reference=reference_logps is not None,
        device=sums.device,
        options=options,
    )
    sums, counts = sums.reshape(-1, group_size), counts.reshape(-1, group_size)
    scores, reference_logps = (
        None if tensor is None else tensor.reshape(sums.shape).to(sums.dtype)
        for tensor in (scores, reference_logps)
    )
    losses = objective.group_losses(sums, counts, scores, reference_logps)
    return objective.value(losses, sums, objective.denominators(counts, num_groups, num_tokens))


def fused_linear_preference_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    *,
    loss: str | Callable[..., Tensor] = "plad_ranking",
    group_size: int = 2,
    scores: Tensor | None = None,  # (S,)
    reference_logps: Tensor | None = None,  # (S,), plain sums
    sft_weight: float | None = None,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    length_normalization: float | None = None,
    ignore_index: int = -100,
    num_groups: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    impl: str = "auto",
    scratch_bytes: int | None = None,
    group: ProcessGroup | None = None,
    **loss_options: Any,
) -> FusedLoss:
    """A preference loss straight from hidden states, in three matrix products.

    loss = sum of group losses / num_groups + sft_weight * sum of NLL(y+) / num_tokens

    Value and gradients equal those of `preference_loss` on `linear_sequence_logprobs`. Gradients
    are made during the forward, while a chunk's logits still exist; a group whose gradient is
    zero (a satisfied hinge) costs its forward only. Without a tensor that requires a gradient no
    gradient is made.

    Args:
        hidden, weight, targets, cu_seqlens, bias, softcap, logit_scale, temperature,
            ignore_index, impl: as in `linear_sequence_logprobs`. The sequences of a group lie
            next to each other, best first: y+, y-, y+, y-, ... for pairs. With targets on a GPU and
            cu_seqlens on the CPU the Triton backend waits for the GPU only where a gradient may be
            exactly 0, once a chunk, and multiplies ignored tokens as zeros, in a copy of hidden
            that is not in the bound; with both on a GPU it waits once more, and leaves them out.
        scratch_bytes: bound on the memory beside inputs, results and gradients, as in
            `linear_sequence_logprobs`; the Triton backend takes by default room for 4,096 tokens,
            5 V max(D, 4096) bytes, or 1 GiB if that is more, and at most a 16th of the GPU's
            memory. Where a bfloat16 head would need a float32 accumulator beside it, all tokens
            may be one chunk in the memory of both instead. The budget must hold a group's logits
            for three products; a longer group takes four.
        loss: a registered name (`plad_fast.losses.available()`), or a function of `logps` (B, K)
            that returns (B,), each group on its own; it may ask for `scores`, `counts` and
            `reference_logps` (B, K) by naming them. It is evaluated on some groups at a time, and
            differentiated by `logps` only.
        group_size: K, sequences in a group.
        scores: (S,) quality of each sequence, higher is better, for losses that ask for it.
        reference_logps: (S,) log-probability of each sequence under a reference model, in nats,
            for losses that ask for it. Plain sums: length normalisation is applied to them too.
        sft_weight: lambda of the regulariser, the NLL per token of each group's first sequence;
            None for the loss's own, which is its paper's: 1 for PLaD's losses, SLiC, CPO and ORPO,
            0 for others and for functions of your own.
        length_normalization: alpha; the loss sees sum / count ** alpha. None for the loss's own: 1
            for PLaD's losses and those on means over tokens, 0 for others and your own functions.
        num_groups, num_tokens: denominators, by default those of this call. Under gradient
            accumulation pass the totals of the whole window.
        group: None. `head_arguments` returns one for a head sharded by tensor parallelism, which
            `plad_fast.ops.vocab_parallel.vocab_parallel_preference_loss` takes.
        **loss_options: of the loss, `beta` for example.

    Raises:
        UsageError: unknown loss or option, sequences that do not form whole groups, or anything
            `linear_sequence_logprobs` refuses.
    """
    check.refuse_group(group, "plad_fast.ops.vocab_parallel.vocab_parallel_preference_loss")
    op_options = check.checked_options(
        softcap, logit_scale, temperature, ignore_index, impl, scratch_bytes
    )
    problem = check.checked_problem(hidden, weight, bias, targets, cu_seqlens, op_options)
    num_sequences, device = len(cu_seqlens) - 1, problem.hidden.device
    constants = {"scores": scores, "reference_logps": reference_logps}
    check.check_constants((num_sequences,), device, **constants)
    check.check_are_detached(**constants)
    check.check_denominators(num_groups=num_groups, num_tokens=num_tokens)
    check.check_groups(num_sequences, group_size)
    objective = Objective.bind(
        loss,
        group_size=group_size,
        sft_weight=sft_weight,
        length_normalization=length_normalization,
        has_scores=scores is not None,
        has_reference=reference_logps is not None,
        device=device,
        options=loss_options,
    )
    return linear_preference_loss(
        problem, scores, reference_logps, objective, num_groups, num_tokens
    )
