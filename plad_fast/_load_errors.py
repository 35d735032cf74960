"""What is said of a model that a library cannot load."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

_LONGEST = 400  # characters of a library's words


def reason_of(error: BaseException) -> str:
    """The library's words in a line, with the name of what is no message of its own.

    They do without advice to unpickle or to run what somebody else wrote.
    """
    text = str(error).strip() or type(error).__name__
    pickled = any(isinstance(cause, pickle.UnpicklingError) for cause in _causes(error))
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
    line = " ".join(text.split())
    if not isinstance(error, (OSError, ValueError, ImportError)) or not str(error).strip():
        line = f"{type(error).__name__}: {line}".removesuffix(f": {type(error).__name__}")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
