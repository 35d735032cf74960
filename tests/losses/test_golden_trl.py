"""Losses on a reference against their closed forms, and against TRL where it is installed."""

from __future__ import annotations

import collections
import math
from types import SimpleNamespace

import pytest
import torch

from plad_fast import preference_loss
from plad_fast.losses.trl_options import (
    DPO_LOSSES,
    KTO_LOSSES,
    translate_cpo,
    translate_dpo,
    translate_kto,
    translate_orpo,
)

# Per pair: lengths, log-probabilities and reference log-probabilities of y+ and y-. The margins
# lie on both sides of the hinge, and one has hardly any gradient left.
PAIRS = [
    ((4, 7), (-9.5, -14.25), (-11.0, -13.5)),
    ((1, 3), (-2.0, -1.5), (-0.75, -6.25)),
    ((12, 5), (-30.0, -55.0), (-31.0, -16.0)),
    ((6, 6), (-8.125, -8.125), (-8.125, -8.125)),
]
BETA = 0.3


def tensors():
    lengths, logps, reference = (torch.tensor(part) for part in zip(*PAIRS, strict=True))
    return lengths, logps.double().requires_grad_(), reference.double()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def closed_form(name, lengths, logps, reference, smoothing):
    """Loss and its derivative by s(y+) and s(y-)."""
    over = lengths if name in ("ipo", "dpo_mean") else (1, 1)
    gap = (logps[0] - reference[0]) / over[0] - (logps[1] - reference[1]) / over[1]
    if name == "dpo_hinge":
        loss, slope = max(0.0, 1 - BETA * gap), -BETA if BETA * gap < 1 else 0.0
    elif name == "ipo":
        loss, slope = (gap - 1 / (2 * BETA)) ** 2, 2 * (gap - 1 / (2 * BETA))
    else:
        right, wrong = sigmoid(BETA * gap), sigmoid(-BETA * gap)
        loss = -(1 - smoothing) * math.log(right) - smoothing * math.log(wrong)
        slope = BETA * (smoothing - wrong)
    return loss, (slope / over[0], -slope / over[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {}),
        ("dpo", {"label_smoothing": 0.25}),
        ("dpo_mean", {"loss": "dpo", "length_normalization": 1.0}),
        ("dpo_hinge", {}),
        ("ipo", {}),
    ],
)
def test_values_and_gradients_equal_the_closed_forms(name, options):
    lengths, logps, reference = tensors()
    options = {"loss": name, "beta": BETA} | options
    ours = preference_loss(logps, lengths, reference_logps=reference, **options)
    ours.backward()
    smoothing = options.get("label_smoothing", 0.0)
    want = [closed_form(name, *pair, smoothing) for pair in PAIRS]
    assert ours.item() == pytest.approx(sum(loss for loss, _ in want) / 4, rel=1e-12)
    gradients = torch.tensor([gradient for _, gradient in want], dtype=torch.float64) / 4
    torch.testing.assert_close(logps.grad, gradients, rtol=1e-12, atol=1e-15)


def trl_dpo(options):
    """Loss and gradients by the log-probabilities of TRL's trainer, for options of its config.

    Its method runs on fixed token log-probabilities, without a model.
    """
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    lengths, logps, reference = tensors()
    # TRL's batch: all chosen, then all rejected; a prompt of one token, and padding.
    counts = lengths.T.reshape(-1)
    mask = torch.arange(1, 13) <= counts[:, None]
    tokens = mask * (logps.detach().T.reshape(-1) / counts)[:, None]
    tokens = tokens.to(options.pop("dtype", tokens.dtype)).requires_grad_()
    outputs = SimpleNamespace(
        log_probs=tokens,
        entropy=torch.zeros_like(tokens),
        mean_logits=torch.zeros_like(tokens),
        is_top1=mask,
    )
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x.unsqueeze(0)
    )
    types = [options["loss_type"]] if isinstance(options["loss_type"], str) else None
    types = types or options["loss_type"]
    stub = SimpleNamespace(
        **{"model": SimpleNamespace(training=False), "accelerator": accelerator},
        **{"aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": True},
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        **{"loss_types": types, "loss_weights": options.get("loss_weights") or [1.0] * len(types)},
        **{"beta": BETA, "label_smoothing": options.get("label_smoothing", 0.0)},
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
        **{"use_weighting": False, "_total_train_tokens": 0},
        _metrics={"eval": collections.defaultdict(list)},
    )
    inputs = {
        "input_ids": torch.zeros(8, 13, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)),
        "ref_chosen_logps": reference[:, 0].to(tokens.dtype),
        "ref_rejected_logps": reference[:, 1].to(tokens.dtype),
    }
    loss = trainer._compute_loss(stub, lambda **_: outputs, inputs, False)
    loss.backward()
    # Every token of a response has the gradient of the response.
    return loss.detach(), tokens.grad[:, 0].view(2, 4).T


DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    # TRL knows the largest exponent for float32 and narrower types only.
    {"f_divergence_type": "alpha_divergence", "dtype": torch.float32},
    {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 1.5,
        "dtype": torch.float32,
    },
]
DPO_OPTIONS = [
    *({"loss_type": name} for name in DPO_LOSSES if name != "exo_pair"),
    {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"loss_type": "discopop", "discopop_tau": 0.5},
    {"loss_type": "sft"},
    {"loss_type": ["sigmoid"], "loss_weights": [0.5]},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.005]},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["robust", "sigmoid_norm", "discopop"], "label_smoothing": 0.1},
    *({"loss_type": "ipo", **divergence} for divergence in DIVERGENCES),
    *({"loss_type": "sigmoid", **divergence} for divergence in DIVERGENCES),
    {"loss_type": ["hinge", "exo_pair", "sigmoid_norm"], **DIVERGENCES[0], "label_smoothing": 0.1},
    {"loss_type": ["robust", "discopop", "sft"], **DIVERGENCES[1], "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", DPO_OPTIONS, ids=str)
def test_dpo_equals_trls_for_every_option(options):
    want, gradients = trl_dpo(dict(options))
    dtype = want.dtype
    lengths, logps, reference = tensors()
    given = {k: v for k, v in options.items() if k != "dtype"} | {"beta": BETA}
    loss, ours, sft_weight = translate_dpo(given)
    got = preference_loss(
        *(logps, lengths),
        **{"loss": loss, "reference_logps": reference, "sft_weight": sft_weight, **ours},
    )
    got.backward()
    torch.testing.assert_close(got.to(dtype), want)
    torch.testing.assert_close(logps.grad.to(dtype), gradients)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "sigmoid", "label_smoothing": 0.25, "cpo_alpha": 0.0},
        {"loss_type": "hinge", "cpo_alpha": 0.3},
        {"loss_type": "ipo"},
        {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0},
        {"loss_type": "simpo", "label_smoothing": 0.25},
    ],
    ids=str,
)
def test_cpo_equals_trls_for_every_option(options, alpha):
    """The likelihood beside it is TRL's mean over the tokens of the chosen responses."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    lengths, logps, _ = tensors()
    given = {"beta": BETA, "alpha": alpha, **options}
    stub = SimpleNamespace(
        **{"alpha": alpha, "accelerator": SimpleNamespace(device="cpu"), "beta": BETA},
        loss_type=options["loss_type"],
        simpo_gamma=options.get("simpo_gamma", 0.5),
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    # TRL takes the means over tokens before these losses.
    scored = logps / lengths if options["loss_type"] in ("ipo", "simpo") else logps
    nll = -logps[:, 0].sum() / lengths[:, 0].sum()
    want = trainer.cpo_loss(stub, scored[:, 0], scored[:, 1])[0].mean()
    want = want + options.get("cpo_alpha", 1.0) * nll
    (theirs,) = torch.autograd.grad(want, logps)
    loss, ours, sft_weight = translate_cpo(given)
    got = preference_loss(logps, lengths, loss=loss, sft_weight=sft_weight, **ours)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logps)[0], theirs)


def test_orpo_equals_trls():
    """TRL computes in float32. The likelihood beside it is checked where whole steps are."""
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    lengths, logps, _ = tensors()
    stub = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    means = logps / lengths
    want = -trainer.odds_ratio_loss(stub, means[:, 0], means[:, 1])[0].mean()
    (theirs,) = torch.autograd.grad(want, logps)
    loss, ours, sft_weight = translate_orpo({"beta": BETA})
    got = preference_loss(logps, lengths, loss=loss, sft_weight=0.0, **ours)
    assert sft_weight == 1
    torch.testing.assert_close(got.float(), want)
    torch.testing.assert_close(torch.autograd.grad(got, logps)[0], theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KTO_LOSSES)
def test_kto_equals_trls(kind):
    """Labels in an order of their own; the divergence from sequences that we do not see."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    lengths, logps, reference = (part.reshape(-1) for part in tensors())
    labels = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0])
    logps = logps.detach().requires_grad_()
    mask = torch.arange(1, 13) <= lengths[:, None]
    tokens = mask * (logps / lengths)[:, None]
    outputs = SimpleNamespace(
        log_probs=tokens, entropy=torch.zeros_like(tokens), mean_logits=torch.zeros_like(tokens)
    )
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    others = torch.tensor([-3.0, -1.5], dtype=torch.float64)
    weights = {"desirable_weight": 1.25, "undesirable_weight": 0.75}
    stub = SimpleNamespace(
        **{"model": SimpleNamespace(training=False), "accelerator": accelerator, **weights},
        **{"aux_loss_enabled": False, "precompute_ref_logps": True, "_total_train_tokens": 0},
        **{"beta": BETA, "loss_type": kind, "calculate_KL": kind == "kto"},
        _compute_kl_logps=lambda *_: others,
        _metrics={"eval": collections.defaultdict(list)},
    )
    batch = {
        "input_ids": torch.zeros(8, 13, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)),
        **{"label": labels, "ref_logps": reference, "ref_KL_logps": others - 0.4},
    }
    want = trainer._compute_loss(stub, lambda **_: outputs, batch, False)
    (theirs,) = torch.autograd.grad(want, logps)
    loss, ours, _ = translate_kto({"loss_type": kind, "beta": BETA, **weights})
    if kind == "kto":
        ours["kl"] = 0.4
    got = preference_loss(
        *(logps, lengths),
        **{"loss": loss, "group_size": 1, "reference_logps": reference, **ours},
        scores=2.0 * labels - 1,
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logps)[0], theirs)
