"""What is said of a model that a library cannot load."""

from __future__ import annotations

import pickle
from collections.abc import Iterator


def reason_of(error: BaseException) -> str:
    """The library's words, but for advice to unpickle or run what somebody else wrote."""
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
    return text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
