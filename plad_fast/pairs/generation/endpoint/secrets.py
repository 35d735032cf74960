"""Keeps keys out of messages: servers and clients like to quote what they were given."""

from __future__ import annotations

import os
import re

from plad_fast.data.unicode import without_controls

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)S?$", re.IGNORECASE)
_SHORTEST = 8  # what is shorter guards nothing, such as "none" for a local server, and is in words
_LONGEST_MESSAGE = 200
_LONGEST_READ = 100_000


def mask(text: str, *secrets: str) -> str:
    """The text with stars in place of the secrets."""
    # The longest first: one secret may begin with another.
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return text


def one_line(text: str, *secrets: str) -> str:
    """A foreign message for one of ours: masked, then on one line, then cut.

    What a terminal would act on is replaced: colours, titles, and turns of the line's direction.
    Besides the secrets named, those in environment variables with the usual names are masked.
    """
    found = (value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name))
    # Nobody reads beyond the first page, and some servers send books.
    line = " ".join(without_controls(mask(text[:_LONGEST_READ], *secrets, *found)).split())
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 1] + "…"
