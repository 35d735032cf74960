"""Text that comes from outside: halves of surrogate pairs, and what a terminal would obey."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from plad_fast.errors import UsageError

_SURROGATE = re.compile("[\ud800-\udfff]")

# C0 and C1 without tab and line feed, DEL, and what turns the direction of a line around.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def mend(value: Any) -> Any:
    """The value with U+FFFD for every lone surrogate, in the texts of lists and dicts too.

    JSON and Python strings can hold half of a pair, which no file, tokenizer or request takes. Two
    halves that follow each other become the character that they are.
    """
    if isinstance(value, str):
        if _SURROGATE.search(value) is None:
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [mend(item) for item in value]
    if isinstance(value, dict):
        return {mend(name): mend(item) for name, item in value.items()}
    return value


def require_unicode(value: Any, where: str) -> None:
    """Raises UsageError for a lone surrogate in a text or a structure, which JSON can hold but no
    tokenizer takes; `where` begins the message."""
    if isinstance(value, str):
        if found := _SURROGATE.search(value):
            raise UsageError(
                f"{where} holds {found[0]!r}, half of a surrogate pair and no character; remove "
                "it, or write both halves"
            )
    elif isinstance(value, (list, tuple, Mapping)):
        for inner in value:
            require_unicode(inner, where)
        if isinstance(value, Mapping):
            require_unicode(list(value.values()), where)


def without_controls(text: str) -> str:
    """The text with U+FFFD for characters that a terminal acts on, and for lone surrogates."""
    return _CONTROL.sub("\ufffd", mend(text))
