"""The model card: what a trained model is, where it came from, and how to train it again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from plad_fast.data.file_states import CARD
from plad_fast.data.files import write_atomically
from plad_fast.data.places import expanded, is_there, names_path
from plad_fast.models.loading import ADAPTER_CONFIG

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Settings that may name a file or a folder.
_PLACES = {"model", "teacher", "student", "scorer", "eval_scorer", "prompts", "pairs", "eval_pairs"}
_KIND = re.compile(r"(?:vllm|likelihood|reward):|(?P<other>(?:openai|judge|column|python):)|")
"""Of a teacher or a scorer; what follows an `other` one is no path."""
_PEFT_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}
"""By what PEFT calls the task of adapters."""
_MARK = "<!-- Written by plad_fast and replaced by it until it is edited: {} -->"


def write_card(
    folder: Path,
    *,
    base_model: str,
    facts: Mapping[str, str],
    command: str,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    evaluation: str = "",
    datasets: Sequence[str] = (),
) -> None:
    """Write README.md into the folder of a model; one that somebody edited is left alone.

    Of files and folders on this machine the card has the names only.

    Args:
        folder: of the model.
        base_model: hub id, folder or file that the training began with.
        facts: rows of the first table, such as the teacher, the data and the loss.
        command: which made the model, such as "plad-fast train".
        settings: of that command, as its file of settings takes them.
        versions: of packages.
        evaluation: a table as text; empty before there is one.
        datasets: what the prompts or pairs are from; hub ids get into the metadata.
    """
    path = folder / CARD
    if path.exists() and not is_as_written(path):
        return
    adapters = folder / ADAPTER_CONFIG
    adapted = json.loads(adapters.read_text(encoding="utf-8")) if adapters.exists() else {}
    data = ModelCardData(
        base_model=base_model if _is_hub_id(base_model) else None,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        library_name="peft" if adapted else "transformers",
        tags=["plad_fast", "preference-optimization", "knowledge-distillation"],
    )
    card = ModelCard.from_template(
        data,
        template_str=resources.files(__package__).joinpath("model_card.md.j2").read_text("utf-8"),
        name=folder.resolve().name,
        adapters_on=without_folders(adapted.get("base_model_name_or_path") or base_model)
        if adapted
        else None,
        peft_class=_PEFT_CLASSES.get(adapted.get("task_type", "")),
        facts={"base model": without_folders(base_model), **facts},
        evaluation=evaluation,
        command=command,
        settings=yaml.safe_dump(_without_folders(settings), sort_keys=False).strip(),
        versions=versions,
    )
    text = card.content.strip() + "\n\n"
    write_atomically(path, text + _MARK.format(_digest(text)) + "\n")


def is_as_written(path: Path) -> bool:
    """Whether a file is a card that `write_card` made, and nobody edited since."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, _ = text.rpartition(_MARK.partition("{")[0])
    return bool(mark) and text == body + _MARK.format(_digest(body)) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and not names_path(text) and not is_there(expanded(text))


def without_folders(text: str) -> str:
    """The last part of a path, behind the kind of a teacher or scorer; any other text as it is."""
    kind = _KIND.match(text)
    assert kind is not None  # it matches nothing, too
    place = text[kind.end() :]
    is_path = "/" in place and (names_path(place) or is_there(expanded(place)))
    return f"{kind[0]}{Path(place).name}" if is_path and not kind["other"] else text


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose files and folders have their names only."""
    found = dict(settings)
    for name in _PLACES & settings.keys():
        value = settings[name]
        several = isinstance(value, list)
        found[name] = [*map(without_folders, value)] if several else without_folders(value)
    return found
