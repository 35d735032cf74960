"""The configuration of a training: what it reads, and what it refuses by name."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from transformers import HfArgumentParser

from plad_fast.errors import UsageError
from plad_fast.training.config import PLaDConfig

PARALLEL = SimpleNamespace(non_data_parallel_size=2)  # as with ParallelismConfig(tp_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "nonsense"}, "unknown loss 'nonsense'"),
        ({"beta": -1.0}, "at least 0"),
        ({"loss": "sft", "beta": 1.0}, "no option 'beta'"),
        ({"loss": "sft", "sft_weight": 1.0}, "sft_weight"),
        ({"sft_weight": -1.0}, "sft_weight"),
        ({"length_normalization": -0.5}, "length_normalization"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"sft_weight": math.nan}, "sft_weight must be a finite number"),
        ({"beta": math.nan}, "beta must be a finite number"),
        ({"length_normalization": math.inf}, "length_normalization must be a finite number"),
        ({"max_length": 1}, "max_length"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"impl": "magic"}, "unknown impl 'magic'"),
        ({"scratch_mib": 0}, "scratch_mib"),
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"torch_compile": True}, "model.base_model.compile"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics=.'inputs'.* predictions"),
        ({"include_for_metrics": ["loss"]}, r"include_for_metrics=.'loss'.* predictions"),
        ({"batch_eval_metrics": True}, r"batch_eval_metrics=True .* predictions"),
        ({"parallelism_config": PARALLEL}, "non_data_parallel_size=2 .* parallelism"),
        ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch .* 0"),
        ({"layout": "rows"}, "unknown layout 'rows'"),
        ({"attention": "fast"}, "unknown attention 'fast'"),
        ({"length_column_name": "len"}, "length_column_name='len'"),
    ],
)
def test_bad_settings_are_refused(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        PLaDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_config_is_an_argument_parser_away(tmp_path):
    [config] = HfArgumentParser(PLaDConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--loss", "sft", "--max_length", "99"]
    )
    assert (config.loss, config.max_length, config.beta) == ("sft", 99, None)
    assert config.report_to == []
    assert json.loads(config.to_json_string())["loss"] == "sft"


@pytest.mark.parametrize("name", ["nll", "eval_nll", "eval_dev_nll", "active_pairs"])
def test_the_best_is_the_lowest_of_some_metrics(name, tmp_path):
    def is_greater(**options):
        return PLaDConfig(str(tmp_path), use_cpu=True, **options).greater_is_better

    assert is_greater(metric_for_best_model=name) is False
    assert is_greater(metric_for_best_model=name, greater_is_better=True) is True
    assert is_greater(metric_for_best_model="eval_margin") is True
    assert is_greater(metric_for_best_model="eval_loss") is False
    assert is_greater() is None


def test_options_of_the_loss(tmp_path):
    """As a mapping or, from a command line, as JSON; names that the loss lacks are refused."""
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--loss", "simpo", "--beta", "2"]
    [config] = HfArgumentParser(PLaDConfig).parse_args_into_dataclasses(
        [*line, "--loss_args", '{"gamma": 0.5}']
    )
    assert config.objective(group_size=2).options == {"beta": 2.0, "gamma": 0.5}
    for given, message in (
        ({"gama": 1}, "simpo' has no option 'gama'; it has: beta, gamma"),
        ({"beta": 1}, "set it once"),
        ("gamma=1", "JSON object"),
        ([1], "map names"),
        ({"gamma": -1}, "gamma"),
    ):
        with pytest.raises(UsageError, match=message):
            PLaDConfig(str(tmp_path), use_cpu=True, loss="simpo", beta=2.0, loss_args=given)
