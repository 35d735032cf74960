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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from plad_fast.checks import require_packages, shown
from plad_fast.data.files import disk_advice
from plad_fast.errors import UsageError
from plad_fast.recipe.arguments import COMMANDS, QUICKSTART_SHARES, given_settings, parse_command
from plad_fast.recipe.search import TuneConfig
from plad_fast.recipe.settings import DistillConfig
from plad_fast.training.signals import Terminated, ignore_signals, raised_signals

_OVERWRITE = "--overwrite"
_FAILURE_LOG = "plad-fast-error.log"
_NEEDED = ("transformers", "datasets", "accelerate")
_INTERRUPTED = 130
_TERMINATED = 75  # EX_TEMPFAIL of sysexits.h: run it again


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; no exception leaves this function.

    Of several processes, as `torchrun` starts them, the first one runs it: see
    `plad_fast.models.team`.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    with raised_signals(lambda number: _ended_by(number, typed)):
        try:
            status = _attempt(typed)
        except Terminated as ended:
            status = _ended_by(ended.number, typed)
        except KeyboardInterrupt:
            status = _ended_by(signal.SIGINT, typed)
        if argv is None and status in (_INTERRUPTED, _TERMINATED):
            ignore_signals()  # the process ends now, and libraries may take their time over it
        if _is_one_of_several():
            from plad_fast.models.team import leave

            leave(status)
    return status


def _attempt(typed: Sequence[str]) -> int:
    """Exit status of a command, unless a signal ends it."""
    arguments = None
    try:
        with _led() as leads:
            if leads:
                arguments = parse_command(typed)
                verbosity = logging.INFO if arguments.verbose else logging.WARNING
                logging.getLogger("plad_fast").setLevel(verbosity)
                _run(arguments)
                sys.stdout.flush()  # a reader that has gone is noticed here rather than at exit
    except UsageError as error:
        return _fail(2, str(error))
    except BrokenPipeError:
        return _broken_pipe()
    except Exception as error:
        advice = disk_advice(error)
        if advice is not None:
            # What libraries say of it need not sound like a file, nor be one line.
            first = next(iter(str(error).splitlines()), "")
            what = first if isinstance(error, OSError) else f"cannot write a file: {first}"
            return _fail(2, f"{what}; what was finished is kept: {advice} and {_again(typed)}")
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
    size = given.pop("part_size", None)
    config = DistillConfig(**given)
    _quiet_libraries()
    if name == "tune":
        from plad_fast.recipe.tune import tune

        tune(config, TuneConfig(**plan), fixed=given.keys(), overwrite=overwrite)
    elif name == "pairs":
        from plad_fast.recipe.parts import pair_in_parts
        from plad_fast.recipe.stages import pair_models

        if size is None:
            pair_models(config, overwrite=overwrite)
        else:
            pair_in_parts(config, size, overwrite=overwrite)
    else:
        from plad_fast.recipe.distillation import distill

        options = {"shares": QUICKSTART_SHARES} if name == "quickstart" else {}
        distill(config, overwrite=overwrite, command=_command(), **options)


def _led() -> AbstractContextManager[bool]:
    """Whether this process runs the command; the others of a run help it meanwhile."""
    if not _is_one_of_several():
        return nullcontext(True)
    _quiet_libraries()
    from plad_fast.models.team import led

    return led()


def _is_one_of_several() -> bool:
    if "WORLD_SIZE" not in os.environ:  # torch takes its time to load
        return False
    from plad_fast.models.team import launched

    return launched()


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


def _again(typed: Sequence[str]) -> str:
    """How to go on from where a command ended."""
    without = f" without {_OVERWRITE}, which would start anew" if _OVERWRITE in typed else ""
    return f"run the same command again{without}"


def _ended_by(number: int, typed: Sequence[str]) -> int:
    by_hand = number == signal.SIGINT
    what = "interrupted" if by_hand else f"ended by {signal.Signals(number).name}"
    return _fail(
        _INTERRUPTED if by_hand else _TERMINATED,
        f"{what}; what was finished is kept: {_again(typed)} to go on",
    )


def _fail(status: int, message: str | Callable[[], str]) -> int:
    """The exit status; the message is made and printed by one process of a run."""
    who = ""
    if _is_one_of_several():
        from plad_fast.models.team import rank, settled

        status, speaks = settled(status)
        if not speaks:
            return status
        who = f"process {rank()}: " if rank() else ""
    text = message if isinstance(message, str) else message()
    print(f"plad-fast: error: {who}{text}", file=sys.stderr, flush=True)
    return status


def _broken_pipe() -> int:
    """The reader of our output has gone, `| head` for example: nobody is left to tell."""
    # Python would write what is still buffered when it exits, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _unexpected(error: Exception, output_dir: str | None) -> int:
    """A defect of ours, or of a library: one line for the reader, the traceback in a file."""
    trace = traceback.format_exc()

    def message() -> str:
        folder = Path(output_dir).expanduser() if output_dir is not None else Path()
        # In an empty folder the file would be the first, and the folder no longer fit for a run.
        has_begun = folder.is_dir() and any(folder.iterdir())
        file = (folder if has_begun else Path()) / _FAILURE_LOG
        try:
            file.write_text(trace, encoding="utf-8", errors="backslashreplace")
            place = f"the traceback is in {file}"
        except OSError as failure:
            place = f"the traceback could not be written to {file} ({failure.strerror})"
        first = next(iter(str(error).strip().splitlines()), "")
        return f"unexpected {type(error).__name__}: {first}; {place}"

    return _fail(1, message)
