"""What a model thought, where its server leaves that in the text of the answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence

from plad_fast.pairs.generation.text_model import Answer, Failure

logger = logging.getLogger(__name__)

_ENOUGH = 16  # answers, to say that some hold thoughts while it is not too late

_NAME = r"(?:[\w-]+:)?(?:think|thinking|thoughts?|reasoning)"

# Tags of DeepSeek, Qwen and their like, then Mistral, Kimi, OpenThinker, Cohere, Gemma and gpt-oss,
# whose marks may have lost their special tokens. Only what begins a line opens a thought: a tag in
# the middle of a sentence is spoken of.
_OPEN = re.compile(
    rf"^[ \t]*(?:<{_NAME}(?:\s[^<>]*)?>|\[think\]|◁think▷"
    r"|<\|(?:begin_of_)?(?:thought|thinking|think)\|>|<\|start_thinking\|>"
    r"|<\|?channel\|?>\s*(?:analysis|commentary|thought)|<unused94>\s*thought"
    r"|(?-i:\Aanalysis(?=[A-Z])))",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSE = re.compile(
    rf"(?<!`)(?:</{_NAME}\s*>|\[/think\]|◁/think▷"
    r"|<\|/(?:thought|thinking|think)\|>|<\|end_of_(?:thought|thinking|think)\|>"
    r"|<\|end_thinking\|>|<\|channel\|>\s*final(?:\s*<\|message\|>)?|<channel\|>|<unused95>"
    r"|(?-i:assistantfinal))",
    re.IGNORECASE,
)


def holds_thought(text: str) -> bool:
    """Whether a thought, or part of one, stands in the text."""
    return _OPEN.search(text) is not None or _CLOSE.search(text) is not None


def after_thought(text: str) -> str:
    """The answer proper; empty where the text ends inside its thought, or with it."""
    closed = 0
    for mark in _CLOSE.finditer(text):
        closed = mark.end()
    rest = text[closed:]
    return "" if _OPEN.search(rest) else rest.strip()


def is_all_thought(text: str) -> bool:
    """Whether the text ends inside its thought, or is nothing but a thought."""
    if after_thought(text):
        return False
    opened = _OPEN.search(text)
    before = text[: opened.start()] if opened else ""
    if not before.strip() or _CLOSE.search(before):
        return True
    # An answer stands before it, which may be asked to end in its reasons; they are closed then.
    *_, closed = [0, *(mark.end() for mark in _CLOSE.finditer(text))]
    return _OPEN.search(text, closed) is not None


class Thoughts:
    """Counts the answers that hold a thought, and says so once.

    Args:
        name: of the teacher.
        advice: what to do about it.
    """

    def __init__(self, name: str, advice: str) -> None:
        self._name = name
        self._advice = advice
        self._answers = 0
        self._found = 0
        self._told = False

    def see(self, batch: Sequence[Answer | Failure]) -> None:
        texts = [item.text for item in batch if isinstance(item, Answer)]
        self._answers += len(texts)
        self._found += sum(map(holds_thought, texts))
        if self._answers >= _ENOUGH:
            self.tell()

    def tell(self) -> None:
        if not self._found or self._told:
            return
        self._told = True
        logger.warning(
            "%s: %d of %d answers so far hold the model's thought beside the answer (<think>, say),"
            " which a student would be trained on; %s",
            self._name,
            self._found,
            self._answers,
            self._advice,
        )


def watched(
    name: str, batches: Iterable[list[Answer]] | Iterable[list[Answer | Failure]]
) -> Iterator[list[Answer | Failure]]:
    """The batches as they are, with a warning of thoughts in them."""
    thoughts = Thoughts(name, "switch the model's thinking off, or cut its thoughts off before")
    try:
        for batch in batches:
            thoughts.see(batch)
            yield [*batch]
    finally:
        thoughts.tell()
