"""Prompt and response text as a model sees it; sampling, training and scoring share this module.

A prompt is plain text or a list of chat messages (`{"role": ..., "content": ...}`). A response is
plain text or messages that end in the assistant's. One rule holds everywhere: plain text is
continued as it stands, also by a chat model, and messages go through the chat template. To ask a
chat model a plain-text prompt, make messages of it first (`plad_fast.pairs.as_messages`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, str]]
Content: TypeAlias = str | Messages


def as_conversation(prompt: Content, responses: Sequence[Content]) -> tuple[Content, list[str]]:
    """A prompt and the texts of its responses, of whichever form they are.

    Where a response is messages and the prompt is text, the prompt is what the user said. Messages
    of a response that repeat the prompt are left out.

    Raises:
        UsageError: messages of a response that neither repeat the prompt nor are one answer to it.
    """
    if isinstance(prompt, str) and not all(isinstance(response, str) for response in responses):
        prompt = [{"role": "user", "content": prompt}]
    return prompt, [_answer(prompt, response) for response in responses]


def require_unicode(text: str, where: str) -> None:
    """Raises UsageError for a lone surrogate, which JSON can hold but no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} holds {text[error.start]!r}, half of a surrogate pair and no character; "
            "remove it, or write both halves"
        ) from None


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Content, template: Mapping[str, Any] | None = None
) -> str:
    """The text after which the model starts to answer.

    Args:
        tokenizer: its chat template is used for a prompt of messages.
        prompt: plain text, which is returned as it is, or chat messages.
        template: what the chat template gets beside the messages, such as `tools`.

    Raises:
        UsageError: messages for a tokenizer that has no chat template, or that its template
            refuses.
    """
    if isinstance(prompt, str):
        return prompt
    return _apply_template(tokenizer, prompt, add_generation_prompt=True, **(template or {}))


def render_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Content,
    response: Content,
    template: Mapping[str, Any] | None = None,
) -> str:
    """The text a model would produce after `render_prompt`, up to and with its end-of-turn mark.

    For chat messages this is the part of the rendered conversation that follows the prompt, so a
    template whose turn ends in something other than the EOS token (Gemma) is honoured; where it
    marks no end of a turn, the EOS token is added. Where a template renders the earlier turns
    differently once an answer follows, and for plain text, it is the response and the EOS token,
    which a response may bring along.

    Raises:
        UsageError: as `as_conversation` and `render_prompt`.
    """
    prompt, [text] = as_conversation(prompt, [response])
    if not isinstance(prompt, str):
        conversation = [*prompt, {"role": "assistant", "content": text}]
        full = _apply_template(tokenizer, conversation, **(template or {}))
        head = render_prompt(tokenizer, prompt, template)
        if full.startswith(head):
            tail = full[len(head) :].rstrip()
            return tail if _ends_in_mark(tokenizer, tail) else tail + (tokenizer.eos_token or "")
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def render_conversation(tokenizer: PreTrainedTokenizerBase, prompt: Messages, response: str) -> str:
    """A prompt with its answer, letter for letter as the chat template writes them.

    This is what a reward model has seen; `render_response` is what a student learns to write.

    Raises:
        UsageError: as `render_prompt`.
    """
    return _apply_template(tokenizer, [*prompt, {"role": "assistant", "content": response}])


def _answer(prompt: Content, response: Content) -> str:
    if isinstance(response, str):
        return response
    *before, last = response
    if last["role"] != "assistant":
        raise UsageError(
            f"a response ends in a message of role {last['role']!r}; the last one must be the "
            "assistant's answer"
        )
    if before and not _same_turns(before, prompt):
        raise UsageError(
            f"a response holds {len(response)} messages, and those before the last are not the "
            "prompt; move the earlier turns into the prompt, which all responses share"
        )
    return last["content"]


def _same_turns(messages: Messages, prompt: Content) -> bool:
    turns = [
        [(message["role"], message["content"].strip()) for message in side]
        for side in (messages, prompt)
        if not isinstance(side, str)
    ]
    return len(turns) == 2 and turns[0] == turns[1]


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    name = tokenizer.name_or_path or "this tokenizer"
    if not tokenizer.chat_template:
        raise UsageError(
            f"{name} has no chat template, but there are chat messages; pass prompt and responses "
            "as text, or set tokenizer.chat_template"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # a template is a program: it may raise anything
        roles = ", ".join(str(message.get("role")) for message in messages)
        kind = type(error).__name__
        said = str(error) if kind == "TemplateError" else f"{kind}: {error}"
        raise UsageError(
            f"the chat template of {name} refuses messages of the roles {roles} ({said}); change "
            "the messages, such as a system message into the start of the first user message"
        ) from error


def _ends_in_mark(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the last token of a text is one that was added to the vocabulary for its meaning."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and ids[-1] in tokenizer.added_tokens_decoder
