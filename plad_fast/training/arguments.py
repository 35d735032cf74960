"""Settings of `PLaDConfig`, and so of `transformers.TrainingArguments`, given by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from fnmatch import fnmatch
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from plad_fast.errors import UsageError, located, reported_as
from plad_fast.training.config import PLaDConfig
from plad_fast.training.setting_names import advice, spellings

_SHOWN = 3  # close names of a wrong one
# What is logged, where, and how much of it is shown: no weight depends on these.
_FREE = ("report_to", "run_name", "project", "trackio_*", "log_*", "logging_*", "disable_tqdm")

# Names on which what is made depends.
_OF_OPTIMIZER = ("optim*", "adam_*")
_OF_SCHEDULER = ("lr_scheduler_*",)
_STEPS = 1000  # of the schedule that is tried out
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Instead of a line of usage and the end of the process."""
        message = re.sub(r"^argument --(\w+)(/--[\w-]+)?", r"\1", message)
        message = re.sub(r"(invalid choice: '(.*)') \(choose from (.*)\)$", _few_choices, message)
        raise UsageError(f"--training {message}")


def _few_choices(refusal: re.Match[str]) -> str:
    """The message of a refused value with the close ones in place of forty."""
    what, value, listed = refusal.groups()
    hints = [*_close(value, re.findall(r"\w+", listed)), "see transformers.TrainingArguments"]
    return "; ".join([what, *hints])


def _close(name: str, known: Sequence[str]) -> list[str]:
    """A question that names the few that may be meant, by the whole or a word of them, or none."""
    words = {one: (one, *one.split("_")) for one in known}
    every = dict.fromkeys(word for some in words.values() for word in some)
    found = [
        one
        for word in difflib.get_close_matches(name, every, _SHOWN)
        for one in known
        if word in words[one]
    ]
    close = [*dict.fromkeys(found)][:_SHOWN]
    return [f"did you mean {' or '.join(close)}?"] if close else []


def training_arguments(
    given: Mapping[str, Any] | None, *, evaluates: bool = False
) -> dict[str, Any]:
    """Settings by the names of `PLaDConfig`, in their types.

    Args:
        given: values as YAML has them; None leaves a setting as it is.
        evaluates: whether the training has evaluations, which some schedules need.

    Raises:
        UsageError: no such setting, or a value that it does not take; one that a flag sets, or that
            the commands decide themselves; a package that an optimizer or `report_to` needs.
    """
    texts = {name: value for name, value in (given or {}).items() if value is not None}
    if not texts:
        return {}
    known = [field.name for field in fields(PLaDConfig) if field.init]
    for name in texts:
        if name in known and (instead := advice(name)) is not None:
            raise UsageError(f"--training {name}: {instead}")
        if name not in known:
            if ours := spellings(name):
                raise UsageError(f"--training {name}: use {' or '.join(ours)}")
            free = [one for one in known if advice(one) is None]
            where = "see transformers.TrainingArguments and plad_fast.training.PLaDConfig"
            hints = "; ".join([*_close(name, free), where])
            raise UsageError(f"--training {name}: no such setting of the trainer; {hints}")
    # Lists and mappings are as the trainer wants them, but for the numbers in them.
    plain = {name: v for name, v in texts.items() if not isinstance(v, (list, dict))}
    words = [f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in plain.items()]
    parsed = _Parser(PLaDConfig, allow_abbrev=False).parse_args(["--output_dir=-", *words])
    settings = {n: getattr(parsed, n) if n in plain else _numbers(texts[n]) for n in texts}
    _try_out(settings, {"eval_strategy": "steps", "eval_steps": 1} if evaluates else {})
    return settings


def _numbers(value: Any) -> Any:
    """With numbers in place of texts such as 1e-7, which YAML reads as text for want of a dot."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    is_number = isinstance(value, str) and _EXPONENT.fullmatch(value)
    return float(value) if is_number else value


def _try_out(settings: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Finds out at once what a trainer would refuse once its model and data are loaded."""
    with _refused(settings, ("*",)):
        with located("--training"):
            # Some schedules end at a rate that has to be below the first one, which a flag sets.
            config = PLaDConfig("-", use_cpu=True, learning_rate=1.0, **settings, **others)
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    # These two make optimizers of parts of a model, which is not there yet.
    if not config.optim_target_modules:
        with _refused(settings, _OF_OPTIMIZER):
            kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
            if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
                kind(parameters, **options)
    with _refused(settings, _OF_SCHEDULER):
        optimizer = torch.optim.SGD(parameters, lr=config.learning_rate)
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )


def _refused(settings: Mapping[str, Any], names: Sequence[str]) -> AbstractContextManager[None]:
    """Turns what a library raises into a line with the settings of these names."""
    listed = [f"{k}={v}" for k, v in settings.items() if any(fnmatch(k, name) for name in names)]
    return reported_as(f"--training {' '.join(listed)}: the trainer does not take it")


def of_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those on which weights may depend."""
    return {k: v for k, v in settings.items() if not any(fnmatch(k, free) for free in _FREE)}
