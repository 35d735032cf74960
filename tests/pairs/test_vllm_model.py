"""The calls that vLLM gets, against a recorded stand-in for the package.

Its signatures and checks follow those in vLLM's sources (`LLM.chat`, `LLM.generate`,
`SamplingParams`, `CompletionOutput`).
"""

from __future__ import annotations

import copy
import importlib.machinery
import os
import sys
import types
from dataclasses import dataclass

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from plad_fast.pairs.generation.vllm_model import VllmModel

CHAT = [{"role": "user", "content": "chat"}]


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16

    def __post_init__(self):
        if self.temperature < 1e-5 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")
        if self.top_k < -1:
            raise ValueError("top_k")


@pytest.fixture
def vllm(monkeypatch):
    """The module; it records engines and calls."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.calls, module.engines = [], []
    module.tokenizer = None  # one that is none of transformers

    class LLM:
        def __init__(self, model, *, tensor_parallel_size=1, dtype="auto"):
            if model == "none":
                raise OSError(f"no such model for {os.environ.get('HF_TOKEN')}")
            module.engines.append((model, tensor_parallel_size))

        def get_tokenizer(self):
            return module.tokenizer or types.SimpleNamespace()

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
            prompts = [module.tokenizer.decode(p["prompt_token_ids"]) for p in prompts]
            return self._run("generate", prompts, sampling_params)

        def chat(self, messages, sampling_params=None, use_tqdm=True, lora_request=None):
            assert all(isinstance(conversation, list) for conversation in messages)
            return self._run("chat", messages, sampling_params)

        def _run(self, method, asked, params):
            assert len(asked) == len(params)
            module.calls.append((method, list(asked), list(params)))
            return [self._output(a, p) for a, p in zip(asked, params, strict=True)]

        def _output(self, asked, params):
            text = asked if isinstance(asked, str) else asked[-1]["content"]
            if text == "long":
                raise ValueError("The decoder prompt (length 9000) is longer than the maximum")
            said = "" if text == "mute" else f" {text} {params.seed} "
            reason = {"cut": "length", "abort": "abort"}.get(text, "stop")
            completion = types.SimpleNamespace(
                index=0, text=said, token_ids=[1, 2, 3], finish_reason=reason
            )
            return types.SimpleNamespace(outputs=[completion])

    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def answers(model, contents, sampling):
    prompts = [Prompt(c if isinstance(c, str) else "chat", c) for c in contents]
    items = [item for batch in model.generate(prompts, sampling) for item in batch]
    assert len({(item.prompt_id, item.sample) for item in items}) == len(items)
    return {(item.prompt_id, item.sample): item for item in items}


def test_one_request_a_sample_with_a_seed_of_its_own(vllm):
    model = VllmModel("org/model", tensor_parallel_size=2)
    assert vllm.engines == []  # loaded when it is first asked
    sampling = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, n=2, seed=4)
    items = answers(model, ["a", CHAT, "cut", "mute"], sampling)
    assert vllm.engines == [("org/model", 2)]
    [(method, asked, params)] = vllm.calls
    assert method == "chat"
    assert asked[:3] == [[{"role": "user", "content": "a"}]] * 2 + [CHAT]
    assert all((p.n, p.max_tokens, p.top_p, p.top_k) == (1, 7, 0.9, -1) for p in params)
    assert len({p.seed for p in params}) == 8
    assert items["a", 1] == Answer("a", f"a {params[1].seed}", "stop", 3, 1)
    assert items["cut", 0].finish_reason == "length"
    assert items["mute", 1] == Failure("mute", "the answer is empty", 1)

    assert "'abort'" in answers(model, ["abort"], Sampling())["abort", 0].reason
    again = answers(model, ["cut", "a"], Sampling(temperature=0.5, seed=4))
    assert again["a", 0].text == items["a", 0].text  # whatever else is asked beside it
    assert len(vllm.engines) == 1
    answers(model, ["a"], Sampling(temperature=0, n=3, top_k=5))  # several greedy ones
    assert vllm.calls[-1][2][0].top_k == 5


def test_prompts_are_those_on_which_a_student_is_trained(vllm, tiny_tokenizer):
    """Special tokens in a prompt reach the model as text, and a template is the tokenizer's."""
    vllm.tokenizer = copy.deepcopy(tiny_tokenizer)
    answers(VllmModel("m"), ["a", "b<|end|>", CHAT], Sampling())
    vllm.tokenizer.chat_template = None
    answers(VllmModel("m"), ["a"], Sampling())
    with pytest.raises(UsageError, match=r"prompt 'chat': .*no chat template"):
        answers(VllmModel("m"), [CHAT], Sampling())
    assert [(method, asked) for method, asked, _ in vllm.calls] == [
        (
            "generate",
            [
                "<|bos|><|user|>a<|end|><|assistant|>",
                "<|bos|><|user|>b<|end|><|end|><|assistant|>",
                "<|bos|><|user|>chat<|end|><|assistant|>",
            ],
        ),
        ("generate", ["<|bos|>a"]),
    ]


def test_an_answer_begins_with_the_thought_that_the_template_opens(vllm, tiny_tokenizer):
    vllm.tokenizer = copy.deepcopy(tiny_tokenizer)
    vllm.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    found = answers(VllmModel("m"), ["a"], Sampling())["a", 0]
    assert found.text.startswith("<think>\n<|bos|><|user|>a")


def test_answers_come_by_and_by(vllm, monkeypatch):
    """What is stored between two calls is not lost with a killed run."""
    monkeypatch.setattr("plad_fast.pairs.generation.vllm_model._AT_ONCE", 3)
    prompts = [Prompt(f"{i}", f"{i}") for i in range(4)]
    batches = VllmModel("m").generate(prompts, Sampling(n=2))
    assert len(next(batches)) == 3
    assert len(vllm.calls) == 1
    assert [len(batch) for batch in batches] == [3, 2]


def test_errors_say_what_to_do(vllm, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted-0123456789")
    with pytest.raises(UsageError, match=r"cannot load 'none' .*no such model for \*") as caught:
        VllmModel("none").generate([Prompt("a", "a")], Sampling())
    assert "planted" not in str(caught.value)
    with pytest.raises(UsageError, match=r"longer than the maximum.*shorten"):
        answers(VllmModel("m"), ["long"], Sampling())
    with pytest.raises(UsageError, match="write vllm:MODEL"):
        VllmModel("")


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install vllm"):
        VllmModel("m")
