"""Small tokenizers of the kinds in use, trained in code, and chat templates as models ship them."""

from __future__ import annotations

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The sky is blue and the grass is green.\n\nAnswer:\nblue",
    "user assistant system [INST] sky? [/INST] What is the sky? It is blue, it is green!\n",
    "Question: 2 + 2 = 4\nAnswer: 4 . Is it so ? Yes, it is .\n\n\n    return x\n",
] * 20

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
MARKS = [
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|ad_hoc|>"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
]
SPECIALS = [PAD, UNK, BOS, EOS, *MARKS]


def byte_level():
    """GPT-2's, Llama 3's and Qwen's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def single_bytes():
    """A token a byte, and no merges: what is written can be read off the tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def sentencepiece_bpe(scheme: str):
    """Llama 2's (`scheme` "legacy": a normalizer puts a space before every text), Mistral's or
    Gemma's kind (a scheme of `Metaspace`)."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    if scheme == "legacy":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=180,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer


def unigram():
    """T5's and XLM-R's kind."""
    letters = [(chr(c), -6.0) for c in range(33, 127)]
    words = [("▁sky", -3.0), ("▁is", -3.0), ("▁blue", -3.0), ("blue", -4.0), ("gre", -4.0)]
    vocabulary = [*((token, 0.0) for token in SPECIALS), ("▁", -3.0), ("\n", -3.0)]
    tokenizer = Tokenizer(models.Unigram([*vocabulary, *letters, *words], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def word_piece():
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    alphabet = [chr(c) for c in range(33, 127)]
    _train(
        tokenizer,
        trainers.WordPieceTrainer(
            vocab_size=300,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer


def _train(tokenizer, trainer):
    tokenizer.train_from_iterator(CORPUS, trainer)


def load(backend, template=None, *, eos=EOS, bos=True):
    """As transformers loads it; `bos`: it puts BOS in front of every text."""
    if bos:
        index = backend.token_to_id(BOS)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, index)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=eos,
        pad_token=PAD,
        unk_token=UNK,
        chat_template=template,
    )


TEMPLATES = {
    "llama-2": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls %}<tool_call>\n{{ call | tojson }}\n</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # Opens a thought, and takes thoughts away.
    "deepseek-r1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>"  # noqa: RUF001
        "{{ m.content }}{% else %}<｜Assistant｜>"  # noqa: RUF001
        "{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"  # noqa: RUF001
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>"  # noqa: RUF001
        "<think>\n{% endif %}"
    ),
    # Opens a thought, and writes an empty one where an answer has none.
    "nemotron": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and '</think>' not in m.content %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
}

CASES = {
    "llama-2, Prepend normalizer": lambda: load(sentencepiece_bpe("legacy"), TEMPLATES["llama-2"]),
    "zephyr, Prepend normalizer": lambda: load(sentencepiece_bpe("legacy"), TEMPLATES["zephyr"]),
    "llama-2, Metaspace always": lambda: load(sentencepiece_bpe("always"), TEMPLATES["llama-2"]),
    "zephyr, Metaspace first": lambda: load(sentencepiece_bpe("first"), TEMPLATES["zephyr"]),
    "mistral, Metaspace first": lambda: load(sentencepiece_bpe("first"), TEMPLATES["mistral"]),
    "gemma, Metaspace never": lambda: load(sentencepiece_bpe("never"), TEMPLATES["gemma"]),
    "llama-3, byte-level": lambda: load(byte_level(), TEMPLATES["llama-3"], eos="<|eot_id|>"),
    "qwen, byte-level": lambda: load(byte_level(), TEMPLATES["qwen"], eos="<|im_end|>", bos=False),
    "deepseek-r1, byte-level": lambda: load(
        byte_level(),
        TEMPLATES["deepseek-r1"],
        eos="<｜end▁of▁sentence｜>",  # noqa: RUF001
    ),
    "nemotron, byte-level": lambda: load(byte_level(), TEMPLATES["nemotron"], eos="<|im_end|>"),
    "qwen, Unigram": lambda: load(unigram(), TEMPLATES["qwen"], eos="<|im_end|>"),
    "zephyr, WordPiece": lambda: load(word_piece(), TEMPLATES["zephyr"]),
}
