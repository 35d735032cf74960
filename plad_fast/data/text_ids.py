"""Token ids of prompts and of responses to them.

A prompt and its response are one text to a model: a tokenizer may write the first token of a
response differently behind its prompt than alone. The ids of a response are those of the whole
text that follow the prompt's, or that follow what all responses leave of the prompt's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

from plad_fast.checks import is_whole
from plad_fast.data.chat import (
    Content,
    Message,
    answer_text,
    as_conversation,
    ends_turn,
    is_blank,
    render_prompt,
    with_eos,
)
from plad_fast.data.chat_template import ChatTemplate, common_length, opened_thought
from plad_fast.data.rows import read_content, read_contents
from plad_fast.data.special_tokens import SpecialText
from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION_SIDES = ("left", "right")


class EncodedGroup(TypedDict):
    """One prompt and its K responses as token ids."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    truncated: bool
    """The prompt was cut."""
    fits: bool
    """False: a response is too long, or leaves the prompt no room for a token; drop the group."""
    moved: str
    """The end of the prompt whose tokens are others once a response follows, or nothing; it is
    where the responses begin."""
    split: str
    """A special token of a message that was encoded as text, or nothing."""


class Specials(NamedTuple):
    """The special tokens a tokenizer puts in front of a text, and how many behind it."""

    front: list[int]
    back: int


