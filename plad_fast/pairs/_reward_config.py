"""What the config of a reward model tells before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plad_fast._load_errors import reason_of
from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KIND = "ForSequenceClassification"


def split_label(rest: str) -> tuple[str, int | str | None]:
    """Model and label of `MODEL#LABEL`; the label is None where none is named.

    A hub id has no `#`, and a folder that has one in its name is found by its whole name.
    """
    model, mark, label = rest.rpartition("#")
    if not mark or Path(rest).expanduser().exists():
        return rest, None
    if not model or not label:
        raise UsageError(f"reward:{rest} lacks a model or a label; write reward:MODEL#LABEL")
    return model, int(label) if label.isdecimal() else label


def read_reward_config(source: str) -> PretrainedConfig | None:
    """The config of a sequence-classification model; None for adapters, which have none.

    Raises:
        UsageError: there is none, or it is of a model of another kind.
    """
    import transformers

    mapping = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a library makes of a foreign or a damaged file
        raise UsageError(
            f"cannot load a reward model from {source!r}; pass a hub id or folder of a "
            f"sequence-classification model (transformers says: {reason_of(error)})"
        ) from error
    names = list(config.architectures or ())
    # A name that transformers does not know may be somebody's own for a model that it can load.
    known = [name for name in names if hasattr(transformers, name)]
    if known and not any(name.endswith(_KIND) for name in known):
        raise UsageError(
            f"{source!r} is a {known[0]} and no reward model, which is a sequence classifier "
            f"(...{_KIND}); pass one that was trained as such, or score by likelihood:MODEL"
        )
    if type(config) not in mapping:
        raise UsageError(
            f"{source!r} is of type {config.model_type!r}, of which transformers has no sequence "
            "classifier; pass another reward model"
        )
    return config
