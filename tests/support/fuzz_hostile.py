"""Values that each argument of the public calls must refuse, by the argument's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Spoilt(NamedTuple):
    """A value made of the valid arguments."""

    of: Callable[[dict[str, Any]], Any]


def _of(name: str, change: Callable[[Tensor], Any]) -> Spoilt:
    return Spoilt(lambda arguments: change(_plain(arguments[name])))


def _plain(tensor: Any) -> Tensor:
    """The argument, or where a second fault has taken its place, some tensor."""
    return tensor.detach() if isinstance(tensor, Tensor) and tensor.ndim else torch.ones(2, 2)


_NO_TENSOR = [None, 3, "hidden", [[1.0]], np.ones((2, 2))]
_NO_NUMBER = ["1", [1.0], 1j, math.nan, torch.tensor(1.0)]
_NO_POSITIVE = [0, 0.0, -1, -0.5, math.inf]


def _matrix(name: str) -> list[Any]:
    """Faults of a floating tensor of two dimensions."""
    kinds = [torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e5m2]
    return [
        *_NO_TENSOR,
        *(_of(name, lambda x, kind=kind: x.to(kind)) for kind in kinds),  # type: ignore[misc]
        _of(name, lambda x: x[0]),
        _of(name, lambda x: x[None]),
        _of(name, lambda x: x.sum()),
        _of(name, lambda x: x.to("meta")),
        _of(name, lambda x: x.float().to_sparse()),
        _of(name, lambda x: x[:, :-1] if x.ndim == 2 else x[:1]),
        _of(name, lambda x: x.repeat(1, 2)),
    ]


_TARGETS = [
    *_NO_TENSOR,
    *(
        _of("targets", lambda x, kind=kind: (x % 2).abs().to(kind))  # type: ignore[misc]
        for kind in (torch.float32, torch.bool, torch.uint8, torch.int16, torch.complex64)
    ),
    _of("targets", lambda x: x[:-1]),
    _of("targets", lambda x: torch.cat([x, x])),
    _of("targets", lambda x: x[:, None]),
    _of("targets", lambda x: x.sum()),
    _of("targets", lambda x: x.to("meta")),
    *(
        _of("targets", lambda x, bad=bad: torch.cat([x[:-1].long(), torch.tensor([bad])]))  # type: ignore[misc]
        for bad in (10**6, -3, -(2**62), 2**63 - 1)
    ),
]
_BOUNDS = [
    *_NO_TENSOR[1:],
    *(
        _of("cu_seqlens", lambda x, kind=kind: x.to(kind))  # type: ignore[misc]
        for kind in (torch.float32, torch.bool, torch.uint8, torch.int16)
    ),
    _of("cu_seqlens", lambda x: x[:0]),
    _of("cu_seqlens", lambda x: x[None]),
    _of("cu_seqlens", lambda x: x.sum()),
    _of("cu_seqlens", lambda x: x.to("meta")),
    _of("cu_seqlens", lambda x: x + 1),
    _of("cu_seqlens", lambda x: x - 1),
    _of("cu_seqlens", lambda x: torch.cat([x[:-1], x[-1:] + 1])),
    _of("cu_seqlens", lambda x: torch.cat([x[:1], x[-1:] + 3, x[2:]])),
    _of("cu_seqlens", lambda x: torch.cat([x[:1], -x[1:2], x[2:]])),
    _of("cu_seqlens", lambda x: x.flip(0)),
]
_OPTIONS: dict[str, list[Any]] = {
    "softcap": [*_NO_NUMBER, *_NO_POSITIVE, True],
    "temperature": [*_NO_NUMBER, *_NO_POSITIVE, None, True],
    "logit_scale": [*_NO_NUMBER, math.inf, -math.inf, None],
    "length_normalization": [*_NO_NUMBER, -1, -0.1, math.inf, None],
    "ignore_index": [*_NO_NUMBER, 1.5, None, 2**63, -(2**70), True],
    "impl": ["cuda", "", None, 3, ["torch"], "Torch"],
    "scratch_bytes": [*_NO_NUMBER, 0, -5, 64.0, 2**63, True],
}
_BIAS = [
    *_NO_TENSOR[1:],
    _of("weight", lambda x: x),
    _of("weight", lambda x: x.sum()),
    _of("weight", lambda x: torch.cat([x.flatten()[:1].expand(len(x)), x.flatten()[:1]])),
    _of("weight", lambda x: torch.ones(len(x), dtype=torch.int64)),
    _of("weight", lambda x: torch.ones(len(x), dtype=x.dtype, device="meta")),
    _of("weight", lambda x: torch.ones(len(x), dtype=torch.complex64)),
]
_LINEAR = {
    "hidden": _matrix("hidden"),
    "weight": [*_matrix("weight"), _of("weight", lambda x: x[:0])],
    "bias": _BIAS,
    "targets": _TARGETS,
    "cu_seqlens": [None, *_BOUNDS],
    **_OPTIONS,
}


def _constants(name: str, like: str) -> list[Any]:
    def count(x: Tensor) -> int:
        return len(x) - (like == "cu_seqlens")

    return [
        *_NO_TENSOR[1:],
        _of(like, lambda x: torch.ones(count(x) + 1)),
        _of(like, lambda x: torch.ones(count(x), 1)),
        _of(like, lambda x: torch.ones(count(x), dtype=torch.complex64)),
        _of(like, lambda x: torch.ones(count(x), device="meta")),
        _of(like, lambda x: torch.ones(count(x), requires_grad=True)),
    ]


def _mean_of_all(logps: Tensor) -> Tensor:
    return logps[:, 0] - logps.mean()


_LOSSES = [
    None, 5, "", "plad", ["plad_ranking"], {},
    lambda logps: logps,
    lambda logps: logps.sum(),
    lambda logps: None,
    lambda logps: 1 / 0,
    lambda logps, needed: logps[:, 0],
    lambda logps, weight=1: logps[:, 0],
    _mean_of_all,
]  # fmt: skip
_NO_COUNT = [
    *_NO_NUMBER[:4], -1, math.inf,
    torch.ones(2), torch.tensor(1j), torch.tensor(-2), torch.tensor(math.nan),
]  # fmt: skip
_PREFERENCE = {
    "loss": _LOSSES,
    "group_size": [*_NO_NUMBER, None, 0, -2, 2.0, 10**6 + 1],
    "sft_weight": [*_NO_NUMBER, -0.1, math.inf],
    "num_groups": _NO_COUNT,
    "num_tokens": _NO_COUNT,
    "length_normalization": _OPTIONS["length_normalization"][:-1],  # None is the loss's own,
    "beta": ["1", [1.0], 1j, math.nan, -1, None, math.inf],
    "gama": [1.0],
}  # fmt: skip
HOSTILE: dict[str, dict[str, list[Any]]] = {
    "linear_sequence_logprobs": {
        **_LINEAR,
        "skip_inactive": [None, "no", 2, 0.5],
        "return_lse": ["yes", None, 2],
        "return_entropy": ["yes", None, 2],
    },
    "sequence_logprobs": {
        "logits": [
            *_NO_TENSOR,
            *(
                _of("logits", lambda x, kind=kind: x.to(kind))  # type: ignore[misc]
                for kind in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)
            ),
            _of("logits", lambda x: x[0]),
            _of("logits", lambda x: x[None]),
            _of("logits", lambda x: x[:-1]),
            _of("logits", lambda x: x.sum()),
            _of("logits", lambda x: x.to("meta")),
            _of("logits", lambda x: x[:, :0] if x.ndim == 2 else x.sum()),
            _of("logits", lambda x: x.float().to_sparse()),
        ],
        "targets": _TARGETS,
        "cu_seqlens": _BOUNDS,
        **_OPTIONS,
    },
    "fused_linear_preference_loss": {
        **_LINEAR,
        **_PREFERENCE,
        "scores": _constants("scores", "cu_seqlens"),
        "reference_logps": _constants("reference_logps", "cu_seqlens"),
    },
    "preference_loss": {
        **_PREFERENCE,
        "sums": [
            *_NO_TENSOR,
            _of("sums", lambda x: x[:-1]),
            _of("sums", lambda x: x.sum()),
            _of("sums", lambda x: x[None, None]),
            _of("sums", lambda x: x.long()),
            _of("sums", lambda x: x.to(torch.complex64)),
            _of("sums", lambda x: x.to("meta")),
        ],
        "counts": [
            *_NO_TENSOR,
            _of("counts", lambda x: x[:-1]),
            _of("counts", lambda x: x[:, None]),
            _of("counts", lambda x: x.sum()),
            _of("counts", lambda x: x.to(torch.complex64)),
            _of("counts", lambda x: x.to(torch.bool)),
            _of("counts", lambda x: x.to("meta")),
        ],
        "scores": _constants("scores", "sums")[:-1],
        "reference_logps": _constants("reference_logps", "sums")[:-1],
    },
}
"""Function, argument -> values that must be refused."""

NAMES: dict[str, tuple[str, ...]] = {
    # The argument that disagrees may be named in place of the one that was changed.
    "hidden": ("weight", "targets", "they must be alike"),
    "weight": ("hidden", "bias", "targets"),
    "bias": ("weight",),
    "logits": ("targets", "cu_seqlens"),
    "targets": ("cu_seqlens",),
    "sums": ("counts", "scores", "reference_logps", "sequences"),
    "counts": ("sums",),
    "group_size": ("groups", "sequences"),
    "gama": ("option",),
    "beta": ("option",),
    "loss": ("option", "scores", "beta", "label_smoothing"),
}
