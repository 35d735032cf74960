"""Where an endpoint is, and the key to it."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from plad_fast.errors import UsageError
from plad_fast.pairs._secrets import one_line

OPENAI_URL = "https://api.openai.com/v1"


def read_key(variable: str, url: str) -> str:
    """The key in an environment variable; a stand-in for an endpoint on this machine.

    Raises:
        UsageError: there is none, or it cannot be one. The message does not hold it.
    """
    if not variable.isidentifier() or one_line(variable) != variable:
        raise UsageError(
            "--api-key-env takes the name of an environment variable, such as OPENAI_API_KEY, and "
            "what it got is no name, or is the key itself"
        )
    key = os.environ.get(variable, "").strip()
    if not key and is_loopback(url):
        return "none"
    if not key:
        raise UsageError(
            f"{url} needs a key, and the environment variable {variable} is not set; set it, or "
            "name another one with --api-key-env"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UsageError(
            f"the environment variable {variable} holds characters that no key has; copy the key "
            "anew"
        )
    return key


def find_url(url: str | None) -> str:
    """The URL of the API: as given, else from the environment, else OpenAI's.

    Raises:
        UsageError: it is none, or holds what must not get into files and messages.
    """
    url = url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises for one that is no number, or too large
    except ValueError:
        is_url = False
    if not is_url:
        # What stands before an @ may be a password.
        shown = one_line(url.rpartition("@")[2])
        raise UsageError(
            f"base URL {shown!r} is none; it begins with http:// or https://, such as "
            "http://127.0.0.1:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "the base URL holds a user, a password or parameters, which would be written to "
            "files; give scheme, host and path alone, and the key by an environment variable"
        )
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
