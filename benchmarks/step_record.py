"""Times, memory and the gradients of the first step, recorded while an implementation trains."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import Peak, peak_memory, release_memory, synchronize

# Largest relative difference of the loss, and of all gradients together, from float32 naive.
# bfloat16 is sized for autocast, in which the naive step is itself a few hundredths off.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}


@dataclass(frozen=True)
class GradientErrors:
    """Norm of the difference over the norm of the truth."""

    together: float  # over all parameters
    worst: float
    worst_parameter: str


class Truth:
    """Loss and gradients of the naive first step in float32, as the oracle process wrote them."""

    def __init__(self, path: Path) -> None:
        content = torch.load(path, mmap=True)
        self.loss: float = content["loss"]
        self._gradients: dict[str, Tensor] = content["gradients"]

    @staticmethod
    def save(path: Path, loss: float, model: nn.Module) -> None:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": loss, "gradients": gradients}, path)

    def compare(self, model: nn.Module) -> GradientErrors:
        """A parameter that should have a gradient and has none counts as zero."""
        differences, scales, worst = 0.0, 0.0, (0.0, "")
        for name, parameter in model.named_parameters():
            truth = self._gradients[name].to(parameter.device)
            gradient = torch.zeros_like(truth) if parameter.grad is None else parameter.grad
            difference, scale = _norm(gradient - truth), _norm(truth)
            differences += difference**2
            scales += scale**2
            worst = max(worst, (_ratio(difference, scale), name))
        return GradientErrors(_ratio(math.sqrt(differences), math.sqrt(scales)), *worst)


class Recorder:
    """Follows a training run: warm-up steps, then timed ones. The first step of all is compared
    with the truth, if there is one.

    The run calls `before_training` when all that it needs is loaded, `before_update` with its
    gradients in place, and `after_step` when the optimizer has stepped and the gradients are gone.
    A timed step lasts from the end of the step before to its own end, so that loading and collating
    count. The high-water mark of memory is reset after warm-up, as the check holds the truth in
    memory; later steps need more than the first anyway, which runs without optimizer states.
    """

    def __init__(
        self,
        device: torch.device,
        truth: Truth | None,
        *,
        warm_up: int,
        progress: Path | None = None,
    ) -> None:
        self.seconds: list[float] = []
        self.gradient_errors: GradientErrors | None = None
        self.first_loss = self.first_gradient_norm = math.nan
        self._device = device
        self._truth = truth
        self._truth_loss = math.nan if truth is None else truth.loss
        self._warm_up = warm_up
        self._progress = progress
        self._steps = 0
        self._peak = Peak()
        self._open = ExitStack()
        self._started = math.nan
        self._before = math.nan
        self._after_warm_up = math.nan

    def before_training(self) -> None:
        release_memory(self._device)
        self._before = held_bytes(self._device)

    def before_update(self, model: nn.Module) -> None:
        if self._steps == 0:
            norms = [_norm(p.grad) for p in model.parameters() if p.grad is not None]
            self.first_gradient_norm = math.hypot(*norms)
        if self._truth is not None:
            self.gradient_errors = self._truth.compare(model)
            self._truth = None

    def after_step(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self._steps += 1
        if self._progress is not None:
            self._progress.write_text(str(self._steps))
        if self._steps > self._warm_up:
            self.seconds.append(now - self._started)
            self._started = time.perf_counter()
        elif self._steps == self._warm_up:
            release_memory(self._device)
            self._after_warm_up = held_bytes(self._device)
            self._peak = self._open.enter_context(peak_memory(self._device))
            self._started = time.perf_counter()

    def finish(self) -> None:
        self._open.close()

    @property
    def loss_error(self) -> float:
        return _ratio(abs(self.first_loss - self._truth_loss), abs(self._truth_loss))

    @property
    def process_bytes(self) -> float:
        """The most that the process (on CUDA: its allocator) held in a timed step."""
        return self._after_warm_up + self._peak.extra_bytes

    @property
    def growth_bytes(self) -> float:
        """That without what was held before training: model, data, imported code."""
        return self.process_bytes - self._before

    def mismatch(self, dtype: str) -> str | None:
        """What is beyond the tolerance, or None. NaN is."""
        assert self.gradient_errors is not None
        limit = TOLERANCE[dtype]
        errors = {"loss": self.loss_error, "gradients": self.gradient_errors.together}
        wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= limit]
        if not wrong:
            return None
        worst = self.gradient_errors
        return (
            f"{', '.join(wrong)} from naive (limit {limit:.0e}); worst parameter "
            f"{worst.worst_parameter} {worst.worst:.1e}"
        )


def held_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    import psutil

    return float(psutil.Process().memory_info().rss)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def _ratio(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf
