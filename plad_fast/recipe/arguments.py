"""The commands with their flags, and the settings that a command line asks for."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from plad_fast import __version__
from plad_fast.checks import listed
from plad_fast.recipe.fields import flag
from plad_fast.recipe.search import TuneConfig
from plad_fast.recipe.settings import SELECTION, DistillConfig, TrainConfig
from plad_fast.recipe.settings_file import FIELDS, coerce, load_settings
from plad_fast.training.setting_names import advice, spellings

_EPILOG = """\
`plad-fast COMMAND --help` lists a command's settings. To begin with, run
`plad-fast quickstart`: the whole recipe, on built-in prompts.

exit status:
  0    done
  1    unexpected failure
  2    bad input, or a disk that is full or refuses to be written
  75   ended by SIGTERM or SIGHUP
  130  ended by Ctrl-C

After 75 and 130 the same command goes on from where it was: a training saves a
checkpoint at the end of its step. A second signal ends it at once.
"""

_OF_DISTILL, _OF_TRAIN, _OF_TUNING = (
    tuple(field.name for field in dataclasses.fields(of))
    for of in (DistillConfig, TrainConfig, TuneConfig)
)
_GENERATION = ("max_new_tokens", "student_temperature", "top_p", "generation_batch_size")
_PROMPTS = ("prompts", "prompt_column", "prompt_template", "reference_column", "split", "limit")
_ENDPOINT = (
    *("base_url", "api_key_env", "concurrency", "request_timeout"),
    *("reasoning_tokens", "token_budget", "cost_budget", "price_in", "price_out"),
)
_ENGINE = ("engine", "actors", "gpus_per_actor")
_SELECTION = ("teacher_samples", "student_samples", *SELECTION)
_LOSS = ("beta", "loss_args", "sft_weight", "length_normalization", "rank_end_token", "batch_size")
_RESOURCES = (
    *("micro_batch_size", "max_tokens_per_batch", "max_length", "gradient_checkpointing"),
    *("precision", "saves_per_stage"),
)
_ADAPTERS = (
    "lora_r", "lora_alpha", "lora_targets", "lora_dropout", "load_in_4bit", "merge",
)  # fmt: skip
_EVALUATION = ("eval_scorer", "calibration_samples")
# Of `--help`, in this order.
_GROUPS = {
    "search": _OF_TUNING,
    "models and seed": ("output_dir", "teacher", "student", "student_layers", "seed"),
    "data": (*_PROMPTS, "part_size", "held_out", "validation", "sft_share"),
    "answers": ("teacher_temperature", *_GENERATION, "rejected_from", *_ENGINE),
    "scores and pairs": _SELECTION,
    "fine-tuning": ("sft_epochs", "sft_learning_rate", "sft_batch_size"),
    "loss and optimizer": (
        *("rounds", "loss", "epochs", "learning_rate", *_LOSS, "patience", "training"),
    ),
    "adapters": _ADAPTERS,
    "evaluation": (*_EVALUATION, "eval_pairs", "eval_split", "eval_steps", "metric_for_best_model"),
    "publishing": ("push_to_hub",),
    "memory, precision, checkpoints": (*_RESOURCES, "tokens_on_disk"),
    "teacher or judge by endpoint": (*_ENDPOINT, "batch"),
}
_METAVARS = {"output_dir": "DIR", "pairs": "FILE", "search": "NAME=VALUES"}
# Given several times as flags, and as they stand there in a file.
_LISTED = {("evaluate", "student"), ("tune", "search")}
_OF_TYPES = {
    "int": "N", "float": "X", "str": "TEXT", "bool": "true|false", "Mapping": "KEY=VALUE",
}  # fmt: skip
_CLOSE = 0.75  # to be taken for a flag: of all letters, those that agree
_OF_MODEL = "hub id, folder or .gguf file, or offline"


@dataclass(frozen=True)
class Command:
    """A command and its settings, which are those of `DistillConfig` where it says nothing else."""

    text: str
    settings: Sequence[str] = ()
    needs: Sequence[str] = ()
    """Settings without a default."""
    help: Mapping[str, str] = field(default_factory=dict)
    """Of settings that mean something else than in `distill`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults other than those of `distill`."""
    overwrite: str = ""
    """Help of the flag, which a command without a folder lacks."""


# The answers are written ones; the numbers are for four minutes on two CPU cores.
_QUICKSTART = {
    "teacher": "column:answer",
    "student": "offline",
    "prompts": "builtin:calendar",
    "limit": 164,
    "held_out": 48,
    "validation": 12,
    "sft_share": 0.231,
    "max_new_tokens": 40,
    "lora_r": 16,
    "sft_learning_rate": 2e-3,
    "epochs": 1.0,
    "sft_weight": 3.0,
    "learning_rate": 1e-3,
    "batch_size": 8,
    "saves_per_stage": 1,
    "generation_batch_size": 64,
}
QUICKSTART_SHARES = {
    "student": 0.07,
    "fine-tuning": 0.12,
    "student's samples": 0.2,
    "preference training": 0.28,
    "evaluation": 0.33,
}
"""Of its time; what is not listed takes none."""
_EMPTY_FIRST = "empty the folder of an earlier run first"

COMMANDS = {
    "distill": Command(
        "The whole recipe: fine-tune, build pairs, train on them, evaluate.",
        settings=_OF_DISTILL,
        overwrite=_EMPTY_FIRST,
    ),
    "tune": Command(
        "Search settings of pairs and preference training by validation prompts, for `distill`.",
        settings=tuple(
            name for name in (*_OF_TUNING, *_OF_DISTILL) if name not in ("rounds", "push_to_hub")
        ),
        overwrite=_EMPTY_FIRST,
    ),
    "quickstart": Command(
        "`distill` offline: SmolLM2-135M learns to make calendar entries of messages.",
        settings=("output_dir", "seed", "precision"),
        defaults={"output_dir": "runs/quickstart", **_QUICKSTART},
        overwrite=_EMPTY_FIRST,
    ),
    "pairs": Command(
        "Answer prompts with two models and write preference pairs.",
        needs=("teacher", "student", "output_dir"),
        settings=(
            *(*_PROMPTS, "part_size", "teacher_temperature", *_GENERATION, "seed", "precision"),
            *(*_ENGINE, *_SELECTION, *_ENDPOINT, "batch"),
        ),
        help={
            "teacher": f"{_OF_MODEL}, openai:MODEL, vllm:MODEL, column:NAME, or "
            "python:MODULE.FUNCTION; repeat the flag for several, of which the scorer decides",
            "student": _OF_MODEL,
            "output_dir": "folder for pairs.jsonl, dropped.jsonl and the answers",
            "seed": "random seed of sampling",
        },
        overwrite=_EMPTY_FIRST,
    ),
    "train": Command(
        "Train a model on preference pairs, or fine-tune on their chosen responses.",
        needs=("model", "pairs", "output_dir"),
        settings=(
            *("loss", "epochs", "learning_rate", *_LOSS, *_RESOURCES, "seed", "training"),
            *(*_ADAPTERS, *_OF_TRAIN, "split", "push_to_hub"),
        ),
        help={
            "model": f"{_OF_MODEL}; PEFT adapters are merged into their base first",
            "pairs": "JSONL, JSON, CSV, Parquet or hub dataset of prompt, chosen, rejected",
            "split": "split of --pairs, where these are a hub dataset",
            "output_dir": "folder to make for the trained model",
            "loss": "preference loss, or sft to fine-tune on the chosen responses alone; "
            "`plad-fast doctor` lists the losses",
            "learning_rate": "peak learning rate; a tenth of the steps rises to it, then it falls "
            "linearly to 0",
            "batch_size": "number of pairs per optimizer step",
            "seed": "random seed of the order of the pairs and of dropout",
        },
        defaults={"epochs": 1.0, "learning_rate": 2e-5},
        overwrite="remove a model that was trained into the folder first",
    ),
    "evaluate": Command(
        "Compare students on held-out pairs; write a report.",
        needs=("student", "pairs", "output_dir"),
        settings=(
            *("length_normalization", *_GENERATION, "seed", "max_length", "precision"),
            *("reasoning", *_EVALUATION, *_ENDPOINT),
        ),
        help={
            "reasoning": "reasoning before an answer: keep compares it too, drop and column do not",
            "student": "a student and its folder; repeat: the first is the baseline, the last the "
            "one that the report is about; in a --config file `student: {NAME: PATH}`",
            "pairs": "held-out pairs of prompt, chosen, rejected, in files as train takes",
            "output_dir": "folder for metrics.json, report.html",
            "seed": "random seed of sampling",
            "max_new_tokens": "maximum length of an answer in tokens",
            "student_temperature": "temperature of the students' samples",
            "length_normalization": "alpha of s(y) / |y|**alpha: 1 ranks by nat per token "
            "(default: 1)",
        },
        overwrite=_EMPTY_FIRST,
    ),
    "doctor": Command("Versions, devices, and which backend would be used and why."),
}


def parse_command(typed: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, with its name as `command` and its parser as `parser`. Exits with
    status 2 and a line of usage for what is mistyped."""
    parser, commands = _parsers()
    if not typed:
        parser.error(f"a command is missing; there are {', '.join(commands)}")
    if typed[0] not in (*commands, "-h", "--help", "--version"):
        _refuse_command(parser, typed)
    arguments, unknown = parser.parse_known_args(typed)
    if unknown:
        commands[typed[0]].error(_unrecognized(unknown, typed[0], commands))
    return arguments


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings in flags or else in the file of --config, in their types; UsageError as
    `load_settings`. Exits with status 2 where one that the command needs is missing."""
    name, command = arguments.command, COMMANDS[arguments.command]
    known = (*command.needs, *command.settings)
    raw = [setting for of, setting in _LISTED if of == name]
    settings = {}
    if getattr(arguments, "config", None):
        settings = load_settings(arguments.config, known, command=name, raw=raw)
    for key, text in vars(arguments).items():
        if key == "prompt_template":
            text = _unescape(text)
        if key in known:
            value = text if key in raw else coerce(key, text, flag(key))
            both = isinstance(value, dict) and key in settings
            settings[key] = {**settings[key], **value} if both else value
    if missing := [flag(need) for need in command.needs if need not in settings]:
        arguments.parser.error(f"{name} needs {listed(missing)}, as flags or in --config")
    return settings


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of everything, and those of the commands by their names."""
    parser = argparse.ArgumentParser(
        prog="plad-fast",
        allow_abbrev=False,
        usage="plad-fast COMMAND [settings]",
        description="Distil a large language model into a small one from its text alone.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"plad-fast {__version__}")
    added = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND [settings]")
    for name, command in COMMANDS.items():
        usage = [f"{flag(need)} {_metavar(name, need)}" for need in command.needs]
        of_command = added.add_parser(
            name,
            help=command.text,
            description=command.text,
            allow_abbrev=False,
            prog=f"plad-fast {name}",
            usage=" ".join(["plad-fast", name, *usage, "[settings]"]),
        )
        of_command.set_defaults(parser=of_command)
        _add_flags(of_command, name, command)
    return parser, added.choices


def _metavar(command: str, name: str, kind: str = "") -> str:
    if (command, name) == ("evaluate", "student"):
        return "NAME=PATH"
    return _METAVARS.get(name) or _OF_TYPES.get(kind) or name.upper()


def _add_flags(parser: argparse.ArgumentParser, name: str, command: Command) -> None:
    """What is not given of the settings stays out of the result."""
    parser.add_argument("--verbose", action="store_true", help="log decisions, such as the backend")
    if command.needs or command.settings:
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file with these settings; flags win"
        )
    if command.overwrite:
        parser.add_argument("--overwrite", action="store_true", help=command.overwrite)
    for need in command.needs:
        parser.add_argument(
            flag(need),
            action=_action(name, need),
            default=argparse.SUPPRESS,
            metavar=_metavar(name, need),
            help=command.help[need],
        )
    for title, members in _GROUPS.items():
        wanted = [FIELDS[member] for member in members if member in command.settings]
        group = parser.add_argument_group(title) if wanted else parser
        for of_field in wanted:
            default = command.defaults.get(of_field.name, of_field.default)
            text = command.help.get(of_field.name, of_field.metadata["help"])
            text += "" if default is None else f" (default: {default})"
            kind = str(of_field.type).partition(" ")[0].partition("[")[0]
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if kind == "bool" else {}
            group.add_argument(
                flag(of_field.name),
                default=argparse.SUPPRESS,
                metavar=_metavar(name, of_field.name, kind),
                help=text.replace("%", "%%"),
                action=_action(name, of_field.name),
                **switch,
            )


