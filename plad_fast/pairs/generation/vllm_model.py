"""A model that vLLM runs in this process as a source of text."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plad_fast.data.chat import Content, is_blank
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.model import as_chat, request_seed
from plad_fast.pairs.generation.endpoint.secrets import one_line
from plad_fast.pairs.generation.finish import known_end
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from plad_fast.pairs.generation.thoughts import watched

_AT_ONCE = 512  # requests in a call: what a killed run loses, and enough to keep a GPU busy


class VllmModel:
    """A model for vLLM's `LLM` class, which is loaded when it is first asked.

    Args:
        model: hub id or folder.
        name: for progress and messages.
        engine_options: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        UsageError: vLLM is not installed.
    """

    def __init__(self, model: str, name: str | None = None, **engine_options: Any) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "vLLM is not installed; run: pip install vllm (on Linux with a GPU), or serve the "
                "model elsewhere and use openai:MODEL with --base-url"
            )
        if not model:
            raise UsageError("no model is named; write vllm:MODEL")
        self.model = model
        self.name = model if name is None else name
        self._engine_options = engine_options
        self._engine: Any = None

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[list[Answer | Failure]]:
        """Yields the answers of one engine call after the other.

        Plain text is asked as a message of the user if the tokenizer has a chat template, as
        `LocalModel` does. Every sample is a request with a seed of its own: vLLM does not give
        several greedy answers in one, and shares the prompt's computation between requests.

        Raises:
            UsageError: from this call: the model cannot be loaded. From the iterator: vLLM refuses
                a prompt, such as one too long for the model.
        """
        return self.generate_samples([(p, k) for p in prompts for k in range(sampling.n)], sampling)

    def generate_samples(
        self, wanted: Sequence[tuple[Prompt, int]], sampling: Sampling
    ) -> Iterator[list[Answer | Failure]]:
        """As `generate`, of each prompt the samples of these numbers alone."""
        self._load()
        starts = range(0, len(wanted), _AT_ONCE)
        return watched(
            self.name, (self._answer(wanted[i : i + _AT_ONCE], sampling) for i in starts)
        )

    def _load(self) -> None:
        if self._engine is not None:
            return
        try:
            self._engine = _vllm().LLM(model=self.model, **self._engine_options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"vLLM cannot load {self.model!r} ({one_line(str(error))}); check the name and the "
                "GPU's free memory"
            ) from error

    def _answer(
        self, asked: Sequence[tuple[Prompt, int]], sampling: Sampling
    ) -> list[Answer | Failure]:
        make = _vllm().SamplingParams
        params = [
            make(
                n=1,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,  # older versions take no 0 for all tokens
                max_tokens=sampling.max_new_tokens,
                seed=request_seed(sampling.seed, prompt.id) + sample,
            )
            for prompt, sample in asked
        ]
        contents = [prompt.content for prompt, _ in asked]
        tokenizer = self._engine.get_tokenizer()
        # A tokenizer that brings its own way of chatting (Mistral's) has no such attribute.
        chats = getattr(tokenizer, "chat_template", True)
        outputs: list[Any] = [None] * len(asked)
        plain = [i for i, content in enumerate(contents) if isinstance(content, str) and not chats]
        tokens = _as_tokens(tokenizer, {i: c for i, c in enumerate(contents) if i not in plain})
        as_messages = [i for i in range(len(asked)) if i not in {*plain, *tokens}]
        try:
            if tokens:
                found = self._engine.generate(
                    [{"prompt_token_ids": ids} for ids in tokens.values()],
                    [params[i] for i in tokens],
                    use_tqdm=False,
                )
                _place(outputs, list(tokens), found)
            if plain:
                found = self._engine.generate(
                    [contents[i] for i in plain], [params[i] for i in plain], use_tqdm=False
                )
                _place(outputs, plain, found)
            if as_messages:
                found = self._engine.chat(
                    [as_chat(contents[i]) for i in as_messages],
                    [params[i] for i in as_messages],
                    use_tqdm=False,
                )
                _place(outputs, as_messages, found)
        except ValueError as error:
            raise UsageError(
                f"vLLM refuses a prompt for {self.model!r} ({one_line(str(error))}); shorten or "
                "drop such prompts, or change the sampling"
            ) from error
        return [
            _read(output.outputs[0], prompt.id, sample)
            for output, (prompt, sample) in zip(outputs, asked, strict=True)
        ]


def _vllm() -> Any:
    return importlib.import_module(
        "vllm"
    )  # takes long, and is not installed where types are checked


def _as_tokens(tokenizer: Any, contents: Mapping[int, Content]) -> dict[int, list[int]]:
    """Token ids of the chats with a special token in a message, which vLLM would not read as text.

    They are those on which a student is trained.
    """
    if not hasattr(tokenizer, "added_tokens_decoder"):
        return {}
    from plad_fast.data.text_ids import TextIds

    encoder = TextIds(tokenizer)
    chats = {i: as_chat(content) for i, content in contents.items()}
    return {i: encoder.prompt(chat) for i, chat in chats.items() if encoder.holds_special(chat)}


def _place(outputs: list[Any], where: Sequence[int], found: Sequence[Any]) -> None:
    for i, output in zip(where, found, strict=True):
        outputs[i] = output


def _read(completion: Any, prompt_id: str, sample: int) -> Answer | Failure:
    text = completion.text.strip()
    if is_blank(text):
        return Failure(prompt_id, "the answer is empty", sample)
    end = known_end(completion.finish_reason)
    if end not in ("stop", "length"):
        reason = f"the answer ended by {completion.finish_reason!r}, which is no end of a whole one"
        return Failure(prompt_id, reason, sample)
    return Answer(prompt_id, text, end, len(completion.token_ids), sample)
