"""Scratch memory for bfloat16 on a CPU that multiplies it: exponentials of 16 bits, not logits.

A block of logits that fits the cache is made, summed and turned into exponentials before the next
one is. What stays of a logit are 16 bits: exp(z - r), and at the target minus the sum of the row's
others. The gradient of the logits is that times one number a row, g / sum of exp, which is applied
to d_hidden and, for d_weight, to a copy of the hidden states. r is the largest logit of the row's
first block. It need not be the largest of all, as bfloat16 has the exponents of float32: a block
that exceeds it by far raises it.

n rows of a chunk, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plad_fast.ops.backend import Head, HeadOptions, Needs
from plad_fast.ops.impl.products import CpuBfloat16Products, Operand, products_for
from plad_fast.ops.impl.softmax_rows import SoftmaxStatistics, logits_
from plad_fast.ops.impl.workspace import BLOCK_SHARE, TokenStatistics, Workspace, moves

_MOST_ROWS = 1024  # of a block; with more of them its columns are too few for a fast product
_MOST_ENTRIES = 2**19  # of a block, which a cache of 2 MiB holds
_BYTES_PER_ENTRY = 14  # a logit, its half, the slope of a cap, a half that is being widened
_LARGEST_SUM = 2.0**57  # e^40


def workspace_for(
    head: Head, options: HeadOptions, num_rows: int, *, for_gradient: bool, needs: Needs
) -> Workspace:
    """The torch backend's workspace for a head; `needs` as in `ExponentialWorkspace`."""
    of_bias = for_gradient and needs[2]
    if isinstance(products_for(head[1][:0], 0), CpuBfloat16Products) and not of_bias:
        return ExponentialWorkspace(head, options, num_rows, for_gradient=for_gradient, needs=needs)
    return Workspace(head, options, num_rows, for_gradient=for_gradient)


