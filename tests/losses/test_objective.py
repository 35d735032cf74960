"""The objective around a loss: its terms, what it normalises and refuses, and mixtures."""

from __future__ import annotations

import copy
import functools
import json
import math

import pytest
import torch

from plad_fast import (
    PLaDConfig,
    UsageError,
    fused_linear_preference_loss,
    linear_sequence_logprobs,
    losses,
    preference_loss,
    register_loss,
)
from plad_fast.recipe.settings import DistillConfig
from tests.support.loss_options import REQUIRED
from tests.support.problems import make_problem

REFERENCE = {"reference_logps": torch.zeros(4)}
LOGPS = torch.tensor([[-1.0, -1.5, -4.0], [-2.0, -1.0, -2.0]], dtype=torch.float64)


def test_regulariser_and_denominators():
    """loss = sum of losses / num_groups + sft_weight * NLL(y+) / num_tokens."""
    sums, counts = LOGPS[:, :2].reshape(-1), torch.tensor([2, 3, 4, 5])
    of_sums = {"beta": 1.0, "length_normalization": 0.0}
    plain = preference_loss(sums, counts, **of_sums, sft_weight=0.0)
    assert plain.item() == pytest.approx((0.5 + 2.0) / 2)
    regular = preference_loss(sums, counts, **of_sums, sft_weight=0.3)
    assert regular.item() == pytest.approx(1.25 + 0.3 * (1.0 + 2.0) / 6)
    window = preference_loss(
        sums, counts, **of_sums, sft_weight=0.3, num_groups=5, num_tokens=torch.tensor(10)
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
    got = preference_loss(sums, counts, beta=1.0, length_normalization=0.5, sft_weight=0.0)
    assert got.item() == pytest.approx(1.0 + 6 / 2 - 6 / 3)


@pytest.mark.parametrize("name", losses.available())
def test_a_loss_has_its_own_terms_wherever_it_is_named(name):
    """The op, the loss on sums, the trainer's settings, the recipe's: a name is one objective,
    and so is its function."""
    spec, options = losses.get_loss(name), REQUIRED.get(name, {})
    problem = make_problem([4, 5, 3, 3])
    own = {"sft_weight": spec.sft_weight, "length_normalization": spec.length_normalization}
    for constants in {"scores", "reference_logps"} & set(spec.takes):
        options = {**options, constants: torch.tensor([-0.5, -2.0, 0.5, -1.0]).double()}
    fused, named = (
        fused_linear_preference_loss(
            *problem.inputs, loss=name, **terms, **options, **problem.options
        )
        for terms in ({}, own)
    )
    assert torch.equal(fused.loss, named.loss)
    assert torch.equal(fused.sums, named.sums)
    op = linear_sequence_logprobs(*problem.inputs, **problem.options)
    got = preference_loss(op.sums, op.counts, loss=name, **options)
    torch.testing.assert_close(got, fused.loss)
    assert torch.equal(preference_loss(op.sums, op.counts, loss=spec.fn, **options), got)
    loss_args = {key: options[key] for key in spec.options if key in options}
    config = PLaDConfig("unused", loss=name, loss_args=loss_args, use_cpu=True)
    objective = config.objective(group_size=2)
    scorer = "rouge" if spec.needs_scores else None
    for key, value in own.items():
        assert getattr(objective, key) == value
    if name != "sft":  # which is no calibration
        recipe = DistillConfig(loss=name, loss_args=json.dumps(loss_args), scorer=scorer)
        assert own.items() <= recipe.results_settings().items()


def test_a_new_loss_has_the_terms_it_is_registered_with():
    sums, counts = torch.tensor([-6.0, -8.0]), torch.tensor([4, 8])
    try:
        register_loss("test_only_terms", sft_weight=0.5, length_normalization=1.0)(
            lambda logps: -logps.sum(1)
        )
        got = preference_loss(sums, counts, loss="test_only_terms")
        assert got.item() == pytest.approx((6 / 4 + 8 / 8) + 0.5 * 6 / 4)
        assert preference_loss(sums, counts, loss=lambda logps: -logps.sum(1)).item() == 14
        with pytest.raises(UsageError, match=r"sft_weight must not be negative.*-1"):
            register_loss("test_only_wrong", sft_weight=-1.0)
    finally:
        del losses.registry._REGISTRY["test_only_terms"]


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
        del losses.registry._REGISTRY["test_only_log_sigmoid"]


def mixture(parts):
    return {"loss": "mixture", "parts": parts, **REFERENCE}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo2"}, "unknown loss 'dpo2'; did you mean dpo?"),
        ({"loss": "mine"}, "unknown loss 'mine'; known losses: apo_down, apo_zero, bco_pair"),
        ({"loss": "sigmoid"}, "unknown loss 'sigmoid'; TRL's sigmoid is dpo here"),
        ({"loss": "hinge"}, "TRL's hinge is dpo_hinge here"),
        ({"loss": "aot"}, "TRL's aot does not work here: it sorts the pairs of a batch"),
        ({"beta": -1.0}, "beta .* at least 0, got -1"),
        ({"beta": float("nan")}, "beta of loss 'plad_ranking' must be a finite number, got nan"),
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
        ({"loss": lambda logps, *, group=0.0: logps[:, 0] + group}, "a parameter named 'group'"),
        ({"loss": lambda logps: logps[:, 0] - logps.mean()}, "treat groups independently"),
        ({"loss": lambda logps: logps[:, 0] * torch.ones(3)}, "failed on two groups"),
        ({"loss": torch.relu}, "shows no signature"),
        ({"num_groups": -1}, "num_groups must not be negative"),
        ({"num_tokens": torch.ones(1)}, r"num_tokens must have shape \(\), got \(1,\)"),
        ({"length_normalization": float("nan")}, "length_normalization must be at least 0"),
        ({"scores": torch.zeros(2)}, r"scores must have shape \(4,\)"),
        ({"loss": "dpo"}, "loss 'dpo' needs reference_logps"),
        ({"reference_logps": torch.zeros(3)}, r"reference_logps must have shape \(4,\)"),
        ({"loss": "dpo", **REFERENCE, "beta": 0.0}, "beta must be positive .* got 0"),
        ({"loss": "dpo", **REFERENCE, "label_smoothing": 0.5}, r"must lie in \[0, 0.5\), got 0.5"),
        ({"loss": "ipo", **REFERENCE, "group_size": 1}, "groups of 2 or more"),
        ({"beta": "3"}, "beta of loss 'plad_ranking' must be a number, got '3'"),
        ({"beta": math.inf}, "beta of loss 'plad_ranking' must be a finite number"),
        ({"loss": "dpo", **REFERENCE, "f_divergence": 1}, "f_divergence of loss 'dpo' is a name"),
        (
            {"loss": "dpo", **REFERENCE, "f_divergence": "kl"},
            "f_divergence 'kl'; known: reverse_kl",
        ),
        ({"loss": "exo_pair", **REFERENCE, "label_smoothing": 0.0}, r"must lie in \(0, 0.5\)"),
        ({"loss": "dpo_robust", **REFERENCE, "label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ({"loss": "discopop", **REFERENCE, "tau": 2.0}, r"tau .* \(0, 1\], got 2.0"),
        ({"loss": "cpo", "beta": 0.0}, "beta must be positive .* got 0"),
        ({"loss": "simpo", "gamma": -1.0}, "gamma .* at least 0, got -1"),
        ({"loss": "simpo", "alpha": math.nan}, "alpha of loss 'simpo' .* finite number, got nan"),
        ({"loss": "slic", "delta": -1.0}, "delta .* at least 0, got -1"),
        ({"loss": "orpo", "beta": -1.0}, "beta .* at least 0, got -1"),
        ({"loss": "bco_pair", **REFERENCE, "group_size": 1}, "groups of 2 or more"),
        ({"loss": "kto", **REFERENCE}, "loss 'kto' needs the option kl"),
        ({"loss": "kto", **REFERENCE, "kl": -1.0}, "kl .* at least 0, got -1"),
        ({"loss": "kto", **REFERENCE, "kl": "1"}, "kl must be a number, got '1'"),
        ({"loss": "kto", **REFERENCE, "kl": torch.tensor(math.nan)}, "kl .* at least 0, got nan"),
        ({"loss": 5}, "loss must be the name of a loss or a function, got 5; known losses: apo"),
        ({"loss": ["dpo"]}, r"loss must be the name of a loss or a function, got \['dpo'\]"),
        ({"loss": lambda logps: logps[:, 0] > 0}, r"per group: .* of torch\.bool"),
        ({"beta": torch.ones(2)}, r"beta of loss 'plad_ranking' must be one .* shape \(2,\)"),
        ({"beta": torch.tensor(math.inf)}, "beta of loss 'plad_ranking' must be a finite number"),
        ({"loss": "dpo", **REFERENCE, "f_alpha": math.nan}, "f_alpha of loss 'dpo' must be a fin"),
        ({"sft_weight": math.inf}, "sft_weight must not be negative, and must be finite"),
        ({"group_size": True}, "group_size must be a whole number"),
        ({"group_size": 10**6 + 1, "loss": "plad_listwise"}, "do not form groups of 1000001"),
        ({"num_groups": math.nan}, "num_groups must not be negative or infinite, got nan"),
        ({"scores": [0.0] * 4}, "scores must be a tensor"),
        ({"loss": "kto", **REFERENCE, "kl": torch.ones(2)}, r"one number, got .* shape \(2,\)"),
        ({"loss": "kto", **REFERENCE, "kl": 0, "group_size": 1}, "kto needs scores for groups of"),
        (
            {"loss": "kto", **REFERENCE, "kl": 0, "desirable_weight": -1},
            "desirable_weight .* got -1",
        ),
        (mixture({}), "parts must be like"),
        (mixture({"dpo": 0.5}), r"parts\['dpo'\] must map names of options to values, got 0.5"),
        (mixture({"dpo2": {}}), "unknown loss 'dpo2'"),
        (mixture({"dpo": {"weight": -1}}), "the weight of 'dpo' in parts .* got -1"),
        (mixture({"dpo": {"weight": "1"}}), "the weight of 'dpo' in parts must be a number"),
        (mixture({"dpo": {"beta": "1"}}), "beta of loss 'dpo' must be a number, got '1'"),
        (mixture({"dpo": {"beta": math.inf}}), "beta of loss 'dpo' must be a finite number"),
        (mixture({losses.dpo: {}}), "parts must name registered losses"),
        (
            mixture({"dpo": {"tau": 1}}),
            "option 'tau'; it has: weight, length_normalization, beta",
        ),
        (mixture({"kto": {}}), "loss 'kto' needs the option kl"),
        (mixture({"dpo": {"length_normalization": -1}}), "must be at least 0 and finite, got -1"),
        (mixture({"ipo": {"length_normalization": 0}}), "'ipo' in parts takes no length_normal"),
        ({"loss": "mixture", "parts": {"cpo": {}, "dpo": {}}}, "'mixture' needs reference_logps"),
        (mixture({"sft": {}}), "'sft' is a mean over tokens .*; set sft_weight"),
        (mixture({"plad_margin": {}}), "'plad_margin' needs scores"),
        (mixture({"mixture": {}}), "parts of a mixture cannot be mixtures"),
    ],
)
def test_refusals_say_what_was_wrong(options, message):
    with pytest.raises(UsageError, match=message):
        preference_loss(torch.zeros(4), torch.ones(4).long(), **options)


def test_an_option_may_have_the_name_of_an_argument_inside():
    def loss(logps, *, device=0.0, has_scores=0.0):
        return logps[:, 0] * 0 + device + has_scores

    found = preference_loss(
        torch.zeros(4), torch.ones(4).long(), loss=loss, device=1.0, has_scores=0.5
    )
    assert found == 1.5


def test_a_function_is_probed_once_with_its_options():
    calls = []

    def loss(logps, *, beta=1.0):
        calls.append(len(logps))
        return beta * logps.sum(1)

    def value(**options):
        return preference_loss(torch.zeros(6), torch.ones(6).long(), loss=loss, **options)

    for options in ({}, {}, {"beta": 2.0}, {"beta": 2.0}, {"beta": 2}, {"group_size": 3}, {}):
        value(**options)
    probe = [2, 1, 1]
    assert calls == [*probe, 3, 3, *probe, 3, 3, *probe, 3, *probe, 2, 3]
    with pytest.raises(UsageError, match="one number per group"):
        preference_loss(torch.zeros(2), torch.ones(2).long(), loss=lambda logps: logps)


def test_nested_options_and_partials_are_probed_once_too():
    """A mixture's parts, and what binds a number or a tensor () of another value at every step."""
    calls = []

    def loss(logps, *, parts=None, scale=1.0):
        calls.append(len(logps))
        return scale * logps.sum(1)

    def value(loss=loss, **options):
        return preference_loss(torch.zeros(6), torch.ones(6).long(), loss=loss, **options)

    def new():
        found = list(calls)
        calls.clear()
        return found

    probe = [2, 1, 1]
    for parts in ({"a": {"weight": 1.0}}, {"a": {"weight": 2.0}}, {"a": {"names": ["b"]}}):
        value(parts=parts)
        assert new() == [*probe, 3]
        value(parts=copy.deepcopy(parts))
        assert new() == [3]
    for bound in ({"scale": 2.0}, {"scale": torch.tensor(2.0)}, {"parts": {"a": 1}}):
        value(functools.partial(loss, **bound))
        assert new() == [*probe, 3]
        value(functools.partial(loss, **bound))
        assert new() == [3]
    value(functools.partial(loss, scale=torch.tensor(3.0)))
    assert new() == [3]
    # What may change under the same name is probed every time.
    for _ in range(2):
        value(functools.partial(loss, parts={"a": object()}))
        assert new() == [*probe, 3]


def test_what_a_loss_returns_is_looked_at_in_every_call():
    """It is probed once, and may change with what it looks up."""
    dims = [1]

    def loss(logps):
        return logps.sum(dims)

    preference_loss(torch.zeros(4), torch.ones(4).long(), loss=loss)
    dims.append(0)
    with pytest.raises(UsageError, match=r"for 2 groups the shape \(2,\), got \(\) of"):
        preference_loss(torch.zeros(4), torch.ones(4).long(), loss=loss)
