"""`plad-fast`: the recipe and its stages on the command line.

Exit status: 0 done, 1 unexpected failure, 2 bad input or a full disk, 75 ended by SIGTERM or
SIGHUP, 130 ended by Ctrl-C. After the last two the same command goes on from where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plad_fast import __version__
from plad_fast.data.files import disk_advice
from plad_fast.data.places import shown
from plad_fast.errors import UsageError
from plad_fast.recipe.arguments import listed, parse_command
from plad_fast.recipe.packages import require_packages
from plad_fast.recipe.settings import DistillConfig, coerce, flag, load_settings
from plad_fast.training.signals import Terminated, raised_signals

_OVERWRITE = "--overwrite"
_FAILURE_LOG = "plad-fast-error.log"
_NEEDED = ("transformers", "datasets", "accelerate")
_INTERRUPTED = 130
_TERMINATED = 75  # EX_TEMPFAIL of sysexits.h: run it again
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

_GENERATION = ("max_new_tokens", "student_temperature", "top_p", "seed", "generation_batch_size")
_PROMPTS = ("prompts", "prompt_column", "prompt_template", "reference_column", "split", "limit")
_ENDPOINT = (
    *("base_url", "api_key_env", "concurrency", "request_timeout"),
    *("reasoning_tokens", "token_budget", "cost_budget", "price_in", "price_out"),
)
_SELECTION = (
    *("teacher_samples", "student_samples", "scorer", "select", "list_size", "drop_contradicted"),
    *("min_gap", "max_length_ratio", "max_repetition", "max_overlap"),
)
_LOSS = ("beta", "loss_args", "sft_weight", "length_normalization", "batch_size")
_RESOURCES = (
    *("micro_batch_size", "max_tokens_per_batch", "max_length", "gradient_checkpointing"),
    *("precision", "saves_per_stage"),
)
_EVALUATION = ("eval_scorer", "calibration_samples")
_PAIR_SETTINGS = (
    *(*_PROMPTS, "teacher_temperature", *_GENERATION, "precision"),
    *(*_SELECTION, *_ENDPOINT),
)
_TRAIN_SETTINGS = (*_LOSS, *_RESOURCES, "seed")
_EVALUATE_SETTINGS = (
    *("length_normalization", *_GENERATION, "max_length", "precision"),
    *(*_EVALUATION, *_ENDPOINT),
)
# Of `--help`, in this order.
_GROUPS = {
    "models and seed": ("output_dir", "teacher", "student", "student_layers", "seed"),
    "prompts": (*_PROMPTS, "held_out", "sft_share"),
    "answers": ("teacher_temperature", *(name for name in _GENERATION if name != "seed")),
    "scores and pairs": _SELECTION,
    "fine-tuning": ("sft_epochs", "sft_learning_rate", "sft_batch_size"),
    "loss and optimizer": ("rounds", "loss", "epochs", "learning_rate", *_LOSS),
    "evaluation": _EVALUATION,
    "memory, precision, checkpoints": _RESOURCES,
    "teacher or judge by endpoint": _ENDPOINT,
}
# Where a setting means less than in `distill`.
_HELP = {
    "pairs": {"seed": "of sampling"},
    "train": {
        "seed": "of the order of the pairs and of dropout",
        "batch_size": "pairs in an optimizer step",
    },
    "evaluate": {
        "seed": "of sampling",
        "max_new_tokens": "tokens of an answer at most",
        "student_temperature": "of the students' samples",
        "length_normalization": "alpha of s(y) / |y|**alpha: 1 ranks by nat per token (default: 1)",
    },
}
_SHOWN_AS = {"output_dir": "DIR", "pairs": "FILE", "student": "STUDENT"}
_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; no exception leaves this function."""
    parser, commands = _parser()
    arguments = parse_command(parser, commands, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("plad_fast").setLevel(logging.INFO if arguments.verbose else logging.WARNING)
    try:
        with raised_signals(lambda number: _ended_by(number, arguments)):
            arguments.run(arguments)
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


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands by their names."""
    parser = argparse.ArgumentParser(
        prog="plad-fast",
        allow_abbrev=False,
        usage="plad-fast COMMAND [settings]",
        description="Distil a large language model into a small one from its text alone.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"plad-fast {__version__}")
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND [settings]")

    def add(
        name: str,
        run: Callable[[argparse.Namespace], None],
        text: str,
        *,
        needs: Sequence[str] = (),
        settings: Sequence[str] = (),
    ) -> argparse.ArgumentParser:
        """A command with settings, of which those that it needs have no default."""
        usage = [f"{flag(need)} {_SHOWN_AS.get(need, need.upper())}" for need in needs]
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            prog=f"plad-fast {name}",
            usage=" ".join(["plad-fast", name, *usage, "[settings]"]),
        )
        command.add_argument("--verbose", action="store_true", help="also say what is decided")
        if settings or needs:
            command.add_argument(
                "--config", help="YAML file with these settings; flags win over it"
            )
        command.set_defaults(
            run=run, name=name, needs=needs, settings=(*needs, *settings), parser=command
        )
        return command

    distill = add(
        "distill",
        _distill,
        "The whole recipe: fine-tune, pair, calibrate, evaluate.",
        settings=[field.name for field in dataclasses.fields(DistillConfig)],
    )
    _add_overwrite(distill)
    _add_settings(distill)

    quickstart = add(
        "quickstart", _quickstart, "`distill` offline, with short answers.", settings=["output_dir"]
    )
    _add_own(quickstart, "output_dir", "run folder (default: runs/quickstart)")
    _add_overwrite(quickstart)

    pairs = add(
        "pairs",
        _pairs,
        "Answer prompts with two models and write preference pairs.",
        needs=["teacher", "student", "output_dir"],
        settings=_PAIR_SETTINGS,
    )
    _add_own(
        pairs,
        "teacher",
        "hub id, folder or .gguf file, offline, openai:MODEL, vllm:MODEL, column:NAME, or "
        "python:MODULE.FUNCTION",
    )
    _add_own(pairs, "student", "hub id, folder or .gguf file, or offline")
    _add_own(pairs, "output_dir", "folder for pairs.jsonl, dropped.jsonl and the answers")
    _add_overwrite(pairs, "discard the answers stored in the folder first")
    _add_settings(pairs, "pairs", _PAIR_SETTINGS)

    train = add(
        "train",
        _train,
        "Train a model on preference pairs, or fine-tune on their chosen responses.",
        needs=["model", "pairs", "output_dir"],
        settings=("epochs", "learning_rate", "loss", *_TRAIN_SETTINGS),
    )
    _add_own(
        train,
        "model",
        "hub id, folder or .gguf file, or offline; adapters of PEFT are merged into their base "
        "first",
    )
    _add_own(train, "pairs", "JSONL, JSON, CSV, Parquet or hub dataset of prompt, chosen, rejected")
    _add_own(train, "output_dir", "folder to make for the trained model")
    _add_overwrite(train, "remove a model that was trained into the folder first")
    _add_own(train, "epochs", "passes over the pairs (default: 1)")
    _add_own(train, "learning_rate", "peak (default: 2e-5)")
    _add_own(
        train,
        "loss",
        "sft fine-tunes on the chosen responses alone; `plad-fast doctor` lists the others "
        "(default: plad_ranking)",
    )
    _add_settings(train, "train", _TRAIN_SETTINGS)

    evaluate = add(
        "evaluate",
        _evaluate,
        "Compare students on held-out pairs; write a report.",
        needs=["student", "pairs", "output_dir"],
        settings=_EVALUATE_SETTINGS,
    )
    evaluate.add_argument(
        "--student",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME=PATH",
        help="a student and its folder; repeat: the first is the baseline, the last the one that "
        "the report is about; in a --config file `student: {NAME: PATH}`",
    )
    _add_own(evaluate, "pairs", "held-out pairs of prompt, chosen, rejected, as of train")
    _add_own(evaluate, "output_dir", "folder for metrics.json, report.html")
    _add_overwrite(evaluate, "discard the answers and scores stored in the folder first")
    _add_settings(evaluate, "evaluate", _EVALUATE_SETTINGS)

    add("doctor", _doctor, "Versions, devices, and which backend would be used and why.")
    return parser, commands.choices


def _add_own(command: argparse.ArgumentParser, name: str, text: str) -> None:
    """A flag that means more or less than the setting of this name in `distill`."""
    metavar = {"epochs": "X", "learning_rate": "X"}.get(name, _SHOWN_AS.get(name, name.upper()))
    command.add_argument(
        flag(name), dest=name, default=argparse.SUPPRESS, metavar=metavar, help=text
    )


def _add_overwrite(
    command: argparse.ArgumentParser, text: str = "empty the folder of an earlier run first"
) -> None:
    command.add_argument(_OVERWRITE, action="store_true", help=text)


def _add_settings(
    command: argparse.ArgumentParser, name: str = "distill", names: Sequence[str] | None = None
) -> None:
    """A flag for every setting, or for those named. What is not given stays out of the result."""
    fields = {field.name: field for field in dataclasses.fields(DistillConfig)}
    for title, members in _GROUPS.items():
        wanted = [fields[member] for member in members if names is None or member in names]
        group = command.add_argument_group(title) if wanted else None
        for field in wanted:
            assert group is not None
            text = _HELP.get(name, {}).get(field.name, field.metadata["help"])
            default = "" if field.default is None else f" (default: {field.default})"
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.type == "bool" else {}
            group.add_argument(
                flag(field.name),
                dest=field.name,
                **switch,
                default=argparse.SUPPRESS,
                metavar=_METAVARS.get(str(field.type).split(" ")[0], "true|false"),
                help=(text + default).replace("%", "%%"),
            )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given by flags or else in the file of --config, in the types of the settings."""
    raw = ["student"] if arguments.name == "evaluate" else []
    settings = {}
    if arguments.config:
        settings = load_settings(
            arguments.config, arguments.settings, command=arguments.name, raw=raw
        )
    texts = {name: value for name, value in vars(arguments).items() if name in arguments.settings}
    if "prompt_template" in texts:
        texts["prompt_template"] = _unescape(texts["prompt_template"])
    for name, text in texts.items():
        settings[name] = text if name in raw else coerce(name, text, flag(name))
    if missing := [flag(name) for name in arguments.needs if name not in settings]:
        arguments.parser.error(
            f"{arguments.name} needs {listed(missing)}, as flags or in the file of --config"
        )
    return settings


def _unescape(text: str) -> str:
    r"""A line break for \n, which a shell makes hard to type; \\n stays a backslash and an n."""
    return re.sub(r"(\\?)\\n", lambda found: r"\n" if found[1] else "\n", text)


def _distill(arguments: argparse.Namespace) -> None:
    _run_distill(DistillConfig(**_settings(arguments)), arguments.overwrite)


def _quickstart(arguments: argparse.Namespace) -> None:
    settings = {"output_dir": "runs/quickstart", **_settings(arguments)}
    # The built-in prompts ask for a sentence or two.
    _run_distill(DistillConfig(**settings, max_new_tokens=48), arguments.overwrite)


def _run_distill(config: DistillConfig, overwrite: bool) -> None:
    _quiet_libraries()
    from plad_fast.recipe.distillation import distill

    distill(config, overwrite=overwrite, command=_command())


def _pairs(arguments: argparse.Namespace) -> None:
    given = _settings(arguments)
    _quiet_libraries()
    from plad_fast.recipe.stages import pair_models

    teacher, student = given.pop("teacher"), given.pop("student")
    pair_models(
        DistillConfig(**given), teacher=teacher, student=student, overwrite=arguments.overwrite
    )


def _train(arguments: argparse.Namespace) -> None:
    given = _settings(arguments)
    _quiet_libraries()
    from plad_fast.recipe.stages import train_on_pairs

    overwrite = arguments.overwrite
    train_on_pairs(given.pop("model"), given.pop("pairs"), overwrite=overwrite, **given)


def _evaluate(arguments: argparse.Namespace) -> None:
    given = _settings(arguments)
    students = _students(given.pop("student"))
    _quiet_libraries()
    from plad_fast.recipe.evaluate import evaluate_on_pairs

    evaluate_on_pairs(
        students,
        given.pop("pairs"),
        DistillConfig(**given),
        overwrite=arguments.overwrite,
        command=_command(),
    )


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


def _doctor(arguments: argparse.Namespace) -> None:
    from plad_fast.recipe.doctor import diagnose

    print(diagnose())


def _quiet_libraries() -> None:
    """Keep the bars that show our progress, and leave out those of loading and saving files."""
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


def _again(arguments: argparse.Namespace) -> str:
    """How to go on from where a command ended."""
    anew = getattr(arguments, "overwrite", False)
    without = f" without {_OVERWRITE}, which would start anew" if anew else ""
    return f"run the same command again{without}"


def _ended_by(number: int, arguments: argparse.Namespace) -> int:
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
