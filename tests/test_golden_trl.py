"""Losses on a reference against their closed forms, and against TRL where it is installed."""

from __future__ import annotations

import collections
import math
from types import SimpleNamespace

import pytest
import torch

from plad_fast import preference_loss

# Per pair: lengths, log-probabilities and reference log-probabilities of y+ and y-. The margins
# lie on both sides of the hinge, and one has hardly any gradient left.
PAIRS = [
    ((4, 7), (-9.5, -14.25), (-11.0, -13.5)),
    ((1, 3), (-2.0, -1.5), (-0.75, -6.25)),
    ((12, 5), (-30.0, -60.0), (-31.0, -16.0)),
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


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ("sigmoid", {"loss": "dpo"}),
        ("sigmoid_norm", {"loss": "dpo", "length_normalization": 1.0}),
        ("hinge", {"loss": "dpo_hinge"}),
        ("ipo", {"loss": "ipo"}),
    ],
)
def test_values_and_gradients_equal_trls(theirs, options):
    """Its trainer's method runs on fixed token log-probabilities, without a model."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    lengths, logps, reference = tensors()
    # TRL's batch: all chosen, then all rejected; a prompt of one token, and padding.
    counts = lengths.T.reshape(-1)
    mask = torch.arange(1, 13) <= counts[:, None]
    tokens = (mask * (logps.detach().T.reshape(-1) / counts)[:, None]).requires_grad_()
    outputs = SimpleNamespace(
        log_probs=tokens,
        entropy=torch.zeros_like(tokens),
        mean_logits=torch.zeros_like(tokens),
        is_top1=mask,
    )
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x.unsqueeze(0)
    )
    stub = SimpleNamespace(
        **{"model": SimpleNamespace(training=False), "accelerator": accelerator},
        **{"aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": True},
        **{"f_divergence_type": "reverse_kl", "loss_types": [theirs], "loss_weights": [1.0]},
        **{"beta": BETA, "label_smoothing": 0.0, "use_weighting": False},
        **{"_metrics": {"eval": collections.defaultdict(list)}, "_total_train_tokens": 0},
    )
    inputs = {
        "input_ids": torch.zeros(8, 13, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)),
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    want = trainer._compute_loss(stub, lambda **_: outputs, inputs, False)
    want.backward()
    ours = preference_loss(logps, lengths, reference_logps=reference, beta=BETA, **options)
    ours.backward()
    torch.testing.assert_close(ours, want)
    # Every token of a response has the gradient of the response.
    torch.testing.assert_close(logps.grad, tokens.grad[:, 0].view(2, 4).T)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_simpo_equals_trls(smoothing):
    """TRL takes the means over tokens before its loss."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    lengths, logps, _ = tensors()
    stub = SimpleNamespace(
        **{"alpha": 0.0, "accelerator": SimpleNamespace(device="cpu"), "loss_type": "simpo"},
        **{"simpo_gamma": 0.7, "beta": BETA, "label_smoothing": smoothing},
    )
    means = logps / lengths
    want = trainer.cpo_loss(stub, means[:, 0], means[:, 1])[0].mean()
    (theirs,) = torch.autograd.grad(want, logps)
    ours = preference_loss(
        logps, lengths, loss="simpo", beta=BETA, gamma=0.7, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(torch.autograd.grad(ours, logps)[0], theirs)
