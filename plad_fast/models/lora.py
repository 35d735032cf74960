"""LoRA adapters of PEFT put on a saved model, to be trained in place of its weights."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from plad_fast.checks import require_packages
from plad_fast.data.places import expanded, is_there
from plad_fast.errors import UsageError, reported_as
from plad_fast.models.devices import best_device
from plad_fast.models.loading import load_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
_SETTINGS = ("lora_r", "lora_alpha", "lora_targets", "lora_dropout", "load_in_4bit")


@dataclass(frozen=True)
class Lora:
    """LoRA, Hu et al. 2021, arXiv 2106.09685: x @ weight.T + alpha / r * up(down(dropout(x))).

    Raises:
        UsageError: PEFT is missing; for 4 bits bitsandbytes, or a GPU.
    """

    r: int
    alpha: float | None = None
    """None takes 2 * r."""
    targets: str | None = None
    """Names of linear layers, with commas; "all-linear", or None, are all but the head."""
    dropout: float = 0.0
    in_4bit: bool = False
    """The frozen weights are quantised to four bits, NF4 (QLoRA, Dettmers et al. 2023,
    arXiv 2305.14314)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", 2.0 * self.r if self.alpha is None else self.alpha)
        object.__setattr__(self, "targets", self.targets or ALL_LINEAR)
        if self.in_4bit:
            _require_gpu()
        require_packages("peft", *(["bitsandbytes"] if self.in_4bit else []))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Lora | None:
        """By the names of the command line; None without `lora_r`."""
        r, alpha, targets, dropout, in_4bit = (settings.get(name) for name in _SETTINGS)
        return None if r is None else cls(r, alpha, targets, dropout or 0.0, bool(in_4bit))

    def settings(self) -> dict[str, Any]:
        """By the names of the command line, as JSON values."""
        return dict(zip(_SETTINGS, dataclasses.astuple(self), strict=True))

    @property
    def target_modules(self) -> str | list[str]:
        """As PEFT takes them."""
        assert self.targets is not None
        if self.targets == ALL_LINEAR:
            return ALL_LINEAR
        return [name.strip() for name in self.targets.split(",")]

    def check(self, model: PreTrainedModel) -> None:
        """Raises UsageError unless the model has all target layers, and each of them alone."""
        weights = {
            name: part.weight
            for name, part in model.named_modules()
            if getattr(part, "weight", None) is not None
        }
        for target in [] if self.targets == ALL_LINEAR else self.target_modules:
            found = [w for name, w in weights.items() if f".{name}".endswith(f".{target}")]
            if not found:
                linear = {name.rpartition(".")[2] for name, w in weights.items() if w.ndim > 1}
                raise UsageError(
                    f"--lora-targets {self.targets}: the model has no layer {target!r}; it has "
                    f"{', '.join(sorted(linear))}"
                )
            if any(sum(w is weight for w in weights.values()) > 1 for weight in found):
                raise UsageError(
                    f"--lora-targets {self.targets}: {target!r} shares its weights with another "
                    "layer, so that adapters there could not be merged; leave it out"
                )


def load_with_lora(
    source: str | os.PathLike[str], lora: Lora, *, dtype: torch.dtype, seed: int
) -> PeftModel:
    """The model in `source` frozen, with new adapters in float32 on its layers.

    Adapters that `source` itself holds are merged first. The new ones name `source` as their base,
    by its absolute path where it is a folder or a file.

    Args:
        source: as `load_model` takes it.
        dtype: of the frozen weights; with 4 bits, of those that stay and of the products.
        seed: of the adapters' first weights.

    Raises:
        UsageError: from loading; no such layers; 4 bits of a .gguf file or of merged adapters.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import set_seed

    # PEFT looks for a config of the base with every checkpoint, to see whether the vocabulary was
    # changed, and says so where there is none: a .gguf file, other adapters, a hub out of reach.
    warnings.filterwarnings("ignore", "Could not find a config file", module="peft")
    if lora.in_4bit:
        model = load_model(source, dtype=dtype, device=best_device(), in_4bit=True)
    else:
        model = load_model(source, dtype=dtype, merge_adapters=True)
    lora.check(model)
    task = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT multiplies with any number
        target_modules=lora.target_modules,
        lora_dropout=lora.dropout,
        task_type=task,
    )
    set_seed(seed)
    problem = f"cannot put adapters on the model from {os.fspath(source)!r}"
    with reported_as(problem, "peft"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own calls
        adapted = get_peft_model(model, config)
    path = expanded(source)
    base = str(path.resolve()) if is_there(path) else os.fspath(source)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def _require_gpu() -> None:
    # On a CPU with AVX512-BF16, layers of bitsandbytes that once ran in evaluation mode have no
    # gradient, and do not say so.
    if best_device() == "cpu":
        raise UsageError("--load-in-4bit: bitsandbytes trains on a CUDA GPU, and there is none")
