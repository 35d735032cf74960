"""What is taken for an answer, and what is not: ends, thoughts, parts, halves of characters."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("openai")

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.completions import after_thought, holds_thought, known_end
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from tests.support.fault_server import FaultServer, Step, said

HALF = "The three steps are: first, open the"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def model(server, **options):
    options = {"max_retries": 2, "timeout": 5, "first_pause": 0.005, "concurrency": 1, **options}
    return EndpointModel(Endpoint("m", base_url=server.url, **options), "teacher")


def ask(choice, questions=("a",), sampling=None, **options):
    """What becomes of the questions where each reply is this choice, and how often they went."""
    choices = choice if isinstance(choice, list) else [choice]
    with FaultServer(lambda *_: Step(choices=choices)) as server:
        teacher = model(server, **options)
        prompts = [Prompt(q, q) for q in questions]
        found = [i for batch in teacher.generate(prompts, sampling or Sampling()) for i in batch]
    return found, sum(server.asked.values())


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (("stop", "STOP", "end_turn", "eos_token", "eos", "stop_sequence", "COMPLETE"), "stop"),
        (("FinishReason.STOP", "FINISH_REASON_STOP", "endTurn", "stop-sequence"), "stop"),
        (("length", "MAX_TOKENS", "model_length", "max_output_tokens", "maxTokens"), "length"),
        (("model_context_window_exceeded", "FinishReason.MAX_TOKENS", "token_limit"), "length"),
        (("content_filter", "SAFETY", "sensitive", "RECITATION", "BLOCKLIST"), "content_filter"),
        (("PROHIBITED_CONTENT", "content_filter: SPII", "guardrail_intervened"), "content_filter"),
        (("tool_calls", "function_call", "tool_use", "MALFORMED_FUNCTION_CALL"), "tool_calls"),
        (("error", "abort", "network_error", "repetition", "insufficient_system_resource"), None),
        (("OTHER", "ERROR", "cancelled", "time_limit", "no idea", "stop?", "not_finished"), None),
    ],
)
def test_ends_in_the_words_of_many_servers(words, end):
    assert {word: known_end(word) for word in words} == dict.fromkeys(words, end)


@pytest.mark.parametrize(
    "reason",
    ["abort", "insufficient_system_resource", "OTHER", {"type": "stop"}, 5, ["stop"], True],
)
def test_a_reply_that_ended_otherwise_is_tried_again_and_then_listed(reason):
    ((failure,), requests) = ask(said(HALF, reason))
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
    ((failure,), requests) = ask(choice, sampling=Sampling(max_new_tokens=64))
    assert isinstance(failure, Failure)
    assert requests == 1
    assert says in failure.reason


@pytest.mark.parametrize(
    "choice", [said(None, reasoning_content="4"), said(HALF, "tool_calls"), said("<think>hm")]
)
def test_a_model_that_never_answers_is_found_out_early(choice):
    with pytest.raises(UsageError, match="teacher: of the first 8 replies each is empty: the "):
        ask(choice, [f"q{i}" for i in range(100)])


def test_an_answer_may_end_in_its_reasons():
    text = "<answer>4</answer>\n<reasoning>2 + 2</reasoning>"
    assert ask(said(text))[0] == [Answer("a", text, "stop", 3)]


def test_empty_lists_and_nulls_beside_an_answer_are_nothing():
    message = {"tool_calls": [], "function_call": None, "refusal": None, "reasoning": None}
    choice = {**said("4", **message), "error": None}
    assert ask(choice)[0] == [Answer("a", "4", "stop", 3)]


@pytest.mark.parametrize("where", ["choice", "message", "reply"])
def test_an_error_beside_an_answer_is_an_error(where):
    error = {"code": 502, "message": "provider disconnected"}
    choice = said(HALF, **({"error": error} if where == "message" else {}))
    if where == "choice":
        choice["error"] = error
    body = {"choices": [choice], **({"error": error} if where == "reply" else {})}
    with FaultServer(lambda *_: Step(body=body)) as server:
        ((item,),) = model(server).generate([Prompt("a", "a")], Sampling())
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
        found = [item for batch in model(server).generate(prompts, Sampling()) for item in batch]
    assert [type(item) for item in found] == [Answer, Answer, Failure, Failure]
    assert "no finish_reason" in found[2].reason
    # Of several in a reply, too.
    both = [said("4"), {**said(HALF), "finish_reason": None}]
    found, requests = ask(both, sampling=Sampling(n=2))
    assert [item.text for item in found] == ["4", "4"]
    assert requests == 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "4"}], "4"),
        ([{"type": "text", "text": "It is "}, {"type": "output_text", "text": "4"}], "It is 4"),
        ([{"type": "thinking", "thinking": [{}]}, {"type": "text", "text": "4"}], "4"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "4"}], "4"),
        ({"text": "4"}, "4"),
    ],
)
def test_the_text_parts_of_an_answer_are_joined(content, text):
    assert ask(said(content)) == ([Answer("a", text, "stop", 3)], 1)


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, 5, ["a"], {"text": 5}])
def test_a_part_of_another_kind_is_asked_for_no_more_than_twice(part):
    ((failure,), requests) = ask(said([{"type": "text", "text": "see"}, part]), max_retries=6)
    assert requests == 2
    assert "not text" in failure.reason


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nlet me see\n</think>\n\n4", "4"),
        ("let me see\n</think>\n\n4", "4"),
        ("<thinking>hm</thinking>4", "4"),
        ("<Thought>hm</Thought>\n4", "4"),
        ("<seed:think>hm</seed:think>4", "4"),
        ("[THINK]hm[/THINK]4", "4"),
        ("◁think▷hm◁/think▷4", "4"),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4",
            "4",
        ),
        ("analysisThe user asks.assistantfinal4", "4"),
        ("<|START_THINKING|>hm<|END_THINKING|>4", "4"),
        ("<think>\nlet me see, and never", ""),
        ("<think>a</think>b\n<think>c", ""),
        ("<|channel|>analysis<|message|>hm", ""),
        ("<think></think>", ""),
    ],
)
def test_thoughts_are_known_by_their_marks(text, answer):
    assert holds_thought(text)
    assert after_thought(text) == answer


@pytest.mark.parametrize(
    "text",
    ["4", "The tag `<think>` opens it.", "Write `</think>` at its end.", "I think: analysis"],
)
def test_what_speaks_of_thoughts_holds_none(text):
    assert not holds_thought(text)
    assert after_thought(text) == text


@pytest.mark.parametrize("count", [3, 40])
def test_thoughts_beside_answers_are_told_once_and_soon(count, caplog):
    found, _ = ask(said("<think>hm</think>4"), [f"q{i}" for i in range(count)])
    assert [item.text for item in found] == ["<think>hm</think>4"] * count
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith(f"teacher: {min(count, 16)} of {min(count, 16)} answers")
    assert "reasoning parser" in warning


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
                lambda: model(server), prompts, path, Sampling(8), fingerprint={}, progress=False
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
