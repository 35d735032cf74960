"""Each loss by hand, and the registry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plad_fast import (
    UsageError,
    losses,
    preference_loss,
    register_loss,
)
from tests.support.loss_options import REQUIRED

REFERENCE = {"reference_logps": torch.zeros(4)}
LOGPS = torch.tensor([[-1.0, -1.5, -4.0], [-2.0, -1.0, -2.0]], dtype=torch.float64)


def test_ranking_by_hand():
    got = losses.plad_ranking(LOGPS[:, :2], beta=1.0)
    assert got.tolist() == [0.5, 2.0]


def test_ranking_is_the_mean_over_rejected_responses():
    got = losses.plad_ranking(LOGPS, beta=1.0)
    assert got.tolist() == [0.25, 1.5]


def test_margin_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.6]], dtype=torch.float64)
    got = losses.plad_margin(LOGPS[:, :2], scores=scores, beta=2.0)
    torch.testing.assert_close(got, torch.tensor([1.1, 0.8], dtype=torch.float64))


def test_listwise_by_hand():
    """Pairs (0,1), (0,2), (1,2) with margins 1, 2, 1."""
    got = losses.plad_listwise(LOGPS, beta=1.0)
    assert got.tolist() == [0.5 + 0.0 + 0.0, 2.0 + 2.0 + 0.0]


def test_listwise_of_two_is_ranking():
    pairs = LOGPS[:, :2]
    assert torch.equal(losses.plad_listwise(pairs, beta=0.7), losses.plad_ranking(pairs, beta=0.7))


@pytest.mark.parametrize("name", ["plad_ranking", "plad_listwise"])
def test_no_gradient_exactly_at_the_hinge(name):
    logps = torch.tensor([[0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    losses.get_loss(name).fn(logps, beta=1.0).sum().backward()
    assert logps.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "beta", "want"),
    [
        # d = 2 and -1 from the first response to each of the others
        ("dpo", 1.0, [(math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2]),
        ("dpo_hinge", 0.75, [(0.0 + 1.75) / 2]),
        # in means over tokens d = 1.25 and 0.5
        ("ipo", 0.5, [(0.25**2 + 0.5**2) / 2]),
    ],
)
def test_losses_on_a_reference_by_hand(name, beta, want):
    """log-ratios 1, -1 and 2 of 1, 4 and 4 tokens."""
    reference = torch.tensor([[-3.0, -8.0, -7.0]], dtype=torch.float64)
    logps = reference + torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64)
    spec = losses.get_loss(name)
    counts = {"counts": torch.tensor([[1, 4, 4]])} if "counts" in spec.takes else {}
    assert spec.needs_reference
    got = spec.fn(logps, reference_logps=reference, beta=beta, **counts)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_simpo_by_hand():
    """Means over tokens of -1, -0.5 and -2: differences of -0.5 and 1, less the margin."""
    logps = torch.tensor([[-1.0, -2.0, -4.0]], dtype=torch.float64)
    got = losses.simpo(logps, counts=torch.tensor([[1, 4, 2]]), beta=2.0, gamma=0.5)
    want = (math.log1p(math.exp(1.5)) + math.log1p(math.exp(-1.5))) / 2
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64))


def test_orpo_by_hand():
    """Of mean probabilities of 1/2 and 1/4 the odds are 1 and 1/3; of 1/5, 1/4."""
    logps = -torch.tensor([[2 * math.log(2), math.log(4), 3 * math.log(5)]], dtype=torch.float64)
    got = losses.orpo(logps, counts=torch.tensor([[2, 1, 3]]), beta=0.5)
    # -log sigmoid(log x) = log(1 + 1 / x)
    want = 0.5 * (math.log(1 + 1 / 3) + math.log(1 + 1 / 4)) / 2
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64))


def test_kto_reads_labels_from_scores_or_takes_the_first_for_the_desirable_one():
    """Gains of 2 and -1, over a divergence of 0.5."""
    reference = torch.tensor([[-3.0, -8.0]], dtype=torch.float64)
    logps = reference + torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    options = {"beta": 0.5, "kl": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    good, bad = 1.5 / (1 + math.exp(0.75)), 0.75 / (1 + math.exp(0.75))
    got = losses.kto(logps, reference_logps=reference, **options)
    assert got.item() == pytest.approx((good + bad) / 2)
    labels = {"scores": torch.tensor([[1.0, -1.0]])}
    on = {"loss": "kto", "reference_logps": reference}
    pair = preference_loss(logps, torch.ones(1, 2), **on, **options)
    alone = preference_loss(
        *(logps[0], torch.ones(2)),
        **{"loss": "kto", "group_size": 1, "reference_logps": reference[0]},
        **{"scores": labels["scores"][0], **options},
    )
    assert pair.item() == pytest.approx(alone.item()) == pytest.approx(got.item())
    shifted = losses.kto(logps, reference_logps=reference + 0.5, **options | {"kl": 0.0}, **labels)
    tensor = losses.kto(logps, reference_logps=reference, **options | {"kl": torch.tensor(0.5)})
    assert shifted.item() == pytest.approx(tensor.item()) == pytest.approx(got.item())


def test_the_family_holds_together():
    """Where one loss is said to be another at some value of an option."""
    pairs, reference = LOGPS[:, :2], torch.tensor([[-2.0, -1.0], [-1.5, -3.0]]).double()
    counts = torch.tensor([[2, 3], [4, 1]])
    on = {"reference_logps": reference}
    per_token = {"reference_logps": reference / counts}
    robust = losses.dpo_robust(pairs, **on, label_smoothing=0.0)
    torch.testing.assert_close(robust, losses.dpo(pairs, **on))
    norm = losses.dpo_norm(pairs, counts=counts, **on)
    torch.testing.assert_close(norm, losses.dpo(pairs / counts, **per_token))
    dpo_alpha_1 = losses.dpo(pairs, **on, f_divergence="alpha_divergence", f_alpha=1.0)
    torch.testing.assert_close(dpo_alpha_1, losses.dpo(pairs, **on))
    dpo_alpha_0 = losses.dpo(pairs, **on, f_divergence="alpha_divergence", f_alpha=0.0)
    torch.testing.assert_close(dpo_alpha_0, losses.dpo(pairs, **on, f_divergence="forward_kl"))
    uniform = {"reference_logps": torch.zeros_like(pairs)}
    torch.testing.assert_close(losses.cpo(pairs), losses.dpo(pairs, **uniform))
    ipo = losses.ipo(pairs, counts=counts, **uniform)
    torch.testing.assert_close(losses.cpo_ipo(pairs, counts=counts), ipo)
    torch.testing.assert_close(losses.slic(pairs, delta=0.7), losses.plad_ranking(pairs, beta=0.7))
    near = losses.simpo(pairs, counts=counts, alpha=1e-9)
    torch.testing.assert_close(near, losses.simpo(pairs, counts=counts))
    apo = losses.kto(pairs, **on, kl=0.0)
    torch.testing.assert_close(2 * apo, losses.apo_zero(pairs, **on))
    mixed = losses.mixture(
        *(pairs,), **on, counts=counts, parts={"ipo": {"weight": 0.25, "beta": 0.5}, "cpo": {}}
    )
    want = 0.25 * losses.ipo(pairs, counts=counts, **on, beta=0.5) + losses.cpo(pairs)
    torch.testing.assert_close(mixed, want)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["plad_ranking", "plad_listwise", "dpo", "ipo", "cpo", "simpo"])
def test_a_mixture_of_one_loss_is_that_loss_under_any_length_normalisation(name, alpha):
    """Its own where none is given; that of the mixture is for the metrics alone."""
    sums, counts = torch.tensor([-6.0, -8.0, -3.0, -2.0]), torch.tensor([4, 9, 1, 5])
    options = {"sft_weight": 0.0}
    if losses.get_loss(name).needs_reference:
        options["reference_logps"] = torch.tensor([-7.0, -5.0, -3.5, -1.0])
    own = {} if alpha is None else {"length_normalization": alpha}
    in_part = own if losses.get_loss(name).length_normalized else {}
    alone = preference_loss(sums, counts, loss=name, **own, **options)
    for of_all in ({}, {"length_normalization": 0.3}):
        mixed = preference_loss(
            sums, counts, loss="mixture", parts={name: in_part}, **of_all, **options
        )
        assert mixed.item() == alone.item()
    parts = {name: {"weight": 2.0, **in_part}, "cpo_ipo": {}}
    double = preference_loss(sums, counts, loss="mixture", parts=parts, **options)
    other = preference_loss(sums, counts, loss="cpo_ipo")
    torch.testing.assert_close(double, 2 * alone + other)


def test_a_mixture_needs_a_reference_if_a_part_does():
    spec = losses.get_loss("mixture")
    assert spec.needs_reference_for({"parts": {"cpo": {}, "dpo": {}}})
    assert not spec.needs_reference_for({"parts": {"cpo": {}, "simpo": {}}})
    assert losses.get_loss("dpo").needs_reference_for({})
    assert not losses.get_loss("cpo").needs_reference_for({})
    with pytest.raises(UsageError, match="'dpo' in parts needs reference_logps"):
        losses.mixture(LOGPS[:, :2], counts=torch.ones(2, 2), parts={"cpo": {}, "dpo": {}})


def test_a_part_may_work_in_place():
    @register_loss("test_only_in_place")
    def in_place(logps):
        logps -= 1.0
        return logps[:, 0]

    try:
        parts = {"test_only_in_place": {}, "cpo_ipo": {}}
        sums, counts = torch.zeros(4), torch.ones(4).long()
        mixed = preference_loss(sums, counts, loss="mixture", parts=parts)
        assert mixed == preference_loss(sums, counts, loss="cpo_ipo") - 1
        assert not sums.any()
    finally:
        del losses.registry._REGISTRY["test_only_in_place"]


def test_a_loss_may_ask_for_the_length_normalisation():
    def told(logps, *, length_normalization):
        return logps[:, 0] * 0 + length_normalization

    sums, counts = torch.zeros(4), torch.ones(4).long()
    for alpha in (0.0, 0.5):
        assert preference_loss(sums, counts, loss=told, length_normalization=alpha) == alpha


EXTREMES = [
    *((0.0, 0.0), (-1e4, -1e4), (0.0, -1e4), (-1e4, 0.0)),
    *((-1e-9, -3.0), (-3.0, -1e-9), (-1e-9, -1e-9), (-1e-45, -2.0)),
]
SHAPES = [
    *({"f_divergence": "forward_kl"}, {"f_divergence": "js_divergence"}, {"alpha": 0.25}),
    *({"f_divergence": "alpha_divergence"}, {"f_divergence": "alpha_divergence", "f_alpha": 3.0}),
    *({"alpha": -2.0}, {}),
]


@pytest.mark.parametrize("name", losses.available())
def test_hopeless_and_certain_responses_give_finite_numbers(name):
    """Log-probabilities of -1e4, equal ones, one token, none, and p within rounding of 1."""
    spec = losses.get_loss(name)
    for options in SHAPES:
        if not options.keys() <= spec.options.keys():
            continue
        for count in (0, 1, 1000):
            logps = torch.tensor(EXTREMES, requires_grad=True)
            extra = {
                "scores": torch.ones_like(logps),
                "reference_logps": torch.full_like(logps, -5.0),
                "counts": torch.full(logps.shape, count),
            }
            extra = {k: v for k, v in extra.items() if k in spec.takes}
            got = spec.fn(logps, **extra, **options, **REQUIRED.get(name, {}))
            [gradient] = torch.autograd.grad(got.sum(), logps)
            assert got.isfinite().all(), (options, count, got)
            assert gradient.isfinite().all(), (options, count, gradient)


def test_label_smoothing_counts_a_share_of_every_pair_the_other_way_round():
    pairs, reference = LOGPS[:, :2], torch.zeros(2, 2)
    right, wrong = (losses.dpo(x, reference_logps=reference) for x in (pairs, pairs.flip(1)))
    got = losses.dpo(pairs, reference_logps=reference, label_smoothing=0.2)
    torch.testing.assert_close(got, 0.8 * right + 0.2 * wrong)


def test_the_reference_is_normalised_as_the_policy_is():
    """At the policy itself every margin is 0, at any alpha; ipo takes means of its own accord."""
    sums, counts = torch.tensor([-6.0, -8.0]), torch.tensor([4, 9])
    for alpha in (0.0, 0.5, 1.0):
        options = {"reference_logps": sums, "length_normalization": alpha}
        assert preference_loss(sums, counts, loss="dpo", **options).item() == pytest.approx(
            math.log(2)
        )
        shifted = preference_loss(
            sums, counts, loss="ipo", beta=0.5, **options | {"reference_logps": torch.zeros(2)}
        )
        assert shifted.item() == pytest.approx((-6 / 4 + 8 / 9 - 1) ** 2)
    plain = torch.tensor([-1.0, -2.0])
    got = preference_loss(
        sums, counts, loss="dpo_hinge", length_normalization=0.5, reference_logps=plain
    )
    assert got.item() == pytest.approx(1 - 0.1 * (-5 / 2 + 6 / 3))


@pytest.mark.parametrize("name", losses.available())
@settings(max_examples=5)
@given(st.data())
def test_every_loss_has_right_gradients(name, data):
    """Numerical derivatives at random points, away from the hinges' corners, for all options."""
    size = data.draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logps = torch.randn(3, size, generator=generator, dtype=torch.float64, requires_grad=True)
    spec = losses.get_loss(name)
    extra = {
        "scores": torch.randn(3, size, generator=generator, dtype=torch.float64),
        "reference_logps": torch.randn(3, size, generator=generator, dtype=torch.float64),
        "counts": torch.randint(0, 9, (3, size), generator=generator),
    }
    extra = {k: v for k, v in extra.items() if k in spec.takes} | REQUIRED.get(name, {})
    for options in (*SHAPES, {"label_smoothing": 0.2}):
        if options.keys() <= spec.options.keys():
            assert torch.autograd.gradcheck(
                lambda x, shape=options: spec.fn(x, **extra, **shape), (logps,)
            ), options
