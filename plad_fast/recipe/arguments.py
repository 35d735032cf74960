"""What was typed after `plad-fast`, with more help than argparse gives for what is mistyped."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import NoReturn

_BEFORE_A_COMMAND = ("-h", "--help", "--version")


def parse_command(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    typed: Sequence[str],
) -> argparse.Namespace:
    """The arguments of a command. Exits with status 2 and its usage for what is none.

    Args:
        parser: of everything.
        commands: the parsers that it has, by name.
        typed: without the program's name.
    """
    if not typed:
        parser.error(f"a command is missing; there are {', '.join(commands)}")
    first = typed[0]
    if first not in commands and first not in _BEFORE_A_COMMAND:
        _refuse_command(parser, commands, typed)
    arguments, unknown = parser.parse_known_args(typed)
    if unknown:
        commands[first].error(_unrecognized(unknown, first, commands))
    return arguments


def listed(names: Sequence[str]) -> str:
    """Such as "--model, --pairs and --output-dir"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _refuse_command(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    typed: Sequence[str],
) -> NoReturn:
    named = next((word for word in typed if word in commands), None)
    if typed[0].startswith("-"):
        hint = f"plad-fast {named} ..." if named else f"one of {', '.join(commands)}"
        parser.error(f"{typed[0]} stands where the command belongs: {hint}, then its flags")
    close = difflib.get_close_matches(typed[0].lower(), commands, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(commands)}"
    parser.error(f"unknown command {typed[0]!r}; {hint}")


def _unrecognized(
    unknown: Sequence[str], command: str, commands: Mapping[str, argparse.ArgumentParser]
) -> str:
    hints = []
    known = _flags(commands[command])
    flags = [word.partition("=")[0] for word in unknown if word.lstrip("-")[:1].isalpha()]
    for name in (word for word in flags if word.startswith("-")):
        spelt = "--" + name.lstrip("-").replace("_", "-").lower()
        others = [other for other, parser in commands.items() if spelt in _flags(parser)]
        if close := difflib.get_close_matches(spelt, known, n=1):
            hints.append(f"did you mean {close[0]}?")
        elif others:
            hints.append(f"{spelt} is a flag of {listed(others)}, not of {command}")
    if not hints and not unknown[0].startswith("-"):
        hints.append("a value with spaces needs quotes")
    hints = hints or [f"plad-fast {command} --help lists the flags"]
    return "; ".join([f"unrecognized arguments: {' '.join(unknown)}", *dict.fromkeys(hints)])


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]
