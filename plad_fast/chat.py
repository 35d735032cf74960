"""Prompt and response text as a model sees it; sampling and training share these two functions.

A prompt is plain text or a list of chat messages (`{"role": ..., "content": ...}`). A response is
plain text or the one-element list of an assistant message, as in the standard preference format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, str]]
Content: TypeAlias = str | Messages


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Content) -> str:
    """The text after which the model starts to answer.

    Args:
        tokenizer: its chat template is used for a prompt of messages.
        prompt: plain text, which is returned as it is, or chat messages.

    Raises:
        UsageError: messages for a tokenizer that has no chat template.
    """
    if isinstance(prompt, str):
        return prompt
    _require_template(tokenizer)
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def render_response(tokenizer: PreTrainedTokenizerBase, prompt: Content, response: Content) -> str:
    """The text a model would produce after `render_prompt`, up to and with its end-of-turn mark.

    For chat messages this is the part of the rendered conversation that follows the prompt, so a
    template whose turn ends in something other than the EOS token (Gemma) is honoured. Where a
    template renders the earlier turns differently once an answer follows, and for plain text, it
    is the response followed by the EOS token.

    Raises:
        UsageError: messages for a tokenizer that has no chat template.
    """
    text = response if isinstance(response, str) else response[-1]["content"]
    if not isinstance(prompt, str):
        _require_template(tokenizer)
        conversation = [*prompt, {"role": "assistant", "content": text}]
        full = tokenizer.apply_chat_template(conversation, tokenize=False)
        head = render_prompt(tokenizer, prompt)
        if full.startswith(head):
            return full[len(head) :].rstrip()
    return text + (tokenizer.eos_token or "")


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UsageError(
            f"{tokenizer.name_or_path or 'this tokenizer'} has no chat template, but the prompt is "
            "a list of chat messages; pass the prompt as text, or set tokenizer.chat_template"
        )
