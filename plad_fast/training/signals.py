"""Graceful exit on SIGTERM, SIGHUP and Ctrl-C; a second signal ends the process at once.

SIGTERM is what schedulers send some seconds before they kill, SIGHUP what a closed terminal leaves
behind. Handlers are set in the main thread only, over the system's and Python's own, and put back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

_GRACE = 3.0  # seconds that a second signal leaves the main thread to end by itself
_SOON = 0.05  # seconds after which a signal that was dropped comes once more
_SAME = 1.0  # seconds: `timeout` and other wrappers send a signal twice
_ENDING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)
]


class Terminated(KeyboardInterrupt):
    """The process was asked to end by another signal than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return _name(self.number)


@dataclass
class Asked:
    """Whether a signal has asked the process to end."""

    by: int | None = None
    at: float = 0.0

    def __bool__(self) -> bool:
        return self.by is not None


@contextlib.contextmanager
def raised_signals(leave: Callable[[int], int]) -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Terminated`, once, as SIGINT raises KeyboardInterrupt.

    They are put back at the end, unless they are ignored by then (`ignore_signals`). Where Python
    drops what was raised, in a `__del__` say, the signal comes once more.

    After a second signal the process has a moment to end, then it is ended: code that never comes
    back to Python holds up the handlers of signals, and traps nobody.

    Args:
        leave: given the number of the signal, says what there is to say and returns the exit
            status of a process that is ended so. Runs in a thread.
    """
    if not _is_main_thread() or os.name == "nt":  # which has neither of them
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()
    resent: list[int] = []  # for `watch` they are no second signals
    timers: list[threading.Timer] = []

    def watch() -> None:
        first = None
        while arrived := os.read(reading, 64):
            number = next((number for number in arrived if number in _ENDING), None)
            if number is None:
                continue
            if resent:
                resent.pop()
            elif first is None:
                first = time.monotonic()
            elif time.monotonic() - first >= _SAME and not ended.wait(_GRACE):
                os._exit(leave(number))

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt) or not _is_main_thread():
            hook(what)
            return
        arm()
        number = getattr(what.exc_value, "number", signal.SIGINT)
        resent.append(number)
        timers.append(threading.Timer(_SOON, os.kill, (os.getpid(), number)))
        timers[-1].start()

    def arm() -> None:
        for number in before:
            if number != signal.SIGINT:
                signal.signal(number, _raise)

    before, hook = _defaults(), sys.unraisablehook
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="plad-fast-signals", daemon=True)
    watcher.start()
    sys.unraisablehook = dropped
    try:
        arm()
        yield
    finally:
        ended.set()
        sys.unraisablehook = hook
        for timer in timers:
            timer.cancel()
        signal.set_wakeup_fd(wakeup)
        _restore(before)
        os.close(writing)  # which ends the thread
        watcher.join()
        os.close(reading)


@contextlib.contextmanager
def deferred_signals(notice: str) -> Iterator[Asked]:
    """Holds a signal back until the end of the block, which is to look whether it was asked to end.

    What the signal would have done is done then. A second one does it at once. In another thread
    than the main one, and where others have set handlers, nothing changes.

    Args:
        notice: printed when a signal has come, unless it is empty; `{}` stands for its name.
    """
    asked = Asked()
    if not _is_main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if asked.by is not None:
            if now - asked.at >= _SAME:
                _restore(before)
                _deliver(number, before)
            return
        asked.by, asked.at = number, now
        _hang_up(number)
        # It may have come in the middle of another print, which Python refuses to enter again.
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            if notice:
                print(f"\n{notice.format(_name(number))}", file=sys.stderr, flush=True)

    before = _defaults()
    try:
        for number in before:
            signal.signal(number, note)
        yield asked
    finally:
        # After a second signal they are no longer these, and that process is ending.
        _restore({n: before[n] for n in before if signal.getsignal(n) is note})
    if asked.by is not None:
        _deliver(asked.by, before)


def ignore_signals() -> None:
    """For a process that has said how it ends: no signal changes its exit status any more."""
    if _is_main_thread():
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _defaults() -> dict[Any, Any]:
    """The handlers of the signals that would end the process; those of others are left out."""
    own = (signal.SIG_DFL, signal.default_int_handler, _raise)
    found = {number: signal.getsignal(number) for number in _ENDING}
    return {number: handler for number, handler in found.items() if handler in own}


def _restore(before: dict[Any, Any]) -> None:
    for number, handler in before.items():
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `ignore_signals` leaves them
            signal.signal(number, handler)


def _deliver(number: int, before: dict[Any, Any]) -> None:
    """Does what the signal would have done."""
    handler = before[number]
    if callable(handler):
        handler(number, None)  # raises
    else:
        signal.raise_signal(number)


def _raise(number: int, _: FrameType | None) -> None:
    _hang_up(number)
    for each in _ENDING:
        if signal.getsignal(each) is _raise:
            signal.signal(each, lambda *_: None)  # it is ending, or `watch` ends it
    raise Terminated(number)


def _hang_up(number: int) -> None:
    """After SIGHUP the terminal is gone, and to write to it is an error: nobody reads it."""
    if number != getattr(signal, "SIGHUP", None):
        return
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _name(number: int) -> str:
    return signal.Signals(number).name
