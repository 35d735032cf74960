"""The one exception that means "the caller can mend this"."""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input from a user.

    The message says what was wrong and what to do about it. The command line prints it without
    a traceback and exits with status 2.
    """
