"""Special tokens that stand as text in a message, told from those that a chat template writes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from plad_fast.data.chat_template import is_tag, template_name
from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Digits come through a template's filters (upper, trim, tojson) as they are.
_MARK = "730941825560271"
_RENAMED = "482260917735164"
_HIDDEN = re.compile(_MARK + r"(\d{7})")


class SpecialText:
    """Hides special tokens in messages from the template's own, and encodes them as text.

    Those are the tokens that the tokenizer calls special and the added ones that stand in the chat
    template, but for marks of thoughts and of tools' calls, which answers write themselves.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def hide(self, value: Any) -> Any:
        """A text, or a structure of lists and mappings, with stand-ins for special tokens in it."""
        if isinstance(value, str):
            if _MARK in value or _RENAMED in value:
                raise UsageError(
                    f"a message holds the digits {_MARK} or {_RENAMED}, with which special tokens "
                    "are told from text; remove them, or set split_special_tokens=False"
                )
            return self._replaced(value, _MARK)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        return [self.hide(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    def shown(self, text: str) -> str:
        """A text with the special tokens for which stand-ins are in it."""
        return _HIDDEN.sub(lambda found: self._texts[int(found[1])], text)

    def first_in(self, texts: Sequence[str]) -> str:
        """The first special token that is hidden in one of the texts, or nothing."""
        found = next((found for text in texts if (found := _HIDDEN.search(text))), None)
        return "" if found is None else self._texts[int(found[1])]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts; what is hidden in them is encoded as text. Raises UsageError
        where the tokenizer cannot tell a special token from its text."""
        token = self.first_in(texts)
        if not token:
            return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError(
                f"a message holds {token!r}, a special token of {template_name(self.tokenizer)}, "
                "which only a fast tokenizer can encode as text; remove it from the message, load "
                "the fast tokenizer, or set split_special_tokens=False to make a token of it"
            )
        renamed = [self.shown(self._replaced(text, _RENAMED)) for text in texts]
        encodings = self._renamed.encode_batch(renamed, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @functools.cached_property
    def _tokens(self) -> dict[str, int]:
        tokenizer = self.tokenizer
        template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
        named = set(tokenizer.all_special_ids)  # such as the EOS token; ByT5's is not marked
        found = {}
        for index, token in tokenizer.added_tokens_decoder.items():
            text = token.content
            written = text in template and re.search(r"[<\[|\uff5c]", text)
            special = token.special or index in named or written
            if special and text.strip() and not is_tag(text):
                found[text] = index
        return found

    @functools.cached_property
    def _texts(self) -> dict[int, str]:
        return {index: text for text, index in self._tokens.items()}

    def _replaced(self, text: str, mark: str) -> str:
        """A text whose special tokens are a mark and their number each, the longest ones first.

        Not by one regular expression: a Gemma has thousands of them.
        """
        parts, done = [], 0
        for found in self._starts.finditer(text):
            at = found.start()
            pieces = (text[at : at + length] for length in self._lengths)
            token = next((piece for piece in pieces if piece in self._tokens), None)
            if token is not None and at >= done:
                parts += [text[done:at], f"{mark}{self._tokens[token]:07}"]
                done = at + len(token)
        return "".join([*parts, text[done:]])

    @functools.cached_property
    def _starts(self) -> re.Pattern[str]:
        return re.compile(
            "|".join(re.escape(c) for c in {token[0] for token in self._tokens}) or "(?!)"
        )

    @functools.cached_property
    def _lengths(self) -> list[int]:
        return sorted({len(token) for token in self._tokens}, reverse=True)

    @functools.cached_property
    def _renamed(self) -> Tokenizer:
        """The tokenizer with other texts for its special tokens: theirs are like any other then."""
        from tokenizers import Tokenizer

        backend: Any = self.tokenizer
        state = json.loads(backend.backend_tokenizer.to_str())
        new = {text: f"{_RENAMED}{index:07}" for text, index in self._tokens.items()}
        for token in state["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        model = state["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {new.get(piece, piece): i for piece, i in vocabulary.items()}
        else:
            model["vocab"] = [[new.get(piece, piece), score] for piece, score in vocabulary]
        if model.get("unk_token") in new:
            model["unk_token"] = new[model["unk_token"]]
        # What stands around a text, and its length, are no part of it.
        state |= {"post_processor": None, "truncation": None, "padding": None}
        renamed = Tokenizer.from_str(json.dumps(state))
        wrong = [
            text for text, index in self._tokens.items() if renamed.token_to_id(new[text]) != index
        ]
        if wrong:
            raise UsageError(
                f"a message holds a special token as text, and {template_name(self.tokenizer)} "
                f"cannot be made to tell {wrong[0]!r} from its text; remove special tokens from "
                "messages, or set split_special_tokens=False to make tokens of them"
            )
        return renamed
