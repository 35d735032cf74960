"""Chat messages as the text that a tokenizer's chat template makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

# Tokens that are part of an answer, not marks around it.
_TAG = re.compile(r"think|thought|reason|tool|function|(?<![a-z])action|python_tag", re.IGNORECASE)
# (?:seed:)? is Seed-OSS's, [THINK] Magistral's, <|START_THINKING|> Cohere's.
_OPENED = r"(?:<(?:seed:)?(?:think|thinking|thought|reasoning)>|\[THINK\]|<\|START_THINKING\|>)"
_CLOSED = r"(?:</(?:seed:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|END_THINKING\|>)"
_OPENS = re.compile(rf"\s*{_OPENED}")
_CLOSES = re.compile(_CLOSED)
_TAGS = re.compile(f"{_OPENED}|{_CLOSED}")
_EMPTY = re.compile(rf"\s*{_OPENED}\s*{_CLOSED}\s*")
_LEFT_OPEN = re.compile(rf"({_OPENED})(\s*)\Z")
_LEFT_EMPTY = re.compile(rf"({_OPENED})\s*{_CLOSED}\s*\Z")
# Names of one thing: transformers 5 gives a template all of them for one.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PROBE = "plad-fast"


class Whole(NamedTuple):
    """A conversation with its answer."""

    text: str
    """Without white space behind the end of the answer's turn."""

    marked: bool
    """Whether the template wrote something behind the answer."""


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two texts or lists begin with alike."""
    if second[: len(first)] == first:
        return len(first)
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, len(second))


def is_tag(token: str) -> bool:
    """Whether a token of the vocabulary begins or ends a thought or a tool's call."""
    return bool(_TAG.search(token))


def opened_thought(text: str) -> str:
    """The mark of a thought, with the white space behind it, that a rendered prompt ends in."""
    opened = _LEFT_OPEN.search(text)
    return opened[0] if opened else ""


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "this tokenizer"