class ExponentialWorkspace(Workspace):
    """A workspace for neither entropies nor gradients of lse or bias.

    Where the budget and the accumulator of the weight's gradient together hold all rows, these are
    one chunk: the gradient is a single product, and needs no accumulator.

    Args:
        needs: which gradients are wanted.
        others: as in `Workspace`.
    """

    products: CpuBfloat16Products

    def __init__(
        self, head: Head, options: HeadOptions, num_rows: int, *, for_gradient: bool, needs: Needs
    ) -> None:
        hidden, weight, self.bias = head
        self.options = options
        scratch_bytes = options.scratch_on(hidden.device)
        block_bytes = 2 * scratch_bytes // BLOCK_SHARE
        products = products_for(weight, block_bytes)
        assert isinstance(products, CpuBfloat16Products)
        self.products = products
        vocab, width = weight.shape
        # Beside its exponentials a row has copies of its hidden state, and its gradient.
        bytes_per_row = max(1, weight.dtype.itemsize * (vocab + 4 * width))
        room = scratch_bytes - block_bytes
        if for_gradient and needs[1]:
            accumulator_bytes = vocab * width * products.dtype.itemsize
            if num_rows * bytes_per_row <= room + accumulator_bytes:
                room += accumulator_bytes
                self.grad_weight_dtype = weight.dtype
        self.rows = max(1, min(room // bytes_per_row, num_rows))
        self.block_rows = max(1, block_bytes // max(weight.dtype.itemsize * vocab, 1))
        self._entries = min(_MOST_ENTRIES, max(1, block_bytes // _BYTES_PER_ENTRY))
        self._slope = None
        self._buffer = weight.new_empty(self.rows if for_gradient else 0, vocab)

    def forward(self, hidden: Tensor, targets: Tensor, entropy_order: int = 0) -> SoftmaxStatistics:
        """Statistics of n <= rows tokens, with r for the largest logit."""
        assert not entropy_order
        count = max(1, -(-len(hidden) // min(_MOST_ROWS, self._entries)))
        parts = [
            self._block_of_rows(*part)
            for part in zip(
                hidden.tensor_split(count),
                targets.tensor_split(count),
                self._buffer[: len(hidden)].tensor_split(count),
                strict=True,
            )
        ]
        reference, sum_exp, token_logprobs, miss = map(torch.cat, zip(*parts, strict=True))
        return SoftmaxStatistics(reference, sum_exp, token_logprobs, miss, None)

    def gradient(
        self,
        targets: Tensor,
        statistics: TokenStatistics,
        grad_logprobs: Tensor,
        grad_lse: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Operand:
        assert isinstance(statistics, SoftmaxStatistics)
        assert grad_lse is None
        of_rows = (grad_logprobs, -self.options.slope / statistics.sum_exp)
        if order is not None:
            for source, place in torch.stack(moves(order), dim=1).tolist():
                self._buffer[place] = self._buffer[source]
            of_rows = (of_rows[0][order], of_rows[1][order])
        return Operand(self._buffer[: len(of_rows[0])], of_rows=of_rows)

    def _block_of_rows(
        self,
        hidden: Tensor,  # (n, D)
        targets: Tensor,  # (n,)
        out: Tensor,  # (n, V), or (0, V) where no gradient will be asked for
    ) -> tuple[Tensor, ...]:
        """Of each row r, the sum of exp(z - r), the log-probability of the target, and 1 - p."""
        rows, vocab = len(hidden), len(self.products.weight)
        step = max(1, min(vocab, self._entries // max(rows, 1)))
        block = hidden.new_empty(rows * step, dtype=self.products.dtype)
        by_target = targets.argsort(stable=True)
        edges = torch.arange(0, vocab + step, step, device=targets.device)
        ends = torch.searchsorted(targets[by_target], edges).tolist()
        reference = block.new_empty(rows, 1)
        rest = block.new_zeros(rows)
        centred = block.new_zeros(rows)
        slope_at_target = block.new_ones(rows)
        for i, start in enumerate(range(0, vocab, step)):
            columns = slice(start, min(start + step, vocab))
            here = by_target[ends[i] : ends[i + 1]]
            at_target = here, targets[here] - start
            logits = block[: rows * (columns.stop - start)].view(rows, columns.stop - start)
            for careful in (False, True):
                self.products.logits_of(hidden, columns, out=logits, may_be_infinite=careful)
                slope = None if self.options.softcap is None else torch.empty_like(logits)
                bias = None if self.bias is None else self.bias[columns]
                logits_(logits, self.options, bias, slope)
                if careful or not start:
                    raised = logits.amax(dim=1, keepdim=True)
                    raised.clamp_(min=torch.finfo(raised.dtype).min)  # a first block of -inf
                    if start:
                        raised = torch.maximum(raised, reference)
                        shrink = (reference - raised).exp_()
                        rest.mul_(shrink.squeeze(1))
                        centred.add_((reference - raised).squeeze(1))
                        if len(out):
                            for done in out[:, :start].split(step, dim=1):
                                done.copy_(done * shrink)
                    reference = raised
                logits.sub_(reference)
                centred[here] = logits[at_target]
                logits[at_target] = -torch.inf
                sums = logits.exp_().sum(dim=1)
                largest = sums.index_add(0, here, centred[here].exp())
                if (largest <= _LARGEST_SUM).all():
                    break
            rest += sums
            if slope is not None:
                logits.mul_(slope)
                slope_at_target[here] = slope[at_target]
            if len(out):
                out[:, columns].copy_(logits)
        if len(out):
            every = torch.arange(rows, device=targets.device)
            out[every, targets] = (rest * -slope_at_target).to(out.dtype)
        sum_exp = rest + centred.exp()
        # Where the target is as likely as r, rest is all that its probability lacks.
        likely = (rest * (-centred).exp()).log1p_().neg_()
        token_logprobs = torch.where(centred >= 0, likely, centred - sum_exp.log())
        return reference.squeeze(1), sum_exp, token_logprobs, rest / sum_exp
