"""The configuration of `plad_fast.training.trainer.PLaDTrainer`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from plad_fast.checks import check_number, check_weight, is_whole
from plad_fast.data.packing import LAYOUTS
from plad_fast.data.text_ids import check_cut
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.registry import get_loss, read_loss_args
from plad_fast.models.attention.packed import IMPLEMENTATIONS
from plad_fast.ops.backend import BACKENDS

NO_PREDICTIONS = (
    "the trainer has no predictions to give it: logits are never stored as a whole. Leave it out; "
    "an evaluation has the metrics that PLaDTrainer lists, and "
    "plad_fast.models.score_pairs gives log-probabilities row by row"
)

_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing_factor": (bool, "label smoothing is not part of this loss; set it to 0"),
    "length_column_name": (
        lambda name: name not in (None, "length"),
        "the lengths of the rows are counted here, in the column 'length'; leave it out",
    ),
    **dict.fromkeys(
        ("include_for_metrics", "include_inputs_for_metrics", "batch_eval_metrics"),
        (bool, f"it is for compute_metrics, and {NO_PREDICTIONS}"),
    ),
    "accelerator_config.dispatch_batches": (
        bool,
        "it sends tensors from the first process to the others, and rows become tensors later "
        "here; leave it out",
    ),
    "parallelism_config.non_data_parallel_size": (
        lambda size: size > 1,
        "tensor, context and sequence parallelism are not supported",
    ),
    "torch_compile": (
        bool,
        "the loss would be compiled again for every step; call model.base_model.compile() before "
        "training instead",
    ),
    "optim": (
        lambda name: any(kind in str(name).lower() for kind in ("layerwise", "lomo")),
        "it steps inside every backward, and a training step may have several here; choose an "
        "optimizer that steps once",
    ),
}
"""Settings of `TrainingArguments` that cannot be honoured: which of their values, and why."""

_CHOICES = {"layout": LAYOUTS, "attention": IMPLEMENTATIONS, "impl": BACKENDS}
"""Known values of the settings that also take "auto"."""


@dataclass
class PLaDConfig(TrainingArguments):
    """All of `transformers.TrainingArguments`, and what the preference loss needs."""

    loss: str = "plad_ranking"
    """Name in `plad_fast.losses.available()`. "sft" fine-tunes on the best response alone."""
    beta: float | None = None
    """The loss's own beta: a hinge's margin in nats, DPO's and IPO's weight of the reference; None
    takes the loss's default."""
    loss_args: dict[str, Any] | str | None = None
    """Further options of the loss by name, such as {"label_smoothing": 0.1} of dpo or
    {"gamma": 0.5} of simpo; JSON on a command line."""
    sft_weight: float | None = None
    """Weight of the mean negative log-likelihood of the best responses, added to the loss; None
    takes the loss's own, which is its paper's: 1 for PLaD's losses, SLiC, CPO and ORPO, else 0."""
    length_normalization: float | None = None
    """alpha in s(y) = sum of log-probabilities / |y| ** alpha: 0 for sums, 1 for means. None takes
    the loss's own: 1 for PLaD's losses and those on means over tokens, else 0."""
    rank_end_token: bool = True
    """False leaves the last token of every response but the best out of the loss, so that ranking
    does not teach the model to go on where an answer should end. `reference_logps` in the rows, of
    whole responses, are refused then."""
    temperature: float = 1.0
    """Divides the logits before the softmax; 1 scores with the model as it is."""
    disable_dropout: bool = True
    """Set the model's dropout to 0, that of its adapters too, as TRL's DPOTrainer does: a response
    is compared with others and with a reference that knows no dropout. Fine-tuning keeps it."""
    max_length: int = 1024
    """Tokens of prompt and response; of an encoder-decoder model, of each of them. Longer prompts
    are cut; a response never is."""
    truncation_side: str = "left"
    """The side from which a long prompt loses tokens: "left" or "right"."""
    split_special_tokens: bool = True
    """Encode special tokens that stand in chat messages, such as an end-of-turn mark that a teacher
    wrote, as the text they are there; the chat template's own stay tokens, and so do marks of
    thoughts and tool calls. False makes tokens of them, as always in plain text."""
    layout: str = "auto"
    """How groups reach the model: "shared" (packed without padding, every prompt once), "packed"
    (its prompt before every response), "padded" (a padded row for every sequence), or "auto":
    shared if the model can, else padded. An encoder-decoder model has a layout of its own, and
    takes "auto". See `plad_fast.data.packing` and `plad_fast.models.sharing`."""
    attention: str = "auto"
    """Attention over packed rows: "flash", "varlen", "sdpa", "flex", "eager", or "auto"; see
    `plad_fast.models.attention.packed`."""
    self_check: bool = True
    """Compare shared with padded log-probabilities on a short group before training."""
    max_tokens_per_batch: int | None = None
    """Tokens of one forward and backward, padding included. The groups of a device's batch
    (`per_device_train_batch_size`) are packed into as many micro-batches as that takes; a longer
    group runs alone. With None there is one, and one more for groups that were satisfied."""
    skip_inactive: bool = True
    """Run no backward for a micro-batch whose gradient is exactly zero, as under a satisfied hinge.
    Off under FSDP and DeepSpeed, which count on every backward. Weights end as they would have,
    but for mixtures whose experts are modules of their own (transformers 4) and of which a skipped
    micro-batch meets others than a run one."""
    reference_cache: str | None = None
    """Folder for the log-probabilities under the reference model, for losses that need them; None
    takes "reference" in `output_dir`. Each of several processes keeps its share of the rows."""
    impl: str = "auto"
    """Backend of the op, by name; "auto" takes the first that can."""
    scratch_mib: int | None = None
    """Scratch memory of the op in MiB; None lets the op choose."""
    # HfArgumentParser wants the types in this order.
    report_to: None | str | list[str] = "none"  # noqa: RUF036
    """Where to log; nothing leaves the machine unless asked."""
    remove_unused_columns: bool = False
    """The datasets hold token ids by the time the trainer sees them: nothing to remove."""

    def __post_init__(self) -> None:
        # The parent knows by the name that a loss is better when it is lower.
        given: Any = self
        falls = re.search("(^|_)(nll|active_pairs|runtime)$", given.metric_for_best_model or "")
        if given.greater_is_better is None and falls:
            given.greater_is_better = False
        super().__post_init__()
        is_old = not hasattr(given, "activation_checkpointing")
        if is_old and given.gradient_checkpointing and given.gradient_checkpointing_kwargs is None:
            # As in newer transformers: re-entrant checkpoints lose what adapters and routers need.
            given.gradient_checkpointing_kwargs = {"use_reentrant": False}
        self._check_numbers()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in ("auto", *choices):
                raise UsageError(f"unknown {name} {value!r}; known: auto, {', '.join(choices)}")
        self._check_supported()
        self.loss_args = read_loss_args(self.loss, self.loss_args, beta=self.beta)
        self.objective(group_size=2)
        if self.fine_tunes and self.sft_weight:
            raise UsageError(f"loss {self.loss!r} is the likelihood itself; set sft_weight to 0")

    def _check_numbers(self) -> None:
        """Finite numbers, and whole ones for counts: a file of settings may hold anything."""
        for name in ("beta", "sft_weight", "length_normalization", "temperature"):
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            check_number(name, value)
            if not math.isfinite(value):
                raise UsageError(f"{name} must be a finite number, got {value}")
        if self.temperature <= 0:
            raise UsageError(f"temperature must be positive, got {self.temperature}")
        check_weight("weight_decay", self.weight_decay)
        check_cut(self.max_length, self.truncation_side)
        if self.max_length < 2:
            raise UsageError(f"max_length must be at least 2 tokens, got {self.max_length}")
        for name in ("max_tokens_per_batch", "scratch_mib"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value >= 1):
                raise UsageError(f"{name} must be None or a whole number from 1 on, got {value!r}")

    def _check_supported(self) -> None:
        for path, (refused, reason) in _UNSUPPORTED.items():
            value: Any = self
            for name in path.split("."):  # which versions of transformers may lack
                value = getattr(value, name, None)
            if value is not None and refused(value):
                value = getattr(value, "value", value)  # of an enumeration
                raise UsageError(f"{path}={value!r} is not supported: {reason}")
        if self.neftune_noise_alpha and self.layout != "padded":
            raise UsageError(
                f"neftune_noise_alpha={self.neftune_noise_alpha}: the noise depends on the length "
                "of a row, which packing changes; set layout='padded', or leave "
                "neftune_noise_alpha out, as for an encoder-decoder model"
            )

    def objective(self, *, group_size: int) -> Objective:
        """The loss with its options, checked; the data are checked for what it needs of them."""
        return Objective.bind(
            self.loss,
            group_size=group_size,
            sft_weight=self.sft_weight,
            length_normalization=self.length_normalization,
            has_scores=True,
            has_reference=True,
            options=self.loss_options,
        )

    @property
    def scratch_bytes(self) -> int | None:
        """`scratch_mib` in bytes."""
        return None if self.scratch_mib is None else self.scratch_mib * 2**20

    @property
    def fine_tunes(self) -> bool:
        """Whether the loss is a likelihood of the best responses, which needs no others."""
        return get_loss(self.loss).is_likelihood

    @property
    def loss_options(self) -> dict[str, Any]:
        """The loss's own options that were set."""
        beta = {} if self.beta is None else {"beta": self.beta}
        assert not isinstance(self.loss_args, str)
        return {**beta, **(self.loss_args or {})}
