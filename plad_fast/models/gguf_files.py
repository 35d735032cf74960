"""What transformers does with GGUF files, put right."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READING = threading.RLock()


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within this each GGUF file's header is read once. transformers reads it for the config, the
    weights and the tokenizer, and lists the names of tensors for every module: most of the time
    that a small model takes. One thread at a time."""
    try:
        import gguf
    except ImportError:
        yield
        return
    # A folder of that name may be taken for the package.
    names = [name for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)]
    with _READING:
        functions = {name: getattr(gguf, name) for name in names}
        try:
            for name, function in functions.items():
                setattr(gguf, name, functools.cache(function))
            yield
        finally:
            for name, function in functions.items():
                setattr(gguf, name, function)


def set_gguf_eos(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """transformers 4 takes the BOS token of a Llama's GGUF file for its EOS token."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.eos_token_id")
    if field is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(field.contents()))


def keep_dense(location: dict[str, Any]) -> None:
    """Asks for dense weights where transformers would otherwise keep the GGUF blocks packed."""
    try:
        from transformers import GgufConfig
    except ImportError:  # such versions always dequantise
        return
    location["quantization_config"] = GgufConfig(dequantize=True)
