"""The exception that means "the caller can mend this", and what puts it into words."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator


class UsageError(ValueError):
    """Bad input from a user.

    The message says what was wrong and what to do about it. The command line prints it without
    a traceback and exits with status 2.
    """


class NotFiniteError(UsageError):
    """The loss of a training, or the logits of a model, are NaN or infinite: a training that
    diverged, or weights that were broken before."""


_LONGEST = 400


@contextlib.contextmanager
def reported_as(problem: str, library: str = "transformers") -> Iterator[None]:
    """Turns whatever a library makes of a foreign or a damaged file into a `UsageError`.

    Args:
        problem: what failed, and what to do about it.
        library: whose words follow in the message.
    """
    try:
        yield
    except Exception as error:
        kind = type(error).__name__
        if isinstance(error, (UsageError, MemoryError)) or kind == "OutOfMemoryError":  # of torch
            raise
        raise UsageError(f"{problem} ({library} says: {reason_of(error)})") from error


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """Puts the place before the message of a `UsageError`: a row, a file, a flag."""
    try:
        yield
    except UsageError as error:
        error.args = (f"{place}: {error}",)
        raise


def reason_of(error: BaseException) -> str:
    """The library's words in a line, but for advice to unpickle or run what somebody else wrote.

    What is no message of its own has the name of its kind.
    """
    text = " ".join(str(error).split())
    pickled = any(isinstance(cause, pickle.UnpicklingError) for cause in causes_of(error))
    if pickled or "weights_only" in text or "torch.load" in text:
        return (
            "its weights are pickled, and torch does not unpickle them: they hold more than "
            "tensors, or are damaged. Take a checkpoint in safetensors, or have it converted where "
            "it comes from: save_pretrained writes it"
        )
    if "trust_remote_code" in text:
        return (
            "it comes with code of its own, which is never run here; take a model that "
            "transformers itself knows"
        )
    if not isinstance(error, (OSError, ValueError, ImportError)) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and those that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
