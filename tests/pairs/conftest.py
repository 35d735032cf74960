"""The environment of tests that ask endpoints."""

from __future__ import annotations

import pytest

from tests.support.endpoints import KEY


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """The key in the environment, which names no address."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return KEY


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed request is soon tried again."""
    monkeypatch.setattr("plad_fast.pairs.generation.endpoint.retries.FIRST_PAUSE", 0.005)
