"""Ends and thoughts of completions."""

from __future__ import annotations

import pytest

from plad_fast.pairs.generation.reasoning import (
    after_thought,
    holds_thought,
    known_end,
    split_thought,
)


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


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nlet me\nsee\n</think>\n\n4", "let me\nsee", "4"),
        ("let me see\n</think>\n\n4", "let me see", "4"),
        ("<think>a</think>\n<think>b</think>\n4", "a\n\nb", "4"),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4",
            "hm",
            "4",
        ),
        ("<answer>4</answer>\n<reasoning>2 + 2</reasoning>", "", None),
        ("Sure:\n<think>hm</think>\n4", "", None),
        ("Close it by </think> and go on.", "", None),
        ("4", "", None),
    ],
)
def test_a_thought_is_told_from_the_answer_behind_it(text, thought, answer):
    assert split_thought(text) == (thought, text if answer is None else answer)