class TextIds:
    """Token ids of prompts and responses, by the tokenizer of a student.

    Args:
        tokenizer: of the student.
        encoder_decoder: whether the student is such a model: the prompt is the encoder's text then,
            and the responses are the decoder's.
        split_special_tokens: encode special tokens that stand in chat messages as the text they
            are there; the chat template's own stay tokens, and so do marks of thoughts and tool
            calls. False makes tokens of them, as in plain text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder_decoder: bool = False,
        split_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self._text = SpecialText(tokenizer)
        self._splits = split_special_tokens

    @functools.cached_property
    def specials(self) -> Specials:
        [plain] = self._text.ids(["a"])
        full = self.tokenizer("a")["input_ids"]
        starts = range(len(full) - len(plain) + 1)
        front = next((i for i in starts if full[i : i + len(plain)] == plain), 0)
        return Specials(full[:front], len(full) - front - len(plain))

    @functools.cached_property
    def _added(self) -> Mapping[int, Any]:
        return self.tokenizer.added_tokens_decoder

    def prompt(
        self,
        prompt: Content,
        template: Mapping[str, Any] | None = None,
        *,
        thinks: bool = True,
    ) -> list[int]:
        """Token ids after which the model starts to answer.

        A chat template writes its special tokens itself. Plain text gets the ones the tokenizer
        puts in front (BOS), once, and never those it puts behind (EOS): the text goes on. To an
        encoder the prompt is a text of its own: plain text gets all of the tokenizer's.

        Args:
            prompt: plain text or chat messages.
            template: what the chat template gets beside messages, such as `tools`.
            thinks: False ends before the thought that the chat template opens, as responses without
                a thought are trained.

        Raises:
            UsageError: the prompt has no tokens, so nothing could predict the first response token;
                or messages that the chat template refuses, or that end in the assistant's.
        """
        if isinstance(prompt, str):
            if self.encoder_decoder:
                return _required(self.tokenizer(prompt)["input_ids"])
            return self._started(prompt, self._text.ids([prompt])[0])
        text = render_prompt(self.tokenizer, self._hidden(prompt), self._hidden(template))
        if not thinks:
            text = text.removesuffix(opened_thought(text))
        return _required(self._text.ids([text])[0])

    def encode(
        self,
        prompt: Content,
        responses: Sequence[Content],
        *,
        max_length: int,
        truncation_side: str = "left",
        template: Mapping[str, Any] | None = None,
    ) -> EncodedGroup:
        """Token ids of one prompt and of its responses, whose tokens are those behind the prompt.

        Prompt and response are one text to the tokenizer. Where the last tokens of a prompt are
        others once a response follows (a space that goes with the next word, a generation prompt
        that opens a thought which an answer does without), all responses begin where the prompt and
        a whole text part; `moved` says what of the prompt that is.

        All responses see the same prompt. It is cut, if it must be, so that the longest response
        fits into `max_length` tokens behind it; a BOS token in front survives the cut. Responses
        are never cut: a text cut short is not what its author preferred.

        For an encoder-decoder model prompt and responses have `max_length` tokens to themselves
        each, with the special tokens the tokenizer gives a source and a target, which survive a
        cut; an EOS token ends every response in any case.

        Args:
            prompt: plain text or chat messages.
            responses: K texts or lists of messages, best first; see `data.chat.as_conversation`.
                All keys of such a message go to the chat template, such as `tool_calls`.
            max_length: of prompt and response together; of an encoder-decoder model, of each.
            truncation_side: the side from which a long prompt loses tokens, "left" or "right".
            template: what the chat template gets beside messages, such as `tools`.

        Raises:
            UsageError: a prompt or a response that is neither text nor messages, no responses, a
                message of a response with a key that the chat template does not show, or a
                `max_length` or `truncation_side` that is none.
        """
        check_cut(max_length, truncation_side)
        prompt, answers = as_conversation(
            read_content(prompt, "prompt"), read_contents(responses, "responses")
        )
        ids, response_ids, moved, split = self._group(prompt, answers, template)
        longest = max(map(len, response_ids))
        if self.encoder_decoder:
            front, back = self.specials if isinstance(prompt, str) else Specials([], 0)
            room, bos = max_length - len(front) - back, None
            body = slice(len(front), len(ids) - back)
            fits = longest <= max_length and room >= 1
        else:
            room, bos = max_length - longest, self.tokenizer.bos_token_id
            body = slice(0, len(ids))
            fits = room >= 1
        truncated = len(ids[body]) > room
        # A group that does not fit is left whole: the caller reports and drops it.
        if truncated and fits:
            kept = _cut(ids[body], room, truncation_side, bos)
            ids = [*ids[: body.start], *kept, *ids[body.stop :]]
        return EncodedGroup(
            prompt_ids=ids,
            response_ids=response_ids,
            truncated=truncated,
            fits=fits,
            moved=moved,
            split=split,
        )

    def _group(
        self,
        prompt: Content,
        answers: Sequence[str] | Sequence[Message],
        template: Mapping[str, Any] | None,
    ) -> tuple[list[int], list[list[int]], str, str]:
        """Ids of a prompt and of its responses as `as_conversation` gives them, uncut; and `moved`
        and `split`."""
        if isinstance(prompt, str):
            texts = cast("Sequence[str]", answers)
            if self.encoder_decoder:
                return self.prompt(prompt), [self._target(text) for text in texts], "", ""
            return *self._split(*self._plain(prompt, texts)), ""
        turns, messages, template = map(self._hidden, (prompt, list(answers), template))
        head = render_prompt(self.tokenizer, turns, template)
        chat = ChatTemplate(self.tokenizer, template)
        wholes = [chat.whole(turns, answer, head) for answer in messages]
        texts = [head, *(whole.text for whole in wholes)]
        split = self._text.first_in(texts)
        if self.encoder_decoder:
            texts[1:] = [answer_text(self.tokenizer, head, whole) for whole in wholes]
        head_ids, *ids = self._text.ids(texts)
        if self.encoder_decoder:
            return _required(head_ids), ids, "", split
        end = self.tokenizer.eos_token_id
        for whole, tokens in zip(wholes, ids, strict=True):
            ended = tokens and ends_turn(whole, tokens[-1], end, self._added)
            if end is not None and not ended:
                tokens.append(end)
        return *self._split(_required(head_ids), ids), split

    def _hidden(self, value: Any) -> Any:
        return self._text.hide(value) if self._splits else value

    def _started(self, prompt: str, ids: list[int]) -> list[int]:
        """Ids of a plain-text prompt. One that shows nothing is empty."""
        ids = self._with_front(ids)
        return _required([] if is_blank(prompt) and not self.specials.front else ids)

    def _with_front(self, ids: list[int]) -> list[int]:
        front = self.specials.front
        return ids if ids[: len(front)] == front else front + ids

    def _plain(self, prompt: str, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        wholes = [prompt + with_eos(self.tokenizer, text) for text in texts]
        prompt_ids, *ids = self._text.ids([prompt, *wholes])
        end = self.tokenizer.eos_token_id
        for place, tokens in enumerate(ids):
            if end is not None and tokens[-1:] != [end]:  # its text is not its token everywhere
                text = wholes[place].removesuffix(self.tokenizer.eos_token)
                ids[place] = [*self._text.ids([text])[0], end]
        return self._started(prompt, prompt_ids), [self._with_front(tokens) for tokens in ids]

    def _split(
        self, prompt: list[int], wholes: list[list[int]]
    ) -> tuple[list[int], list[list[int]], str]:
        """The ids of whole texts where they part from their prompt's, and `moved`."""
        shared = min(common_length(prompt, whole) for whole in wholes)
        if shared == 0:
            raise UsageError(
                "the first token of the prompt is another one once a response follows, so nothing "
                "precedes the response; end the prompt in a line break, or drop such short prompts"
            )
        moved = ""
        if end := prompt[shared:]:
            # A space in front is no text to some tokenizers.
            moved = self.tokenizer.decode(end) or "".join(self.tokenizer.convert_ids_to_tokens(end))
        return prompt[:shared], [whole[shared:] for whole in wholes], moved

    def _target(self, response: str) -> list[int]:
        tokenizer = self.tokenizer
        # The tokenizer adds an EOS of its own.
        ids = tokenizer(text_target=response.removesuffix(tokenizer.eos_token or ""))["input_ids"]
        end = tokenizer.eos_token_id
        # Behind it may stand a mark of the language, as mBART's tokenizer writes.
        marked = ids[-2:-1] == [end] and ids[-1] in tokenizer.all_special_ids
        return ids if end is None or ids[-1:] == [end] or marked else [*ids, end]


def _required(prompt_ids: list[int]) -> list[int]:
    if not prompt_ids:
        raise UsageError(
            "a prompt is empty and the tokenizer has no BOS token, so nothing precedes the first "
            "response token; drop empty prompts"
        )
    return prompt_ids


def check_cut(max_length: int, truncation_side: str) -> None:
    """Raise a UsageError unless `max_length` is a whole number and `truncation_side` a side."""
    if not is_whole(max_length):
        raise UsageError(f"max_length must be a whole number of tokens, got {max_length!r}")
    if truncation_side not in TRUNCATION_SIDES:
        raise UsageError(f"truncation_side must be left or right, got {truncation_side!r}")


def _cut(ids: list[int], length: int, side: str, bos: int | None) -> list[int]:
    if side == "right":
        return ids[:length]
    if ids[0] == bos and length > 1:
        return [bos, *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]
