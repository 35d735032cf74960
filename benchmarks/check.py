"""The oracle of the loss benchmark: float64 autograd, and the comparison with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import BETA, PairBatch

# Largest relative error of the loss and of gradient norms. The inputs of the oracle are rounded to
# the dtype first, so this is the error of the arithmetic alone; bfloat16 is sized for methods that
# round logits to it, as most do.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SAMPLED_ROWS = 128  # of d_weight, both of the rows that are targets and of those that are not


@dataclass(frozen=True)
class Oracle:
    loss: float
    cross_entropy: float  # mean over all tokens
    active: int  # pairs inside the hinge
    margin: float  # nats between the hinge and the pair nearest to it
    d_hidden: Tensor  # (N, D) float64
    target_rows: Tensor  # (R,) rows of the weight that some token has as its target
    other_rows: Tensor  # (R,) rows that no token has
    d_target_rows: Tensor  # (R, D) float64
    d_other_rows: Tensor  # (R, D) float64
    d_weight_norm: float

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Oracle:
        return cls(**torch.load(path, map_location="cpu"))


def compute_oracle(batch: PairBatch) -> Oracle:
    """Plain autograd in float64, pair by pair to bound its memory."""
    weight = batch.weight.detach().double().requires_grad_()
    vocab = weight.shape[0]
    d_hidden = torch.zeros_like(batch.hidden, dtype=torch.float64)
    loss, total_nll, gaps = 0.0, 0.0, []
    ends = batch.cu_seqlens.tolist()
    for start, middle, end in zip(ends[0::2], ends[1::2], ends[2::2], strict=False):
        hidden = batch.hidden[start:end].detach().double().requires_grad_()
        logprobs = (hidden @ weight.T).log_softmax(-1)
        picked = logprobs.gather(1, batch.targets[start:end, None]).squeeze(1)
        gap = BETA - picked[: middle - start].sum() + picked[middle - start :].sum()
        gaps.append(gap.item())
        total_nll -= picked.sum().item()
        if gaps[-1] > 0:
            pair_loss = gap / batch.num_pairs
            pair_loss.backward()
            loss += pair_loss.item()
            assert hidden.grad is not None
            d_hidden[start:end] = hidden.grad
    d_weight = torch.zeros_like(weight) if weight.grad is None else weight.grad
    is_target = torch.zeros(vocab, dtype=torch.bool, device=weight.device)
    is_target[batch.targets] = True
    target_rows, other_rows = _some(is_target), _some(~is_target)
    return Oracle(
        loss=loss,
        cross_entropy=total_nll / len(batch.targets),
        active=sum(gap > 0 for gap in gaps),
        margin=min(map(abs, gaps)),
        d_hidden=d_hidden.cpu(),
        target_rows=target_rows.cpu(),
        other_rows=other_rows.cpu(),
        d_target_rows=d_weight[target_rows].detach().cpu(),
        d_other_rows=d_weight[other_rows].detach().cpu(),
        d_weight_norm=d_weight.norm().item(),
    )


def errors_of(loss: Tensor, d_hidden: Tensor, d_weight: Tensor, oracle: Oracle) -> dict[str, float]:
    """Relative errors of the loss, of d_hidden, and of d_weight by sampled rows and total norm."""
    norm = torch.tensor(oracle.d_weight_norm, dtype=torch.float64)
    total = torch.linalg.vector_norm(d_weight, dtype=torch.float64).cpu()
    return {
        "loss_error": _relative(loss.cpu(), torch.tensor(oracle.loss, dtype=torch.float64)),
        "d_hidden_error": _relative(d_hidden.cpu(), oracle.d_hidden),
        "d_weight_error": max(
            _relative(d_weight[oracle.target_rows].cpu(), oracle.d_target_rows),
            _relative(d_weight[oracle.other_rows].cpu(), oracle.d_other_rows),
            _relative(total, norm),
        ),
    }


def cross_entropy_error(loss: Tensor, oracle: Oracle) -> dict[str, float]:
    """Relative error of the loss of those that compute the mean cross-entropy."""
    truth = torch.tensor(oracle.cross_entropy, dtype=torch.float64)
    return {"loss_error": _relative(loss.cpu(), truth)}


def mismatch(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """What is beyond the tolerance, or None. NaN is."""
    limit = TOLERANCE[dtype]
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= limit]
    return f"{', '.join(wrong)} (limit {limit:.0e})" if wrong else None


def _some(mask: Tensor) -> Tensor:
    rows = mask.nonzero().squeeze(1)
    return rows[:: max(1, len(rows) // SAMPLED_ROWS)][:SAMPLED_ROWS]


def _relative(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over that of the truth; any difference from zeros is infinite."""
    difference = torch.linalg.vector_norm(value.double() - truth).item()
    if difference == 0:
        return 0.0
    scale = torch.linalg.vector_norm(truth).item()
    return difference / scale if scale else float("inf")
