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

from plad_fast.checks import check_flag
from plad_fast.errors import UsageError
from plad_fast.losses.terms import segment_counts
from plad_fast.ops import validation as check
from plad_fast.ops.backend import default_scratch_bytes
from plad_fast.ops.first_order import refuse_transforms
from plad_fast.ops.logit_spec import LogitSpec
from plad_fast.ops.logprobs import autocast_head, checked_ignore_index, checked_scratch
from plad_fast.ops.vocab_parallel.autograd import ShardedHead
from plad_fast.ops.vocab_parallel.group import agreed_shards, digest, digest_of, digest_of_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("plad_fast")


class Inputs(NamedTuple):
    """The caller's tensors."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    cu_seqlens: Tensor


class Call(NamedTuple):
    """A call that all ranks agree about; hidden and targets are those that count."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (V, D) without padding
    bias: Tensor | None  # (V,)
    targets: Tensor  # (n,)
    head: ShardedHead
    checked: Any
    counts: Tensor  # (S,)
    all_offsets: Tensor  # (S + 1,) of all N tokens
    rows: Tensor | None  # (n,) which of the N tokens count; None for all
    num_tokens: int

    def spread(self, values: Tensor) -> Tensor:  # (n,) -> (N,)
        """0 where the target is ignored."""
        if self.rows is None or len(values) != len(self.rows):
            return values
        return values.new_zeros(self.num_tokens).index_copy(0, self.rows, values)


def agreed_call(
    op: str,
    inputs: Inputs,
    group: ProcessGroup,
    checked: Callable[[], Any],
    options: tuple[Any, ...],
    constants: Mapping[str, float | Tensor | None],
    *,
    vocab_size: int | None,
    reduce_hidden_grad: bool,
    ignore_index: int,
    impl: str,
    scratch_bytes: int | None,
) -> Call:
    """Check this rank's arguments, compare them with the others', and drop what does not count.

    A rank that finds something wrong with its own tells the others before it raises, so that
    they do not wait for it.
    """
    hidden, weight, bias, targets, cu_seqlens = inputs
    facts: dict[str, int | Tensor] = {}
    refusal: Exception | None = None
    result, scratch = None, 0
    try:
        check.check_are_tensors(hidden=hidden, weight=weight, bias=bias)
        _check_are_local(hidden=hidden, weight=weight, bias=bias)
        refuse_transforms(hidden, weight, bias)
        hidden, weight, bias = autocast_head(hidden, weight, bias)
        check.check_head(hidden, _not_empty(weight), None if bias is None else _not_empty(bias))
        check.check_targets(targets, len(hidden), hidden.device)
        check.check_cu_seqlens(cu_seqlens, hidden.device)
        check_flag("reduce_hidden_grad", reduce_hidden_grad)
        checked_ignore_index(ignore_index)
        _check_impl(impl)
        _check_vocab_size(vocab_size)
        scratch = checked_scratch(scratch_bytes) or default_scratch_bytes(hidden.device)
        result = checked()
        # Which of a rank's gradients are wanted says which collectives it takes part in.
        enabled = torch.is_grad_enabled()
        of_hidden = enabled and hidden.requires_grad
        of_any = enabled and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        gradients = of_hidden, of_any, reduce_hidden_grad
        facts = {
            "the ops called": digest_of(op),
            "numbers of tokens": len(hidden),
            "dtypes, hidden sizes or gradients": digest_of(
                hidden.shape[1], hidden.dtype, bias is None, *gradients
            ),
            "options": digest_of_options((*options, vocab_size), hidden.device),
            "targets": digest(targets),
            "cu_seqlens": digest(cu_seqlens),
            "scores or reference_logps": digest(_as_tensor(constants.get("scores")))
            + 3 * digest(_as_tensor(constants.get("reference_logps"))),
            "num_groups or num_tokens": digest(_as_tensor(constants.get("num_groups")))
            + 3 * digest(_as_tensor(constants.get("num_tokens"))),
        }
    except Exception as error:  # whatever it is, the others must not wait
        refusal = error
    devices = [tensor.device for tensor in inputs if isinstance(tensor, Tensor)]
    own_rows = len(weight) if refusal is None else 0
    shards = agreed_shards(group, devices, own_rows, facts, refusal).cut(vocab_size)
    spec = result[0] if isinstance(result, tuple) else result
    assert isinstance(spec, LogitSpec)
    targets, cu_seqlens = targets.long(), cu_seqlens.long()
    check.check_sequences(targets, cu_seqlens, shards.vocab, ignore_index)
    if shards.rows < len(weight):
        weight, bias = weight[: shards.rows], None if bias is None else bias[: shards.rows]
    keep = targets != ignore_index
    counts = segment_counts(keep, cu_seqlens)
    rows, num_tokens = keep.nonzero().squeeze(1), len(hidden)
    if len(rows) < num_tokens:
        hidden, targets = hidden.index_select(0, rows), targets[rows]
    return Call(
        hidden,
        weight,
        bias,
        targets,
        ShardedHead(shards, spec, scratch, reduce_hidden_grad),
        result,
        counts,
        cu_seqlens,
        rows if len(rows) < num_tokens else None,
        num_tokens,
    )


def _not_empty(tensor: Tensor) -> Tensor:
    """With a row, since a rank may have none."""
    return tensor if tensor.ndim == 0 or len(tensor) else tensor.new_empty(1, *tensor.shape[1:])


def _check_are_local(**tensors: Tensor | None) -> None:
    """A rank's rows are a plain tensor."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "device_mesh"):
            raise UsageError(
                f"{name} must be a plain tensor, got a DTensor: pass {name}.to_local(), or let "
                "plad_fast.models.head.causal_lm_logprobs take the head of a model"
            )


def _check_vocab_size(vocab_size: int | None) -> None:
    if vocab_size is not None and (not check.is_whole(vocab_size) or vocab_size < 1):
        raise UsageError(
            f"vocab_size must be None or a whole number of at least 1, got {vocab_size!r}"
        )


def _as_tensor(value: float | Tensor | None) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.tensor([float(value)], dtype=torch.float64)


def _check_impl(impl: str) -> None:
    check.check_impl(impl)
    if impl == "triton":
        raise UsageError(
            "impl='triton' has no vocabulary-parallel ops; pass impl='torch', which uses the "
            "library's products on every device"
        )
    if impl not in ("auto", "torch"):
        raise UsageError(f"unknown impl {impl!r}; vocabulary-parallel ops have: auto, torch")
    if impl == "auto":
        _announce()


@functools.cache
def _announce() -> None:
    logger.info("impl='auto' for a vocabulary-parallel op: using the torch backend")
