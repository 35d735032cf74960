"""Every option of TRL's preference losses works here or is refused by name."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from plad_fast import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.registry import get_loss
from plad_fast.losses.terms import F_DIVERGENCES
from plad_fast.losses.trl_options import (
    CPO_LOSSES,
    DPO_LOSSES,
    KTO_LOSSES,
    REFUSED_DPO_LOSSES,
    translate_cpo,
    translate_dpo,
    translate_kto,
    translate_orpo,
)

SMOOTHED = {"robust": 0.1, "exo_pair": 0.1}


def test_every_translation_is_of_a_loss_that_takes_its_options():
    translated = [
        *(
            translate_dpo({"loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0)})
            for name in DPO_LOSSES
        ),
        *(translate_dpo({"f_divergence_type": name}) for name in F_DIVERGENCES),
        translate_dpo({"loss_type": ["sigmoid", "bco_pair"], "beta": 0.3}),
        translate_dpo({"loss_type": ["sft"]}),
        *(translate_cpo({"loss_type": name}) for name in (*CPO_LOSSES, "alphapo")),
        translate_orpo({"beta": 0.2}),
        translate_kto({"loss_type": "apo_zero_unpaired"}),
    ]
    for loss, options, sft_weight in translated:
        Objective.bind(
            *(loss,),
            **{"group_size": 2, "has_scores": True, "has_reference": True},
            **{"sft_weight": sft_weight, "options": options},
        )


def test_defaults_are_trls():
    """What is not given has TRL's default; ours may differ."""
    assert translate_dpo({}) == ("dpo", {"beta": 0.1}, 0.0)
    assert translate_dpo({"ld_alpha": 1.0, "use_weighting": False}) == translate_dpo({})
    assert translate_cpo({})[2] == translate_orpo({})[2] == 1.0
    assert translate_cpo({"loss_type": "simpo"})[1]["gamma"] == 0.5
    assert translate_cpo({"loss_type": "alphapo", "alpha": 0.25})[2] == 0.0
    assert translate_cpo({"loss_type": "alphapo", "cpo_alpha": 0.0})[2] == 0.0  # as TRL sets it
    assert translate_dpo({"loss_type": "sft", "beta": 0.3}) == ("sft", {}, 0.0)
    assert get_loss("kto").options.keys() - translate_kto({})[1].keys() == {"kl"}
    pytest.importorskip("trl")
    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    for config, translate, names in (
        (DPOConfig, translate_dpo, ["beta", "loss_weights", "label_smoothing", "discopop_tau"]),
        (DPOConfig, translate_dpo, ["f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"]),
        (CPOConfig, translate_cpo, ["beta", "loss_type", "cpo_alpha", "simpo_gamma", "alpha"]),
        (ORPOConfig, translate_orpo, ["beta"]),
        (KTOConfig, translate_kto, ["beta", "loss_type", "desirable_weight", "undesirable_weight"]),
    ):
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        assert translate({name: defaults[name] for name in names}) == translate({})


def test_no_loss_type_of_trl_is_missing_from_the_tables():
    """A new one in a later version has to be given a place."""
    pytest.importorskip("trl")
    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig

    def metadata(config):
        fields = {field.name: field for field in dataclasses.fields(config)}
        return fields["loss_type"].metadata

    listed = re.findall(r"`'(\w+)'`", metadata(DPOConfig)["help"])
    assert set(listed) == {*DPO_LOSSES, *REFUSED_DPO_LOSSES, "sft"}
    assert set(metadata(CPOConfig)["choices"]) == {*CPO_LOSSES, "alphapo"}
    assert set(metadata(KTOConfig)["choices"]) == set(KTO_LOSSES)


NOT_OF_THE_LOSS = {
    # The model and how it runs: the loss's own function does not change.
    *("model_init_kwargs", "trust_remote_code", "disable_dropout", "activation_offloading"),
    *("is_encoder_decoder", "generate_during_eval", "router_aux_loss_coef"),
    # The data.
    *("dataset_num_proc", "max_length", "max_completion_length", "truncation_mode"),
    *("padding_free", "pad_to_multiple_of", "pad_token", "padding_value"),
    # Which model the reference is, and when it is run.
    *("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model"),
    *("ref_model_mixup_alpha", "ref_model_sync_steps"),
}
"""Options of TRL's preference trainers that the translation of a loss is not concerned with."""


def test_every_option_of_trls_configurations_is_known():
    """It is translated, or refused, or none of the loss: a new one has to be given a place."""
    pytest.importorskip("trl")
    from transformers import TrainingArguments
    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    general = {field.name for field in dataclasses.fields(TrainingArguments)}
    seen = set()
    for config, translate in (
        (DPOConfig, translate_dpo),
        (KTOConfig, translate_kto),
        (CPOConfig, translate_cpo),
        (ORPOConfig, translate_orpo),
    ):
        for field in dataclasses.fields(config):
            if field.name in general:
                continue
            seen.add(field.name)
            default = field.default
            if default is dataclasses.MISSING:
                default = field.default_factory()
            if field.name in NOT_OF_THE_LOSS:
                with pytest.raises(UsageError, match=f"{field.name}: not known as an option"):
                    translate({field.name: default})
            else:
                assert translate({field.name: default}) == translate({})
    assert seen >= NOT_OF_THE_LOSS, "TRL has dropped one"


