"""A model and a tokenizer small enough to run anywhere, made in code: tests reach no hub."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell has what it starts in the background ignore Ctrl-C, and so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
import torch

# Importing what the tests need is faster without; see `frozen_heap`.
gc.disable()

# Read when a kernel is defined: without a GPU all of them are interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    importlib.import_module("tests.support.triton_34")
    importlib.import_module("tests.support.bfloat16_cast")

# The same cases on every machine, and no time limit: these machines are shared. `make test-all`
# takes the profile "all".
for profile, examples in (("all", 60), ("plad", 25)):
    hypothesis.settings.register_profile(
        profile, deadline=None, derandomize=True, max_examples=examples
    )
hypothesis.settings.load_profile("plad")

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]

# BOS is part of the text, as in Llama's template: a tokenizer that adds it again doubles it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Collections of garbage, such as every start of a Trainer, pass by what is there already: all
    that the libraries hold takes a quarter of a second to look through."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token a byte, plus special tokens; 262 in all. It adds BOS to plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([PAD, BOS, END, *ROLES, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, END, *ROLES])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer):
    """A random Llama of two layers for the tiny tokenizer, in evaluation mode.

    It is shared by the session: a test that trains it works on a deep copy.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_teacher(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A folder with a tiny model that ends its answers, which a random one hardly does."""
    import copy

    folder = tmp_path_factory.mktemp("teacher")
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.lm_head.weight[tiny_tokenizer.eos_token_id] *= 4
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def no_plots(monkeypatch):
    """For tests that run a recipe again and again: plots take most of the time of one that is
    done already."""
    monkeypatch.setattr("plad_fast.evaluation.report.write.draw_plots", lambda *_, **__: [])


@pytest.fixture(scope="session")
def finished_run(tiny_teacher, tmp_path_factory):
    """The folder of a run that `arguments(tiny_teacher, folder)` filled; tests read it, or copy it
    first."""
    from plad_fast.cli import main
    from tests.support.recipe_runs import arguments

    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(tiny_teacher, folder)) == 0
    return folder


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Makes trainers on copies of the tiny model; see `tests.support.trainings.build`."""
    from tests.support.trainings import build

    # transformers 4 leaves bf16 there for all trainers that follow.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    return functools.partial(build, tiny_model, tiny_tokenizer, tmp_path)