def _action(command: str, setting: str) -> str:
    """Of a flag: a setting that may be several takes it more than once."""
    kind = str(FIELDS[setting].type) if setting in FIELDS else ""
    is_list = (command, setting) in _LISTED or kind.startswith(("str | tuple", "Mapping"))
    return "append" if is_list else "store"


def _unescape(text: str) -> str:
    r"""A line break for \n, which a shell makes hard to type; \\n stays a backslash and an n."""
    return re.sub(r"(\\?)\\n", lambda found: r"\n" if found[1] else "\n", text)


def _refuse_command(parser: argparse.ArgumentParser, typed: Sequence[str]) -> NoReturn:
    every = f"there are {', '.join(COMMANDS)}"
    if typed[0].startswith("-"):
        named = next((word for word in typed if word in COMMANDS), None)
        hint = f"plad-fast {named} ..., then its flags" if named else every
        parser.error(f"{typed[0]} stands where the command belongs: {hint}")
    close = difflib.get_close_matches(typed[0].lower(), COMMANDS, n=1)
    parser.error(f"unknown command {typed[0]!r}; {f'did you mean {close[0]}?' if close else every}")


def _unrecognized(
    unknown: Sequence[str], command: str, commands: Mapping[str, argparse.ArgumentParser]
) -> str:
    flags = {name: list(parser._option_string_actions) for name, parser in commands.items()}
    hints = []
    for word in unknown:
        if word.startswith("-") and word.lstrip("-")[:1].isalpha():
            name = word.partition("=")[0].lstrip("-").replace("-", "_").lower()
            hints += _meant(name, command, flags)
    if not hints and "=" in unknown[0] and "--training" in flags[command]:
        hints.append("repeat --training for each KEY=VALUE")
    if not hints and unknown[0].endswith((".yaml", ".yml")) and "--config" in flags[command]:
        hints.append(f"did you mean --config {unknown[0]}?")
    if not hints and not unknown[0].startswith("-"):
        hints.append("a value with spaces needs quotes")
    hints = hints or [f"plad-fast {command} --help lists the flags"]
    return "; ".join([f"unrecognized arguments: {' '.join(unknown)}", *dict.fromkeys(hints)])


def _meant(name: str, command: str, flags: Mapping[str, Sequence[str]]) -> list[str]:
    """A hint at the flag of a name that the command does not know, or none."""
    spelled = [(text, text.split()[0]) for text in (flag(name), *spellings(name))]
    for text, first in spelled:
        if first in flags[command]:
            return [f"did you mean {text}?"]
    for _, first in spelled:
        if others := [other for other in flags if first in flags[other]]:
            return [f"{first} is a flag of {listed(others)}, not of {command}"]
    own = {option.lstrip("-"): option for option in flags[command]}
    if close := difflib.get_close_matches(name.replace("_", "-"), own, n=1, cutoff=_CLOSE):
        return [f"did you mean {own[close[0]]}?"]
    instead = advice(name) if "--training" in flags[command] else None
    return [f"{flag(name)}: {instead}"] if instead else []
