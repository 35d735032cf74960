"""Random public calls, valid and hostile, each made again by its number.

    python -m tests.support.fuzzing 0:1000        # these cases; prints a line for each that fails
    python -m tests.support.fuzzing 1234          # one, with what was called

A call must give the right answer, or raise a ValueError whose message names the argument at fault.
Anything else counts as a defect: another exception, a refusal of what is valid, silence over what
is not, a wrong number, a crash, half a minute without an end.
"""

from __future__ import annotations

import faulthandler
import os
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SECONDS = 30
"""After which a call is taken to hang."""


@dataclass
class Case:
    """One call and what is to be said of it."""

    text: str
    call: Callable[[], Any]
    check: Callable[[Any], None] = lambda result: None
    """Raises an AssertionError if the result is not right."""
    names: tuple[str, ...] = ()
    """What is at fault: a refusal must name one of these. None: the call must not be refused."""
    may_pass: bool = False
    """The call may also be right, as `check` finds."""


class Draw(random.Random):
    """A generator with a few shapes of choice; the case's number is its seed."""

    def maybe(self, share: float) -> bool:
        return self.random() < share

    def torch_seed(self) -> int:
        return self.getrandbits(31)


def make_case(number: int) -> Case:
    """The case of that number, the same on every machine."""
    from tests.support import fuzz_data, fuzz_ops

    draw = Draw(number)
    makers: list[tuple[Callable[[Draw], Case], int]] = [*fuzz_ops.MAKERS, *fuzz_data.MAKERS]
    [maker] = draw.choices([m for m, _ in makers], [weight for _, weight in makers])
    return maker(draw)


def verdict(case: Case) -> str | None:
    """None, or what is wrong with what the call did."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = case.call()
    except ValueError as error:
        if not case.names:
            return f"refused: {error}"
        if not any(re.search(rf"(?<![a-z]){re.escape(name)}", str(error)) for name in case.names):
            return f"refused without naming {' or '.join(case.names)}: {error}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{last_own_line(error)}"
    if case.names and not case.may_pass:
        return f"accepted what is wrong with {' or '.join(case.names)}"
    try:
        case.check(result)
    except AssertionError as error:
        return f"wrong: {error}"
    return None


def last_own_line(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "plad_fast" in f.filename]
    return f"  at {frames[-1].filename}:{frames[-1].lineno}" if frames else "  outside of plad_fast"


def shown(value: Any) -> str:
    """An argument in a line."""
    if (
        hasattr(value, "stride")
        and hasattr(value, "dtype")
        and value.layout.__str__() == ("torch.strided")
    ):
        where = "" if value.device.type == "cpu" else f" {value.device}"
        grad = " grad" if value.requires_grad else ""
        small = f" {value.tolist()}" if value.numel() < 9 and not value.is_meta else ""
        kind = str(value.dtype).removeprefix("torch.")
        return f"<{kind} {tuple(value.shape)} strides {value.stride()}{where}{grad}{small}>"
    return repr(value)[:200]


def call_text(name: str, *args: Any, **kwargs: Any) -> str:
    parts = [shown(a) for a in args] + [f"{k}={shown(v)}" for k, v in kwargs.items()]
    return f"{name}({', '.join(parts)})"


def run(numbers: Iterable[int], *, tell: bool = False) -> list[int]:
    """Those cases that fail. Every number is written before its call, for whoever finds a crash."""
    failed = []
    for number in numbers:
        os.write(1, f"{number}\n".encode())
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        case = make_case(number)
        wrong = verdict(case)
        faulthandler.cancel_dump_traceback_later()
        if wrong is not None:
            failed.append(number)
        if wrong is not None or tell:
            print(f"case {number}: {case.text}\n  {wrong or 'as it should be'}", file=sys.stderr)
    return failed


def main(typed: Sequence[str]) -> int:
    # Slow to import, for which no case is to blame.
    import rouge_score.rouge_scorer  # noqa: F401
    import torch

    import plad_fast.data.packing
    import plad_fast.training.config  # noqa: F401

    faulthandler.enable()
    torch.set_num_threads(1)
    first, _, last = typed[0].partition(":")
    numbers = range(int(first), int(last) if last else int(first) + 1)
    began = time.perf_counter()
    failed = run(numbers, tell=not last)
    spent = time.perf_counter() - began
    print(f"{len(numbers)} calls, {len(failed)} failed, {spent:.0f} s", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
