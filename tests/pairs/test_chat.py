"""Replies that are answers, and replies that are none."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("openai")

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import RowStore
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from tests.support.endpoints import KEY, answers, replied, teacher
from tests.support.fault_server import FaultServer, Step, answer_to, said

pytestmark = pytest.mark.usefixtures("key")


HALF = "The three steps are: first, open the"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (said(" cut ", "length"), Answer("a", "cut", "length", 3)),
        (said(f"you sent {KEY}"), Answer("a", "you sent ***", "stop", 3)),
        (said(None), "the answer is empty"),
        (said("half", "content_filter"), "content filter"),
        (said(None, refusal="I cannot"), "content filter"),
        (said(["parts"]), "not text"),
        ({"index": 0}, "without a message"),
    ],
)
def test_replies_of_every_kind(choice, expected):
    with FaultServer(lambda *_: Step(choices=[choice])) as server:
        item = answers(server)["a", 0]
    if isinstance(expected, str):
        assert isinstance(item, Failure)
        assert expected in item.reason
    else:
        assert item == expected


@pytest.mark.parametrize("body", [{"choices": None}, {"error": {"message": "overloaded"}}, [1], 5])
def test_what_is_no_completion_is_tried_again(body):
    with FaultServer(lambda _, tries, __: Step(body=body) if tries < 2 else Step()) as server:
        assert answers(server)["a", 0].text == answer_to("a")


def test_replies_without_an_answer_are_not_asked_for_for_ever():
    with FaultServer(lambda *_: Step("no choice")) as server:
        reason = answers(server)["a", 0].reason
        assert server.asked["a"] == 3
    assert reason == "given up after 3 tries; the last one: the reply holds no answer"


@pytest.mark.parametrize(
    "reason",
    ["abort", "insufficient_system_resource", "OTHER", {"type": "stop"}, 5, ["stop"], True],
)
def test_a_reply_that_ended_otherwise_is_tried_again_and_then_listed(reason):
    ((failure,), requests) = replied(said(HALF, reason))
    assert isinstance(failure, Failure)
    assert requests == 3
    assert str(reason) in failure.reason


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (said(HALF, "SAFETY"), "content filter withheld it (finish_reason 'SAFETY')"),
        (said(HALF, "sensitive"), "'sensitive'"),
        (said(HALF, "tool_calls"), "'tool_calls'"),
        (said("", "stop", tool_calls=[{"id": "c", "function": {}}]), "called a tool"),
        (said(HALF, "stop", function_call={"name": "f"}), "called a tool"),
        (said(None, reasoning_content="4, I think"), "all that was said is in reasoning_content"),
        (said("", reasoning="4, I think"), "all that was said is in reasoning"),
        (said([{"type": "thinking", "thinking": []}]), "of type 'thinking'"),
        (said("<think>\nlet me see, and never"), "ends inside its thought"),
        (said("let me see\n</think>\n"), "ends inside its thought"),
        (said("4\n<reasoning>\nlet me see, and never"), "ends inside its thought"),
        (said("<think>\nlet me see", "length"), "all 64 tokens were spent before any answer"),
    ],
)
def test_what_another_reply_would_not_mend_is_asked_for_once(choice, says):
    ((failure,), requests) = replied(choice, sampling=Sampling(max_new_tokens=64))
    assert isinstance(failure, Failure)
    assert requests == 1
    assert says in failure.reason


def test_an_answer_may_end_in_its_reasons():
    text = "<answer>4</answer>\n<reasoning>2 + 2</reasoning>"
    assert replied(said(text))[0] == [Answer("a", text, "stop", 3)]


def test_empty_lists_and_nulls_beside_an_answer_are_nothing():
    message = {"tool_calls": [], "function_call": None, "refusal": None, "reasoning": None}
    choice = {**said("4", **message), "error": None}
    assert replied(choice)[0] == [Answer("a", "4", "stop", 3)]


@pytest.mark.parametrize("where", ["choice", "message", "reply"])
def test_an_error_beside_an_answer_is_an_error(where):
    error = {"code": 502, "message": "provider disconnected"}
    choice = said(HALF, **({"error": error} if where == "message" else {}))
    if where == "choice":
        choice["error"] = error
    body = {"choices": [choice], **({"error": error} if where == "reply" else {})}
    with FaultServer(lambda *_: Step(body=body)) as server:
        ((item,),) = teacher(server).generate([Prompt("a", "a")], Sampling())
    assert "provider disconnected" in item.reason
    assert server.asked["a"] == 3


@pytest.mark.parametrize("silent", [None, "", "null", "absent"])
def test_a_reply_without_an_end_is_whole_only_where_the_server_never_says_one(silent):
    """Said once, its absence means that a reply was interrupted."""

    def choice(question):
        found = said(HALF, "stop" if question == "b" else silent)
        if found["finish_reason"] == "absent":
            del found["finish_reason"]
        return found

    with FaultServer(lambda question, *_: Step(choices=[choice(question)])) as server:
        prompts = [Prompt(q, q) for q in "abcd"]
        found = [item for batch in teacher(server).generate(prompts, Sampling()) for item in batch]
    assert [type(item) for item in found] == [Answer, Answer, Failure, Failure]
    assert "no finish_reason" in found[2].reason
    # Of several in a reply, too.
    both = [said("4"), {**said(HALF), "finish_reason": None}]
    found, requests = replied(both, sampling=Sampling(n=2))
    assert [item.text for item in found] == ["4", "4"]
    assert requests == 2


@pytest.mark.parametrize(
    ("content", "text", "thought"),
    [
        ([{"type": "text", "text": "4"}], "4", ""),
        ([{"type": "text", "text": "It is "}, {"type": "output_text", "text": "4"}], "It is 4", ""),
        ([{"type": "thinking", "thinking": [{}]}, {"type": "text", "text": "4"}], "4", ""),
        ([{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "4"}], "4", "hm"),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "h"}]},
                {"type": "thinking", "thinking": "m"},
                {"type": "text", "text": "4"},
            ],
            "4",
            "hm",
        ),
        ({"text": "4"}, "4", ""),
    ],
)
def test_the_text_parts_of_an_answer_are_joined(content, text, thought):
    assert replied(said(content)) == ([Answer("a", text, "stop", 3, reasoning=thought)], 1)


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "hm", "reasoning": "hm"},
        {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}]},
    ],
)
def test_reasoning_beside_an_answer_is_kept_apart_from_it(message):
    assert replied(said("4", **message))[0] == [Answer("a", "4", "stop", 3, reasoning="hm")]


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, 5, ["a"], {"text": 5}])
def test_a_part_of_another_kind_is_asked_for_no_more_than_twice(part):
    ((failure,), requests) = replied(said([{"type": "text", "text": "see"}, part]), max_retries=6)
    assert requests == 2
    assert "not text" in failure.reason


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('"Nice \\ud83d"', "Nice \ufffd"),
        ('"\\ude00 Nice"', "\ufffd Nice"),
        ('"Nice \\ud83d\\ude00"', "Nice 😀"),
        ('"a\\u0000b\\u2028c"', "a\0b\u2028c"),
        ('"\\ufeffNice"', "\ufeffNice"),
    ],
)
def test_half_an_emoji_is_mended_where_it_comes_in(raw, text, tmp_path):
    reply = json.dumps({"choices": [said("@")]}).replace('"@"', raw)
    prompts, path = [Prompt("0", "x")], tmp_path / "answers.jsonl"
    with FaultServer(lambda *_: Step(body=reply.encode())) as server:
        for _ in range(2):
            found = stored_answers(
                lambda: teacher(server), prompts, path, Sampling(8), fingerprint={}
            )
            assert found.answers["0"][0].text == text
    assert sum(server.asked.values()) == 1
    path.read_text(encoding="utf-8").encode()


def test_a_store_that_holds_half_an_emoji_recovers(tmp_path):
    path = tmp_path / "answers.jsonl"
    with RowStore.open(path, {}):
        pass
    with path.open("a") as file:
        file.write('{"id": "a\\ud83d", "text": "Nice \\uD83D", "more": ["\\ud83d\\ude00"]}\n')
    with RowStore.open(path, {}) as store:
        assert store.rows == {"a\ufffd": {"id": "a\ufffd", "text": "Nice \ufffd", "more": ["😀"]}}
