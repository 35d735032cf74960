"""Preference losses: pure functions from sequence log-likelihoods to one number per group.

A group is the K responses to one prompt, best first: the teacher's answer, then the student's.
B groups. `logps` holds s(y) = sum_t log p(y_t | x, y_<t) in nats, divided by |y| ** alpha when
length normalisation is on; `reference_logps` holds the same under a reference model, s_ref(y).

A new loss is one function under `@register_loss`. Its first argument is `logps` (B, K); it may
ask for `scores`, `counts` or `reference_logps`, (B, K) each, or for the caller's
`length_normalization`, by naming them; its other keyword arguments are its options. It returns one
loss per group, (B,), and must treat groups independently: the one-pass loss calls it on some
groups at a time.

With more than one rejected response a loss of pairs is the mean over the pairs that the first
response forms with each of the others, unless its docstring says otherwise.
"""

from __future__ import annotations

from plad_fast.losses.hinges import plad_listwise, plad_margin, plad_ranking, slic
from plad_fast.losses.mixing import mixture
from plad_fast.losses.on_reference import (
    discopop,
    dpo,
    dpo_hinge,
    dpo_norm,
    dpo_robust,
    exo_pair,
    ipo,
)
from plad_fast.losses.on_reference_each import (
    apo_down,
    apo_zero,
    bco_pair,
    kto,
    nca_pair,
    sppo_hard,
)
from plad_fast.losses.reference_free import cpo, cpo_ipo, orpo, sft, simpo
from plad_fast.losses.registry import (
    LossSpec,
    available,
    get_loss,
    read_loss_args,
    register_loss,
)
from plad_fast.losses.trl_options import (
    translate_cpo,
    translate_dpo,
    translate_kto,
    translate_orpo,
)

__all__ = [
    "LossSpec",
    "apo_down",
    "apo_zero",
    "available",
    "bco_pair",
    "cpo",
    "cpo_ipo",
    "discopop",
    "dpo",
    "dpo_hinge",
    "dpo_norm",
    "dpo_robust",
    "exo_pair",
    "get_loss",
    "ipo",
    "kto",
    "mixture",
    "nca_pair",
    "orpo",
    "plad_listwise",
    "plad_margin",
    "plad_ranking",
    "read_loss_args",
    "register_loss",
    "sft",
    "simpo",
    "slic",
    "sppo_hard",
    "translate_cpo",
    "translate_dpo",
    "translate_kto",
    "translate_orpo",
]
