"""Answers of models that reason first, with the reasoning left out, in the text, or beside it.

Stores keep answers as they came. An endpoint may give the reasoning apart; any other model writes
it in front of its answer, in its own marks.
"""

from __future__ import annotations

from dataclasses import replace

from plad_fast.data.chat import is_blank
from plad_fast.pairs.generation.completions import is_all_thought, split_thought
from plad_fast.pairs.generation.text_model import Answer

REASONING = ("drop", "keep", "column")
"""The answer alone; reasoning and answer as one text; the answer, with the reasoning beside it."""


def with_reasoning(answer: Answer, reasoning: str) -> Answer:
    """An answer, as it is stored, with its reasoning as `REASONING` has it.

    One that ends inside its reasoning counts as cut off, and its text stays as it is. Under "keep"
    a reasoning that was given apart gets the marks `<think>` and `</think>`.
    """
    text, thought = answer.text, answer.reasoning
    if not is_blank(text) and is_all_thought(text):
        return replace(answer, finish_reason="length")
    if reasoning == "keep":
        if thought:
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        return replace(answer, text=text, reasoning="")
    written, text = split_thought(text)
    parts = [part for part in (thought, written) if part]
    return replace(answer, text=text, reasoning="\n\n".join(parts) if reasoning == "column" else "")


def spoken(text: str, reasoning: str) -> str:
    """A text as it is compared with answers of `with_reasoning`."""
    return with_reasoning(Answer("", text, "stop", 0), reasoning).text
