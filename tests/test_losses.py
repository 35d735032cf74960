"""Each loss by hand, the registry, and the objective around them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_fast import UsageError, losses, preference_loss, register_loss

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


@given(st.data())
def test_every_loss_has_right_gradients(data):
    """Numerical derivatives at random points, away from the hinges' corners."""
    name = data.draw(st.sampled_from(losses.available()))
    size = data.draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logps = torch.randn(3, size, generator=generator, dtype=torch.float64, requires_grad=True)
    spec = losses.get_loss(name)
    extra = {
        "scores": torch.randn(3, size, generator=generator, dtype=torch.float64),
        "reference_logps": torch.randn(3, size, generator=generator, dtype=torch.float64),
        "counts": torch.randint(0, 9, (3, size), generator=generator),
    }
    extra = {k: v for k, v in extra.items() if k in spec.takes}
    assert torch.autograd.gradcheck(lambda x: spec.fn(x, **extra), (logps,))


def test_regulariser_and_denominators():
    """loss = sum of losses / num_groups + sft_weight * NLL(y+) / num_tokens."""
    sums, counts = LOGPS[:, :2].reshape(-1), torch.tensor([2, 3, 4, 5])
    plain = preference_loss(sums, counts, beta=1.0)
    assert plain.item() == pytest.approx((0.5 + 2.0) / 2)
    regular = preference_loss(sums, counts, beta=1.0, sft_weight=0.3)
    assert regular.item() == pytest.approx(1.25 + 0.3 * (1.0 + 2.0) / 6)
    window = preference_loss(
        sums, counts, beta=1.0, sft_weight=0.3, num_groups=5, num_tokens=torch.tensor(10)
    )
    assert window.item() == pytest.approx(2.5 / 5 + 0.3 * 3.0 / 10)


def test_a_denominator_of_zero_is_one():
    """A process without groups, in a run of many, adds nothing and divides by nothing."""
    for zero in (0, torch.tensor(0)):
        got = preference_loss(
            torch.zeros(0), torch.zeros(0).long(), num_groups=zero, sft_weight=1.0
        )
        assert got.item() == 0


def test_the_dtype_of_the_loss_is_that_of_the_sums():
    sums, counts = torch.zeros(4), torch.ones(4).long()
    for options in ({}, {"sft_weight": 0.5}, {"num_groups": torch.tensor(3)}, {"loss": "sft"}):
        assert preference_loss(sums, counts, **options).dtype == torch.float32


def test_groups_given_as_a_matrix_keep_their_size():
    with pytest.raises(UsageError, match="groups of 4, but group_size is 2"):
        preference_loss(torch.zeros(2, 4), torch.ones(2, 4).long())


def test_a_loss_may_work_in_place_and_take_scores_or_leave_them():
    def in_place(logps, *, scores=None):
        logps -= 1.0
        return logps[:, 0]

    sums = torch.zeros(4)
    assert preference_loss(sums, torch.ones(4).long(), loss=in_place).item() == -1.0
    assert not sums.any()


def test_sft_is_the_mean_over_tokens_whatever_the_normalisation():
    sums, counts = torch.tensor([-6.0, -4.0]), torch.tensor([3, 1])
    for alpha in (0.0, 1.0):
        got = preference_loss(sums, counts, loss="sft", group_size=1, length_normalization=alpha)
        assert got.item() == pytest.approx(10.0 / 4)


def test_length_normalisation_divides_by_count_to_the_alpha():
    sums, counts = torch.tensor([-6.0, -6.0]), torch.tensor([4, 9])
    got = preference_loss(sums, counts, beta=1.0, length_normalization=0.5)
    assert got.item() == pytest.approx(1.0 + 6 / 2 - 6 / 3)


def test_a_new_loss_is_one_function():
    @register_loss("test_only_log_sigmoid")
    def log_sigmoid(logps, *, counts, beta=0.1):
        return (
            -torch.nn.functional.logsigmoid(beta * (logps[:, 0] - logps[:, 1])) + 0 * counts[:, 0]
        )

    try:
        spec = losses.get_loss("test_only_log_sigmoid")
        assert spec.options == {"beta": 0.1}
        assert spec.takes == ("counts",)
        got = preference_loss(
            torch.zeros(4), torch.ones(4).long(), loss="test_only_log_sigmoid", beta=0.5
        )
        assert got.item() == pytest.approx(torch.tensor(2.0).log().item())
        with pytest.raises(ValueError, match="registered already"):
            register_loss("test_only_log_sigmoid")(log_sigmoid)
    finally:
        del losses._REGISTRY["test_only_log_sigmoid"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo2"}, "unknown loss 'dpo2'; known losses: dpo, dpo_hinge, ipo, plad_listwise"),
        ({"beta": -1.0}, "beta .* at least 0, got -1"),
        ({"beta": float("nan")}, "beta .* at least 0, got nan"),
        ({"gamma": 1.0}, "has no option 'gamma'; it has: beta"),
        ({"loss": "plad_margin"}, "needs scores"),
        ({"group_size": 1}, "groups of 2 or more"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1"),
        ({"group_size": 3}, "4 sequences do not form groups of 3"),
        ({"sft_weight": -0.1}, "sft_weight must not be negative"),
        ({"length_normalization": -1}, "length_normalization must be at least 0"),
        ({"loss": lambda logps: logps.sum()}, r"for 2 groups the shape \(2,\)"),
        ({"loss": lambda logps, *, tau: logps[:, 0]}, "needs the option tau"),
        ({"loss": lambda logps, *, bias=0.0: logps[:, 0] + bias}, "a parameter named 'bias'"),
        ({"loss": lambda logps: logps[:, 0] - logps.mean()}, "treat groups independently"),
        ({"loss": lambda logps: logps[:, 0] * torch.ones(3)}, "failed on two groups"),
        ({"loss": torch.relu}, "shows no signature"),
        ({"num_groups": -1}, "num_groups must not be negative"),
        ({"num_tokens": torch.ones(1)}, "num_tokens must be a number or a scalar"),
        ({"length_normalization": float("nan")}, "length_normalization must be at least 0"),
        ({"scores": torch.zeros(2)}, r"scores must have the shape of sums, \(4,\)"),
        ({"loss": "dpo"}, "loss 'dpo' needs reference_logps"),
        ({"reference_logps": torch.zeros(3)}, r"reference_logps must have the shape of sums"),
        ({"loss": "dpo", **REFERENCE, "beta": 0.0}, "beta .* must be positive, got 0"),
        ({"loss": "dpo", **REFERENCE, "label_smoothing": 0.5}, r"must lie in \[0, 0.5\), got 0.5"),
        ({"loss": "ipo", **REFERENCE, "group_size": 1}, "groups of 2 or more"),
    ],
)
def test_refusals_say_what_was_wrong(options, message):
    with pytest.raises(UsageError, match=message):
        preference_loss(torch.zeros(4), torch.ones(4).long(), **options)
