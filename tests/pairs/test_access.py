"""Addresses and keys of endpoints, and messages that do not hold them."""

from __future__ import annotations

import logging
import sys

import pytest

pytest.importorskip("openai")

from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.access import check_variable, one_line, warn_of_clear_text
from plad_fast.pairs.generation.endpoint.chat import ChatRequest, Choice, Reply
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.recipe.settings import DistillConfig
from tests.support.endpoints import CHAT, KEY, NOBODY, endpoint, generate, refused, teacher
from tests.support.fault_server import FaultServer, answer_to

pytestmark = pytest.mark.usefixtures("key")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "http://10.0.0.1/v1", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not"),
        ({"api_key_env": "BAD_KEY"}, "BAD_KEY holds characters"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, "holds a user"),
        ({"base_url": "host:8000/v1"}, "begins with http"),
        ({"base_url": f"user:{KEY[:12]}@host/v1"}, "begins with http"),
        ({"base_url": "http://host:port/v1"}, "begins with http"),
        ({"base_url": "http://[::1/v1"}, "begins with http"),
        ({"api_key_env": KEY}, "is the key itself"),
        ({"api_key_env": KEY.replace("-", "_")}, "is the key itself"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": float("nan")}, "timeout"),
        ({"cost_budget": 1.0}, "prices"),
        ({"token_budget": 0}, "token_budget"),
        ({"reasoning_tokens": -1}, "reasoning_tokens"),
        ({"prices": (1.0, -1.0)}, "prices"),
    ],
)
def test_bad_options_are_found_at_once_and_told_without_secrets(options, says, monkeypatch):
    monkeypatch.setenv("BAD_KEY", KEY + "\nü")
    monkeypatch.setenv("OTHER_KEY", KEY.replace("-", "_"))
    with pytest.raises(UsageError, match=says) as caught:
        Endpoint("m", **options)
    assert KEY[:12] not in str(caught.value).replace("_", "-")


def test_a_key_is_needed_away_from_this_machine_only(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    for host in ("127.0.0.1", "localhost", "[::1]"):
        Endpoint("m", base_url=f"http://{host}:1/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1/")
    assert Endpoint("m").settings() == {"model": "m", "base_url": "http://localhost:1/v1"}
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost.example.org/v1")
    with pytest.raises(UsageError, match="needs a key"):
        Endpoint("m")


@pytest.mark.parametrize(
    "key", ["gsk_a1B2c3D4e5F6", "hf_abcdefghijklmn", "sk_live_0123456789", "AIzaSyD3abc", "r8_Ab3",
            "AKIAIOSFODNN7EXAMPLE", "0123456789abcdef", "xai-0123", "MY_API"]
)  # fmt: skip
def test_a_key_in_place_of_its_name_is_refused_and_not_shown(key):
    for make in (
        lambda: DistillConfig(api_key_env=key),
        lambda: Endpoint("m", base_url=NOBODY, api_key_env=key),
    ):
        with pytest.raises(UsageError, match="--api-key-env") as caught:
            make()
        assert key not in str(caught.value)


def test_names_of_variables_are_taken(monkeypatch):
    for name in ("OPENROUTER_API_KEY", "HF_TOKEN", "OPENAI_API_KEY_2", "MY_APIKEY", "_KEY"):
        check_variable(name)
    monkeypatch.setenv("mine", "0123456789")
    check_variable("mine")


def test_a_remote_address_in_clear_is_warned_of_once(caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        Endpoint("m", base_url="http://clear.example.org/v1")
        Endpoint("m", base_url="https://safe.example.org/v1")
        Endpoint("m", base_url=NOBODY)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "http://clear.example.org/v1 is not encrypted" in warning
    warn_of_clear_text.cache_clear()


def test_what_a_terminal_would_obey_is_replaced():
    evil = "\x1b]0;title\x07red\x1b[31m \x9b2J \u202eright\u2066 \x00\ud83d end"
    assert (
        one_line(evil)
        == "\ufffd]0;title\ufffdred\ufffd[31m \ufffd2J \ufffdright\ufffd \ufffd\ufffd end"
    )
    with FaultServer(lambda *_: refused(evil)) as server, pytest.raises(UsageError) as caught:
        generate(teacher(server), "abcd")
    assert str(caught.value).replace("\ufffd", "").isprintable()


def test_an_endpoint_says_nothing_of_its_key():
    with FaultServer() as server:
        model = endpoint(server, prices=(1, 2), concurrency=1)
        assert list(model.complete([ChatRequest(CHAT, Sampling(5))] * 2)) == [
            (i, Reply([Choice(answer_to("chat"), "stop", 3)])) for i in (0, 1)
        ]
    assert server.keys == {KEY}
    assert KEY not in f"{model} {vars(model)} {model.settings()}"
    assert str(model.usage) == "16 tokens in 2 requests, cost 0.0000"


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[api\]'"):
        Endpoint("m", base_url=NOBODY)