@pytest.mark.parametrize(
    ("translate", "options", "message"),
    [
        (translate_dpo, {"loss_type": None}, "loss_type must be a name or a list of names"),
        (translate_dpo, {"beta": "0.1"}, "beta of loss 'dpo' must be a number"),
        (translate_dpo, {"beta": 0.0}, "beta must be positive .* got 0.0"),
        (translate_dpo, {"loss_weights": [math.inf]}, "loss_weights .* finite, got inf"),
        (
            *(translate_dpo, {"loss_type": "discopop", "discopop_tau": 2.0}),
            r"discopop_tau: tau .* \(0, 1\], got 2.0",
        ),
        (
            *(translate_dpo, {"loss_type": "robust", "label_smoothing": 0.5}),
            r"label_smoothing must lie in \[0, 0.5\), got 0.5",
        ),
        (translate_dpo, {"loss_type": "exo_pair"}, r"label_smoothing must lie in \(0, 0.5\)"),
        (
            translate_cpo,
            {"loss_type": "simpo", "simpo_gamma": -1},
            "simpo_gamma: gamma .* got -1",
        ),
        (translate_cpo, {"alpha": math.nan}, "alpha of loss 'cpo' must be a finite number"),
        (translate_cpo, {"cpo_alpha": "1"}, "cpo_alpha must be a number"),
        (translate_orpo, {"beta": -0.1}, "beta .* at least 0, got -0.1"),
        (translate_kto, {"desirable_weight": -1}, "desirable_weight .* got -1"),
        (translate_dpo, {"loss_type": "aot"}, "loss_type 'aot' does not work here: it sorts"),
        (translate_dpo, {"loss_type": ["sigmoid", "aot_unpaired"]}, "'aot_unpaired' does not work"),
        (translate_dpo, {"loss_type": "kto_pair"}, "unknown loss_type 'kto_pair'; known: sigmoid"),
        (translate_dpo, {"use_weighting": True}, "use_weighting=True does not work here: WPO"),
        (translate_dpo, {"ld_alpha": 0.5}, "ld_alpha=0.5 does not work here: LD-DPO"),
        (translate_dpo, {"ld_alpha": 0.0}, "ld_alpha=0.0 does not work here: LD-DPO"),
        (translate_dpo, {"reference_free": True}, "reference_free=True .* CPOTrainer"),
        (translate_dpo, {"rpo_alpha": 1.0}, "rpo_alpha=1.0 .* loss_weights"),
        (translate_dpo, {"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect in TRL"),
        (translate_dpo, {"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect"),
        (translate_dpo, {"f_alpha_divergence_coef": 2.0}, "f_alpha_divergence_coef=2.0 has no eff"),
        (translate_dpo, {"f_divergence_type": "kl"}, "unknown f_divergence_type 'kl'"),
        (
            *(translate_dpo, {"f_divergence_type": "forward_kl", "loss_type": "bco_pair"}),
            "is valid with the loss types sigmoid, .* not with bco_pair",
        ),
        (translate_dpo, {"loss_weights": [1.0, 2.0]}, "2 loss_weights for 1 loss types"),
        (translate_dpo, {"loss_weights": [-1.0]}, "loss_weights must not be negative"),
        (translate_dpo, {"loss_weights": 0.5}, "loss_weights must be None or a list .* got 0.5"),
        (translate_dpo, {"loss_weights": "1"}, "loss_weights must be None or a list .* got '1'"),
        (
            *(translate_dpo, {"loss_type": ["sft"], "f_divergence_type": "forward_kl"}),
            "f_divergence_type='forward_kl' has no effect .* beside 'sft'; leave it at",
        ),
        (
            translate_dpo,
            {
                **{"loss_type": "sft", "f_divergence_type": "alpha_divergence"},
                "f_alpha_divergence_coef": 2.0,
            },
            "f_divergence_type='alpha_divergence' has no effect",
        ),
        (
            *(translate_dpo, {"loss_type": ["sft"], "f_alpha_divergence_coef": 2.0}),
            "f_alpha_divergence_coef=2.0 has no effect",
        ),
        (
            *(translate_cpo, {"loss_type": "alphapo", "cpo_alpha": 3.0}),
            "cpo_alpha=3.0 has no effect in TRL without a loss_type other than 'alphapo'",
        ),
        (translate_dpo, {"loss_type": ["ipo", "ipo"]}, "loss_type names a loss twice: ipo, ipo"),
        (translate_dpo, {"loss_type": []}, "0 loss_weights for 0 loss types"),
        (translate_dpo, {"loss_type": ["sft"], "loss_weights": [2.0]}, "set the weight to 1"),
        (translate_dpo, {"gamma": 1}, "gamma: not known .* DPOTrainer; known: loss_type"),
        (translate_cpo, {"loss_type": "kto_pair"}, "'kto_pair' is gone from TRL"),
        (translate_cpo, {"loss_type": "aot"}, "unknown loss_type 'aot'; known: sigmoid"),
        (translate_cpo, {"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect in TRL"),
        (translate_cpo, {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 has no"),
        (translate_cpo, {"cpo_alpha": -1.0}, "cpo_alpha must not be negative"),
        (translate_orpo, {"alpha": 1.0}, "alpha: not known .* ORPOTrainer; known: beta"),
        (translate_kto, {"loss_type": "bco"}, "unknown loss_type 'bco'; known: kto, apo_zero_unp"),
    ],
)
def test_refusals_name_the_option(translate, options, message):
    with pytest.raises(UsageError, match=message):
        translate(options)
