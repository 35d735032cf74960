"""Prompt and response text as a model sees it; sampling, training and scoring share this module.

A prompt is plain text or a list of chat messages (`{"role": ..., "content": ...}`). A response is
plain text or messages that end in the assistant's. One rule holds everywhere: plain text is
continued as it stands, also by a chat model, and messages go through the chat template. To ask a
chat model a plain-text prompt, make messages of it first (`plad_fast.data.prompts.as_messages`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from plad_fast.data.chat_template import (
    ChatTemplate,
    Whole,
    common_length,
    is_tag,
    opened_thought,
)
from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = dict[str, Any]
Messages: TypeAlias = list[Message]
Content: TypeAlias = str | Messages

# White space, control characters, and what Unicode has for no glyph: Default_Ignorable_Code_Point,
# the marks of interlinear annotation, and the blank of Braille.
_BLANK = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, zero-width and format characters only."""
    return _BLANK.fullmatch(text) is not None


def as_conversation(
    prompt: Content, responses: Sequence[Content]
) -> tuple[Content, list[str] | Messages]:
    """A prompt and its responses in the prompt's form: texts, or the assistant's message of each.

    Where a response is messages and the prompt is text, the prompt is what the user said. Messages
    of a response that repeat the prompt are left out; any others are refused (UsageError).
    """
    texts = [response for response in responses if isinstance(response, str)]
    if isinstance(prompt, str):
        if len(texts) == len(responses):
            return prompt, texts
        prompt = [{"role": "user", "content": prompt}]
    return prompt, [_answer(prompt, response) for response in responses]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, template: Mapping[str, Any] | None = None
) -> str:
    """The text after which the model starts to answer messages; `template` is what the chat
    template gets beside these, such as `tools`. UsageError where the template refuses them, or
    does not show tools, calls or results."""
    if prompt[-1]["role"] == "assistant":
        raise UsageError("the prompt ends in an assistant message; cut it off")
    chat = ChatTemplate(tokenizer, template)
    text = chat.text(prompt, generation_prompt=True)
    chat.require_tools_shown(prompt, text)
    return text


def answer_text(tokenizer: PreTrainedTokenizerBase, head: str, whole: Whole) -> str:
    """What a model would write behind a rendered prompt, up to and with its end-of-turn mark.

    A template whose turn ends in something other than the EOS token (Gemma) is honoured; where it
    marks no end of a turn, the EOS token is added. Where the conversation does not begin with the
    prompt (its generation prompt opens a thought, and the answer has none), it is what follows
    their common start.
    """
    tail = whole.text[common_length(head, whole.text) :]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    ended = bool(ids) and ends_turn(
        whole, ids[-1], tokenizer.eos_token_id, tokenizer.added_tokens_decoder
    )
    return tail if ended else tail + (tokenizer.eos_token or "")


def with_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text that ends in the EOS token, once."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def ends_turn(whole: Whole, last: int, end: int | None, added: Mapping[int, Any]) -> bool:
    """Whether a conversation ends in a mark of the end. `last` is its last token, `end` the EOS
    token, and `added` the tokenizer's `added_tokens_decoder`, slow to get where there are
    thousands."""
    return last == end or (whole.marked and last in added and not is_tag(added[last].content))


def opens_thought(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template begins every answer with a thought."""
    if not tokenizer.chat_template:
        return False
    return bool(opened_thought(render_prompt(tokenizer, [{"role": "user", "content": "a"}])))


def turn_end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that closes an answer in the chat template, if it is one added for its meaning."""
    prompt = [{"role": "user", "content": "a"}]
    head = render_prompt(tokenizer, prompt)
    answer = {"role": "assistant", "content": "a"}
    whole = ChatTemplate(tokenizer).whole(prompt, answer, head)
    # Without an EOS token, a template that marks no end closes with the answer itself.
    ids = tokenizer(answer_text(tokenizer, head, whole), add_special_tokens=False)["input_ids"]
    return ids[-1] if ids and ids[-1] in tokenizer.added_tokens_decoder else None


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What a model wrote, letter for letter: without special tokens, but with the marks of thoughts
    and tool calls, which some tokenizers count among these."""
    added = tokenizer.added_tokens_decoder
    if any(i in added and added[i].special and is_tag(added[i].content) for i in ids):
        special = {i for i, token in added.items() if token.special and not is_tag(token.content)}
        ids = [i for i in ids if i not in special]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    else:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def render_conversation(tokenizer: PreTrainedTokenizerBase, prompt: Messages, response: str) -> str:
    """A prompt with its answer, letter for letter as the chat template writes them.

    This is what a reward model has seen; `answer_text` is what a student learns to write.
    """
    return ChatTemplate(tokenizer).text([*prompt, {"role": "assistant", "content": response}])


def written_out(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages for a reader: a judge, or whoever reads a report. Nothing of them is left out."""
    texts = []
    for message in messages:
        said = [message["content"]] if message.get("content") else []
        for key, value in message.items():
            if key not in ("role", "content") and value:
                said.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
        texts.append(f"{message['role']}: " + "\n".join(said))
    return "\n\n".join(texts)


def written_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls of tools as text, in the marks that most models use (Hermes, Qwen)."""
    texts = (json.dumps(call.get("function", call), ensure_ascii=False) for call in calls)
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def _answer(prompt: Messages, response: Content) -> Message:
    if isinstance(response, str):
        return {"role": "assistant", "content": response}
    *before, last = response
    if last["role"] != "assistant":
        raise UsageError(
            f"a response ends in a message of role {last['role']!r}; the last one must be the "
            "assistant's answer"
        )
    if before and _turns(before) != _turns(prompt):
        raise UsageError(
            f"a response holds {len(response)} messages, and those before the last are not the "
            "prompt; move the earlier turns into the prompt, which all responses share"
        )
    return last


def _turns(messages: Messages) -> Messages:
    """To compare: white space around a message may differ."""
    return [{**m, "content": (m.get("content") or "").strip()} for m in messages]
