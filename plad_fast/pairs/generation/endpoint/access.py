"""The address of an endpoint, the key to it, and messages that do not hold that key."""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from plad_fast.data.unicode import without_controls
from plad_fast.errors import UsageError

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)S?$", re.IGNORECASE)
_SHORTEST = 8  # what is shorter guards nothing, such as "none" for a local server, and is in words
_LONGEST_MESSAGE = 200
_LONGEST_READ = 100_000

# What no company's key looks like: capitals, in words, one of which says what it is.
_PLAIN_NAME = re.compile(r"(?=.{1,64}\Z)[A-Z_][A-Z0-9]*(?:_[A-Z0-9]+)*\Z")
_OF_A_KEY = re.compile(r"(?:^|_)(?:API)?(?:KEY|TOKEN|SECRET|PASS|PASSWORD|AUTH|CRED)S?(?:_|\d|\Z)")


def mask(text: str, *secrets: str) -> str:
    """The text with stars in place of the secrets."""
    # The longest first: one secret may begin with another.
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return text


def one_line(text: str, *secrets: str) -> str:
    """A foreign message for one of ours: masked, on one line, without what a terminal acts on, cut.

    Besides the secrets named, those in environment variables with the usual names are masked.
    """
    found = (value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name))
    # Some servers send long pages.
    line = " ".join(without_controls(mask(text[:_LONGEST_READ], *secrets, *found)).split())
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 1] + "…"


def check_variable(variable: str) -> None:
    """Raises UsageError for what may be a key in place of its variable's name; it does not say it.

    A variable that is set has its name. One that is not has to look like one.
    """
    if variable.isidentifier() and one_line(variable) == variable:
        if os.environ.get(variable):
            return
        if _PLAIN_NAME.match(variable) and _OF_A_KEY.search(variable):
            return
    raise UsageError(
        "--api-key-env takes the name of a variable that is set, such as OPENAI_API_KEY; what it "
        "got is none, or is the key itself (it is not shown here)"
    )


def read_key(variable: str, urls: Sequence[str]) -> str:
    """The key in an environment variable; a stand-in for endpoints on this machine."""
    check_variable(variable)
    key = os.environ.get(variable, "").strip()
    away = [url for url in urls if not is_loopback(url)]
    if not (key or away):
        return "none"
    if not key:
        raise UsageError(
            f"{away[0]} needs a key, and {variable} is not set (--api-key-env); set it"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UsageError(f"{variable} holds characters that no key has; copy the key anew")
    return key


def find_urls(urls: str | None) -> list[str]:
    """The URLs of the API's servers, given with commas between them, else from the environment,
    else OpenAI's."""
    given = urls or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    found = [_checked(url.strip()) for url in given.split(",")]
    if twice := [url for url in found if found.count(url) > 1]:
        raise UsageError(f"base URL {twice[0]!r} is given twice; name each server once")
    return found


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises for one that is no number, or too large
    except ValueError:
        is_url = False
    if not is_url:
        # What stands before an @ may be a password.
        shown = one_line(url.rpartition("@")[2])
        raise UsageError(f"base URL {shown!r} is none; it begins with http:// or https://")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError("the base URL holds a user or parameters; give scheme, host and path")
    return url.rstrip("/")


@functools.cache  # once for each URL
def warn_of_clear_text(url: str) -> None:
    if urlsplit(url).scheme == "http" and not is_loopback(url):
        read = "key, prompts and answers can be read on the way; use https://"
        logger.warning("%s is not encrypted, and not on this machine: %s", url, read)


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
