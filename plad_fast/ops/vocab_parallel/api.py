"""The public ops for an LM head whose rows lie on the ranks of a process group.

Every rank calls with the same tokens and its own rows of the head; what one rank would compute
with all rows comes out on all of them. N tokens, V rows of this rank, D hidden, S sequences in B
groups of K, W ranks.

What goes over the group, n being the tokens that are not ignored:

| call | collectives | numbers each rank sends |
|---|---|---|
| either | 1 all-gather, to agree | 10 int64 |
| `vocab_parallel_sequence_logprobs` | 1 all-gather | 3 n |
| its backward | 1 all-reduce | n D |
| `vocab_parallel_preference_loss` | 1 all-reduce of the chunks' size | 1 int64 |
| | 1 all-gather a chunk of rows | 3 n in all |
| | 1 all-reduce, with gradients | n D |

They are float32, float64 for float64. Nothing of the size of N x V is sent. In the one-pass loss
the rows of a group too long for the scratch budget are computed, and sent, twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from plad_fast.checks import check_flag, check_length_normalization
from plad_fast.losses.objective import Objective
from plad_fast.losses.terms import length_normalized, segment_sums
from plad_fast.ops import validation as check
from plad_fast.ops.logprobs import SequenceLogProbs
from plad_fast.ops.preference_autograd import FusedLoss
from plad_fast.ops.registration import opaque
from plad_fast.ops.vocab_parallel.autograd import ShardedTokens, sharded_preference_loss
from plad_fast.ops.vocab_parallel.call import agreed_call
from plad_fast.ops.vocab_parallel.group import check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@opaque
def vocab_parallel_sequence_logprobs(
    hidden: Tensor,  # (N, D), the same on every rank
    weight: Tensor,  # (V, D), this rank's rows
    targets: Tensor,  # (N,), the same on every rank
    cu_seqlens: Tensor,  # (S + 1,), the same on every rank
    *,
    group: ProcessGroup,
    bias: Tensor | None = None,  # (V,), this rank's rows
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    length_normalization: float = 0.0,
    ignore_index: int = -100,
    impl: str = "auto",
    scratch_bytes: int | None = None,
    return_lse: bool = False,
) -> SequenceLogProbs:
    """`linear_sequence_logprobs` of a head whose rows lie on the ranks of a process group.

    Values and gradients equal those of the whole head on one device, for any upstream gradient
    that is the same on every rank. The gradients of weight and bias are those of this rank's
    rows. Same inputs on the same number of ranks (and of threads, on the CPU) give the same bits,
    and all ranks the same results. It works with the torch backend's products on every device, and
    is left out of compiled graphs (a graph break).

    Args:
        hidden, targets, cu_seqlens: as in `linear_sequence_logprobs`; targets index the whole
            vocabulary. Under dropout the ranks must draw alike: hidden states are not compared.
        weight, bias: rows of the ranks follow one another in the order of their ranks in the
            group. Their number may differ, and be 0.
        group: of the ranks that hold the vocabulary. Each of them must make this call, and run
            the backward.
        impl: "auto" or "torch".
        scratch_bytes: as in `linear_sequence_logprobs`, of this rank. Not in it: a float32 gradient
            of 16-bit hidden states.
        softcap, logit_scale, temperature, length_normalization, ignore_index, return_lse: as in
            `linear_sequence_logprobs`.

    Raises:
        UsageError: on every rank: arguments that do not fit on one of them, or are not alike where
            they must be (numbers of tokens, targets, offsets, options); says which.
    """
    check_group(group)

    def check_rest() -> None:
        check_length_normalization(length_normalization)
        check_flag("return_lse", return_lse)

    call = agreed_call(
        "vocab_parallel_sequence_logprobs",
        (hidden, weight, bias, targets, cu_seqlens),
        (softcap, logit_scale, temperature, ignore_index, impl, scratch_bytes),
        group,
        check_rest,
        (length_normalization,),
        {},
    )
    kept = ShardedTokens.apply(*call.problem.head, call.problem.targets, call.sharded)
    token_logprobs, lse = (call.spread(values) for values in kept)
    sums = length_normalized(
        segment_sums(token_logprobs, call.all_offsets), call.counts, length_normalization
    )
    return SequenceLogProbs(sums, call.counts, token_logprobs, lse=lse if return_lse else None)


@opaque
def vocab_parallel_preference_loss(
    hidden: Tensor,  # (N, D), the same on every rank
    weight: Tensor,  # (V, D), this rank's rows
    targets: Tensor,  # (N,), the same on every rank
    cu_seqlens: Tensor,  # (S + 1,), the same on every rank
    *,
    group: ProcessGroup,
    loss: str | Callable[..., Tensor] = "plad_ranking",
    group_size: int = 2,
    scores: Tensor | None = None,  # (S,)
    reference_logps: Tensor | None = None,  # (S,), plain sums
    sft_weight: float | None = None,
    bias: Tensor | None = None,  # (V,), this rank's rows
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    length_normalization: float | None = None,
    ignore_index: int = -100,
    num_groups: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    impl: str = "auto",
    scratch_bytes: int | None = None,
    **loss_options: Any,
) -> FusedLoss:
    """`fused_linear_preference_loss` of a head whose rows lie on the ranks of a process group.

    One pass: three matrix products of this rank's rows, and a small collective for every chunk of
    them, before its gradients can be made. The ranks settle on a size of the chunks that fits all
    of their budgets. A loss function must give the same on every rank: the ranks compare its name,
    the arguments of a `functools.partial`, and the options.

    Args:
        group, impl, scratch_bytes: as in `vocab_parallel_sequence_logprobs`, and what must be the
            same on every rank as well.
        others: as in `fused_linear_preference_loss`.

    Raises:
        UsageError: on every rank, as in `vocab_parallel_sequence_logprobs`; an unknown loss or
            option, sequences that do not form whole groups.
    """
    check_group(group)
    constants = {"scores": scores, "reference_logps": reference_logps}
    denominators = {"num_groups": num_groups, "num_tokens": num_tokens}

    def bind() -> Objective:
        num_sequences = len(cu_seqlens) - 1
        check.check_constants((num_sequences,), hidden.device, **constants)
        check.check_are_detached(**constants)
        check.check_denominators(**denominators)
        check.check_groups(num_sequences, group_size)
        return Objective.bind(
            loss,
            group_size=group_size,
            sft_weight=sft_weight,
            length_normalization=length_normalization,
            has_scores=scores is not None,
            has_reference=reference_logps is not None,
            device=hidden.device,
            options=loss_options,
        )

    call = agreed_call(
        "vocab_parallel_preference_loss",
        (hidden, weight, bias, targets, cu_seqlens),
        (softcap, logit_scale, temperature, ignore_index, impl, scratch_bytes),
        group,
        bind,
        (length_normalization, group_size, sft_weight, loss, loss_options),
        {**constants, **denominators},
    )
    objective: Objective = call.checked
    return sharded_preference_loss(
        call.problem,
        scores,
        reference_logps,
        objective,
        objective.denominators(call.counts.reshape(-1, group_size), num_groups, num_tokens),
        call.sharded,
    )