class ChatTemplate(NamedTuple):
    """A tokenizer's chat template, with what it gets beside messages, such as `tools`."""

    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any] | None = None

    def text(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The text of messages; UsageError where there is no template, or it refuses them."""
        if all(message.get("content") is not None for message in messages):
            return self._render(messages, generation_prompt)
        # Some templates ask for a null content, and some write "None".
        filled = [m if m.get("content") is not None else {**m, "content": ""} for m in messages]
        text = self._render(filled, generation_prompt)
        try:
            given = self._render(messages, generation_prompt)
        except UsageError:
            return text
        return text if given.count("None") > text.count("None") else given

    def whole(self, prompt: Sequence[Message], answer: Message, head: str) -> Whole:
        """A prompt and its answer, as the model that is given `head` should write it.

        That is the template's text, which need not begin with `head`: the generation prompt may
        open a thought that a plain answer does without. Where the template takes an answer's own
        thought away, or renders the prompt differently once an answer follows, the answer stands
        behind `head`, less a tag that `head` has opened already, and before the template's end of
        a turn.

        Raises:
            UsageError: the answer has a key that the template does not show, or that cannot be
                shown without it.
        """
        full = self.text([*prompt, answer])
        content = answer.get("content") or ""
        extra = [k for k in answer if k not in ("role", "content") and not _is_empty(answer[k])]
        for key in [*extra, "content"] if extra and content.strip() else extra:
            self._require_shown(prompt, answer, key, full)
        thinks = _thinks(content, head)
        common = common_length(head, full)
        twice = thinks and any(key in _REASONING for key in extra)
        if not thinks or (not twice and _keeps_thought(content, head, full)):
            if common == len(head):
                return _whole(head + full[common:].rstrip(), content)
            if not (thinks and _LEFT_OPEN.search(head)) and full.startswith(
                self.text(prompt).rstrip()
            ):
                return _whole(full.rstrip(), content)
        if extra:
            raise UsageError(
                f"the response has {', '.join(extra)}, and the chat template of "
                f"{template_name(self.tokenizer)} does not render it behind its prompt (the "
                "content has a thought too, which it drops or doubles, or it writes earlier turns "
                "differently then); leave the row out, or set another tokenizer.chat_template"
            )
        probe = self.text([*prompt, {"role": "assistant", "content": _PROBE}]).rstrip()
        end = probe.rpartition(_PROBE)[2] if _PROBE in probe else ""
        return _whole(_continued(head, content, thinks) + end, content)

    def require_tools_shown(self, prompt: Sequence[Message], text: str) -> None:
        """Raises UsageError where the template leaves tools, calls or results of a prompt out of
        its text."""
        called = [m for m in prompt if not _is_empty(m.get("tool_calls"))]
        told = [m for m in prompt if m.get("role") == "tool"]
        others: dict[str, tuple[ChatTemplate, list[Message]]] = {}
        if not _is_empty((self.options or {}).get("tools")):
            options = {
                name: value for name, value in (self.options or {}).items() if name != "tools"
            }
            others["tools"] = self._replace(options=options), [*prompt]
        if called:
            kept = [{**m, "tool_calls": None} if m in called else m for m in prompt]
            others["tool_calls"] = self, kept
        if told:
            kept = [{**m, "content": _PROBE} if m in told else m for m in prompt]
            others["messages of the role tool"] = self, kept
        for what, (template, messages) in others.items():
            try:
                ignored = template.text(messages, generation_prompt=True) == text
            except UsageError:
                continue
            if ignored:
                raise UsageError(
                    f"the prompt has {what}, which the chat template of "
                    f"{template_name(self.tokenizer)} does not show: they would be lost; leave the "
                    "row out, or set a tokenizer.chat_template that shows them"
                )

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        name = template_name(self.tokenizer)
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"{name} has no chat template, but there are chat messages; pass prompt and "
                "responses as text, or set tokenizer.chat_template"
            )
        template: Any = self.tokenizer.apply_chat_template
        try:
            return template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **(self.options or {}),
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            roles = ", ".join(str(message.get("role")) for message in messages)
            kind = type(error).__name__
            said = str(error) if kind == "TemplateError" else f"{kind}: {error}"
            raise UsageError(
                f"the chat template of {name} refuses messages of the roles {roles} ({said}); "
                "change the messages, such as a system message into the start of the first user "
                "message"
            ) from error

    def _require_shown(
        self, prompt: Sequence[Message], answer: Message, key: str, full: str
    ) -> None:
        same = {key}
        if key in _REASONING:
            same = {name for name in _REASONING if answer.get(name) == answer[key]}
        without = {name: value for name, value in answer.items() if name not in same}
        without.setdefault("content", "")
        try:
            ignored = self.text([*prompt, without]) == full
        except UsageError:
            return
        if ignored:
            raise UsageError(
                f"a message of the response has the key {key!r}, which the chat template of "
                f"{template_name(self.tokenizer)} does not show there: it would be lost; leave "
                "the key out, put what it says into another one, or set a tokenizer.chat_template "
                "that shows it"
            )


def _whole(text: str, content: str) -> Whole:
    content = content.rstrip()
    return Whole(text, marked=not content or not text.endswith(content))


def _thinks(content: str, head: str) -> bool:
    """Whether an answer brings a thought, or the end of one, in the tags that `head` writes."""
    written = _LEFT_OPEN.search(head) or _LEFT_EMPTY.search(head)
    if written is None:
        return bool(_OPENS.match(content) or _CLOSES.search(content))
    return content.lstrip().startswith(written[1]) or _closing(written[1]) in content


def _closing(tag: str) -> str:
    return tag.replace("START", "END") if "START" in tag else f"{tag[0]}/{tag[1:]}"


def _keeps_thought(content: str, head: str, full: str) -> bool:
    """Whether a template shows all of an answer with a thought, however spaced, and no other
    thought before it."""
    written = _LEFT_OPEN.search(head) or _LEFT_EMPTY.search(head)
    start = common_length(head[: written.start()] if written else head, full)
    turn = full[start:]
    empty = _EMPTY.match(turn)
    if empty and _TAGS.search(turn, empty.end()):
        return False
    if _CLOSES.search(content) and not _CLOSES.search(turn):
        return False
    # Marks of its own may stand between the thought and the answer.
    turn, at = "".join(turn.split()), 0
    for part in ("".join(part.split()) for part in _TAGS.split(content)):
        at = turn.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def _continued(head: str, content: str, thinks: bool) -> str:
    """An answer behind a generation prompt, which may have opened a thought or closed one."""
    opened, empty = _LEFT_OPEN.search(head), _LEFT_EMPTY.search(head)
    if not thinks:  # outside of a thought
        return (head[: opened.start()] if opened else head) + content
    own = _OPENS.match(content)
    if opened:
        if own is None:
            return head + content
        rest, gap = content[own.end() :], opened[2]
        return head + (rest[len(gap) :] if rest.startswith(gap) else rest.lstrip())
    if empty:
        return head[: empty.start()] + ("" if own else f"{empty[1]}\n") + content
    return head + content


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)
