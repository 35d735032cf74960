"""A model that vLLM runs in this process as a source of text."""

from __future__ import annotations

import importlib
from typing import Any

from plad_fast.checks import require_packages
from plad_fast.data.chat import is_blank
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.access import one_line
from plad_fast.pairs.generation.endpoint.model import as_chat, request_seed
from plad_fast.pairs.generation.local_model import prompt_ids, thought_before
from plad_fast.pairs.generation.reasoning import known_end
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Batches, Failure, TextModel, Wanted

_AT_ONCE = 512  # requests in a call: what a killed run loses, and enough to keep a GPU busy


class VllmModel(TextModel):
    """A model for vLLM's `LLM` class, which is loaded when it is first asked.

    It reads prompts by the tokens that `LocalModel` makes of them. Every sample is a request with a
    seed of its own: vLLM does not give several greedy answers in one, and shares the prompt's
    computation between requests.

    Args:
        model: hub id or folder.
        name: for progress and messages.
        engine_options: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        UsageError: vLLM is not installed.
    """

    def __init__(self, model: str, name: str | None = None, **engine_options: Any) -> None:
        require_packages("vllm")
        if not model:
            raise UsageError("no model is named; write vllm:MODEL")
        self.model = model
        self.name = model if name is None else name
        self._engine_options = engine_options
        self._engine: Any = None

    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Batches:
        """Yields the answers of one engine call after the other.

        Raises:
            UsageError: from this call: the model cannot be loaded. From the iterator: vLLM refuses
                a prompt, such as one too long for the model.
        """
        vllm = importlib.import_module("vllm")  # it takes long, and is not there for mypy
        if self._engine is None:
            try:
                self._engine = vllm.LLM(model=self.model, **self._engine_options)
            except (OSError, ValueError, RuntimeError) as error:
                raise UsageError(
                    f"vLLM cannot load {self.model!r} ({one_line(str(error))}); check the name and "
                    "the GPU's free memory"
                ) from error
        starts = range(0, len(wanted), _AT_ONCE)
        return (self._answer(wanted[i : i + _AT_ONCE], sampling, vllm) for i in starts)

    def _answer(self, asked: Wanted, sampling: Sampling, vllm: Any) -> list[Answer | Failure]:
        params = [
            vllm.SamplingParams(
                n=1,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,  # older versions take no 0 for all tokens
                max_tokens=sampling.max_new_tokens,
                seed=request_seed(sampling.seed, prompt.id) + sample,
            )
            for prompt, sample in asked
        ]
        tokenizer = self._engine.get_tokenizer()
        opened = {}
        call: Any
        inputs: list[Any]
        if hasattr(tokenizer, "added_tokens_decoder"):  # one of transformers
            ids = prompt_ids(tokenizer, [prompt for prompt, _ in asked])
            opened = {key: thought_before(tokenizer, tokens) for key, tokens in ids.items()}
            call = self._engine.generate
            inputs = [{"prompt_token_ids": ids[prompt.id]} for prompt, _ in asked]
        elif any(prompt.has_tools for prompt, _ in asked):
            raise UsageError(f"{self.model!r} has a tokenizer of its own, which is given no tools")
        else:  # one with its own way of chatting, such as Mistral's
            call, inputs = self._engine.chat, [as_chat(prompt.content) for prompt, _ in asked]
        try:
            outputs = call(inputs, params, use_tqdm=False)
        except ValueError as error:
            raise UsageError(
                f"vLLM refuses a prompt for {self.model!r} ({one_line(str(error))}); shorten or "
                "drop such prompts, or change the sampling"
            ) from error
        return [
            _read(output.outputs[0], prompt.id, sample, opened.get(prompt.id, ""))
            for output, (prompt, sample) in zip(outputs, asked, strict=True)
        ]


def _read(completion: Any, prompt_id: str, sample: int, opened: str) -> Answer | Failure:
    text = completion.text.strip()
    if is_blank(text):
        return Failure(prompt_id, "the answer is empty", sample)
    end = known_end(completion.finish_reason)
    if end not in ("stop", "length"):
        reason = f"the answer ended by {completion.finish_reason!r}, which is no end of a whole one"
        return Failure(prompt_id, reason, sample)
    return Answer(prompt_id, opened + text, end, len(completion.token_ids), sample)
