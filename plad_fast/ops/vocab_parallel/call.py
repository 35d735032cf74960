"""A call of a vocabulary-parallel op that all ranks agree about, or refuse together.

N tokens, of which n count, V rows of this rank, D hidden, S sequences.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from plad_fast.errors import UsageError
from plad_fast.losses.terms import segment_counts
from plad_fast.ops import validation as check
from plad_fast.ops.backend import HeadOptions, LinearProblem
from plad_fast.ops.preference_autograd import wanted
from plad_fast.ops.vocab_parallel.autograd import ShardedHead
from plad_fast.ops.vocab_parallel.group import agreed_shards, digest, digest_of, digest_of_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("plad_fast")


class Call(NamedTuple):
    """A call that all ranks agree about."""

    problem: LinearProblem  # of the hidden states and targets, those that count
    sharded: ShardedHead
    counts: Tensor  # (S,)
    all_offsets: Tensor  # (S + 1,) of all N tokens
    rows: Tensor | None  # (n,) which of the N tokens count; None for all
    num_tokens: int
    checked: Any
    """What the check of the op's own arguments returned."""

    def spread(self, values: Tensor) -> Tensor:  # (n,) -> (N,)
        """0 where the target is ignored."""
        if self.rows is None:
            return values
        return values.new_zeros(self.num_tokens).index_copy(0, self.rows, values)


def agreed_call(
    op: str,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],  # as in `LinearProblem`
    head_options: tuple[Any, ...],  # as in `HeadOptions`, not checked
    group: ProcessGroup,
    check_rest: Callable[[], Any],
    compared: tuple[Any, ...],
    constants: Mapping[str, float | Tensor | None] = {},
) -> Call:
    """Check this rank's arguments, compare them with the others', and drop what does not count.

    A rank that finds something wrong with its own tells the others before it raises, so that
    they do not wait for it.

    Args:
        check_rest: raises where the op's own arguments do not fit.
        compared: further options that must be the same on every rank.
        constants: of the sequences and of the loss, which must be the same as well.
    """
    facts: dict[str, int | Tensor] = {}
    refusal: Exception | None = None
    try:
        _check_are_local(*tensors[:3])
        options = _checked_options(head_options)
        problem = check.checked_problem(*tensors, options, may_lack_rows=True).on_one_device()
        checked = check_rest()
        facts = _facts(op, problem, compared, constants)
    except Exception as error:  # whatever it is, the others must not wait
        refusal = error
    devices = [tensor.device for tensor in tensors if isinstance(tensor, Tensor)]
    own_rows = 0 if refusal is not None else len(problem.weight)
    shards = agreed_shards(group, devices, own_rows, facts, refusal)
    hidden, weight, bias, targets, cu_seqlens, _ = problem
    check.check_sequences(targets, cu_seqlens, shards.vocab, options.ignore_index)
    keep = targets != options.ignore_index
    counts = segment_counts(keep, cu_seqlens)
    rows, num_tokens = keep.nonzero().squeeze(1), len(hidden)
    if len(rows) < num_tokens:
        hidden, targets = hidden.index_select(0, rows), targets[rows]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Call(
        LinearProblem(hidden, weight, bias, targets, offsets, options),
        ShardedHead(shards, options),
        counts,
        cu_seqlens,
        rows if len(rows) < num_tokens else None,
        num_tokens,
        checked,
    )


def _facts(
    op: str,
    problem: LinearProblem,
    compared: tuple[Any, ...],
    constants: Mapping[str, float | Tensor | None],
) -> dict[str, int | Tensor]:
    """What the ranks compare: each a number, by the name of what differs if it does."""
    hidden, (softcap, logit_scale, temperature, ignore_index, *_) = problem.hidden, problem.options
    # Which of a rank's gradients are wanted says which collectives it takes part in.
    needs = wanted(problem.head)
    gradients = needs[0], any(needs)
    options = (*compared, softcap, logit_scale, temperature, ignore_index)

    def of_constants(first: str, second: str) -> int | Tensor:
        return digest(_as_tensor(constants.get(first))) + 3 * digest(
            _as_tensor(constants.get(second))
        )

    return {
        "the ops called": digest_of(op),
        "numbers of tokens": len(hidden),
        "dtypes, hidden sizes or gradients": digest_of(
            hidden.shape[1], hidden.dtype, problem.bias is None, *gradients
        ),
        "options": digest_of_options(options, hidden.device),
        "targets": digest(problem.targets),
        "cu_seqlens": digest(problem.cu_seqlens),
        "scores or reference_logps": of_constants("scores", "reference_logps"),
        "num_groups or num_tokens": of_constants("num_groups", "num_tokens"),
    }


def _as_tensor(value: float | Tensor | None) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.tensor([float(value)], dtype=torch.float64)


def _check_are_local(*head: Tensor | None) -> None:
    """A rank's rows are a plain tensor."""
    for name, tensor in zip(("hidden", "weight", "bias"), head, strict=True):
        if hasattr(tensor, "device_mesh"):
            raise UsageError(
                f"{name} must be a plain tensor, got a DTensor: pass {name}.to_local(), or let "
                "plad_fast.models.head.causal_lm_logprobs take the head of a model"
            )


def _checked_options(head_options: tuple[Any, ...]) -> HeadOptions:
    options = check.checked_options(*head_options)
    if options.impl == "triton":
        raise UsageError(
            "impl='triton' has no vocabulary-parallel ops; pass impl='torch', which uses the "
            "library's products on every device"
        )
    if options.impl not in ("auto", "torch"):
        raise UsageError(
            f"unknown impl {options.impl!r}; vocabulary-parallel ops have: auto, torch"
        )
    if options.impl == "auto":
        _announce()
    return options


@functools.cache
def _announce() -> None:
    logger.info("impl='auto' for a vocabulary-parallel op: using the torch backend")
