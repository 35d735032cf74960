"""`plad-fast`: the recipe and its stages on the command line.

Exit status: 0 done, 1 unexpected failure, 2 bad input or a full disk, 75 ended by SIGTERM or
SIGHUP, 130 ended by Ctrl-C. After the last two the same command goes on from where it was.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from plad_fast.checks import shown
from plad_fast.data.files import disk_advice
from plad_fast.errors import UsageError
from plad_fast.recipe.arguments import COMMANDS, QUICKSTART_SHARES, given_settings, parse_command
from plad_fast.recipe.search import TuneConfig
from plad_fast.recipe.settings import DistillConfig
from plad_fast.training.signals import Terminated, raised_signals

_OVERWRITE = "--overwrite"
_FAILURE_LOG = "plad-fast-error.log"
_NEEDED = ("transformers", "datasets", "accelerate")
_INTERRUPTED = 130
_TERMINATED = 75  # EX_TEMPFAIL of sysexits.h: run it again


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; no exception leaves this function."""
    arguments = parse_command(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("plad_fast").setLevel(logging.INFO if arguments.verbose else logging.WARNING)
    try:
        with raised_signals(lambda number: _ended_by(number, arguments)):
            _run(arguments)
            sys.stdout.flush()  # a reader that has gone is noticed here rather than at exit
    except UsageError as error:
        return _fail(2, str(error))
    except Terminated as ended:
        return _ended_by(ended.number, arguments)
    except KeyboardInterrupt:
        return _ended_by(signal.SIGINT, arguments)
    except BrokenPipeError:
        return _broken_pipe()
    except Exception as error:
        advice = disk_advice(error)
        if advice is not None:
            # What libraries say of it need not sound like a file, nor be one line.
            first = next(iter(str(error).splitlines()), "")
            what = first if isinstance(error, OSError) else f"cannot write a file: {first}"
            again = _again(arguments)
            return _fail(2, f"{what}; what was finished is kept: {advice} and {again}")
        if isinstance(error, OSError):
            return _fail(2, str(error))
        return _unexpected(error, getattr(arguments, "output_dir", None))
    return 0


def _run(arguments: Namespace) -> None:
    """Libraries that take a while to load are loaded once the settings are known to be right."""
    name = arguments.command
    if name == "doctor":
        from plad_fast.recipe.doctor import diagnose

        print(diagnose())
        return
    given = {**COMMANDS[name].defaults, **given_settings(arguments)}
    overwrite = arguments.overwrite
    if name == "train":
        _quiet_libraries()
        from plad_fast.recipe.stages import train_on_pairs

        train_on_pairs(given.pop("model"), given.pop("pairs"), overwrite=overwrite, **given)
        return
    if name == "evaluate":
        students, pairs = _students(given.pop("student")), given.pop("pairs")
        _quiet_libraries()
        from plad_fast.recipe.evaluate import evaluate_on_pairs

        config = DistillConfig(**given)
        evaluate_on_pairs(students, pairs, config, overwrite=overwrite, command=_command())
        return
    plan = {
        field.name: given.pop(field.name) for field in fields(TuneConfig) if field.name in given
    }
    config = DistillConfig(**given)
    _quiet_libraries()
    if name == "tune":
        from plad_fast.recipe.tune import tune

        tune(config, TuneConfig(**plan), fixed=given.keys(), overwrite=overwrite)
    elif name == "pairs":
        from plad_fast.recipe.stages import pair_models

        pair_models(config, overwrite=overwrite)
    else:
        from plad_fast.recipe.distillation import distill

        options = {"shares": QUICKSTART_SHARES} if name == "quickstart" else {}
        distill(config, overwrite=overwrite, command=_command(), **options)


def _students(given: Any) -> dict[str, str]:
    """Names and places of students: NAME=PATH, from a file also a list of them or a mapping."""
    if isinstance(given, dict):
        given = [f"{n}={path if isinstance(path, str) else ''}" for n, path in given.items()]
    students: dict[str, str] = {}
    for text in given if isinstance(given, list) else [given]:
        name, equals, path = text.partition("=") if isinstance(text, str) else ("", "", "")
        if not (name and equals and path) or name in students:
            raise UsageError(
                f"--student {text if isinstance(text, str) else shown(text)} must be NAME=PATH, "
                "with a name of its own, such as SFT=runs/sft"
            )
        students[name] = os.path.expanduser(path)
    return students


def _quiet_libraries() -> None:
    """Keep the progress bars of the work, and leave out those of loading and saving files."""
    from plad_fast.recipe.doctor import require_packages

    require_packages(*_NEEDED)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _command() -> str:
    """What was typed, less --overwrite: who types it again does not want to lose the results."""
    return shlex.join(["plad-fast", *(part for part in sys.argv[1:] if part != _OVERWRITE)])


def _again(arguments: Namespace) -> str:
    """How to go on from where a command ended."""
    anew = getattr(arguments, "overwrite", False)
    without = f" without {_OVERWRITE}, which would start anew" if anew else ""
    return f"run the same command again{without}"


def _ended_by(number: int, arguments: Namespace) -> int:
    by_hand = number == signal.SIGINT
    what = "interrupted" if by_hand else f"ended by {signal.Signals(number).name}"
    return _fail(
        _INTERRUPTED if by_hand else _TERMINATED,
        f"{what}; what was finished is kept: {_again(arguments)} to go on",
    )


def _fail(status: int, message: str) -> int:
    print(f"plad-fast: error: {message}", file=sys.stderr)
    return status


def _broken_pipe() -> int:
    """The reader of our output has gone, `| head` for example: nobody is left to tell."""
    # Python would write what is still buffered when it exits, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _unexpected(error: Exception, output_dir: str | None) -> int:
    """A defect of ours, or of a library: one line for the reader, the traceback in a file."""
    folder = Path(output_dir).expanduser() if output_dir is not None else Path()
    # In an empty folder the file would be the first, and the folder no longer fit for a run.
    has_begun = folder.is_dir() and any(folder.iterdir())
    file = (folder if has_begun else Path()) / _FAILURE_LOG
    try:
        file.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
        place = f"the traceback is in {file}"
    except OSError as failure:
        place = f"the traceback could not be written to {file} ({failure.strerror})"
    first = next(iter(str(error).strip().splitlines()), "")
    return _fail(1, f"unexpected {type(error).__name__}: {first}; {place}")
