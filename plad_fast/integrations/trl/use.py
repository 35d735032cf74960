"""TRL's preference trainers on this library's loss; docs/trl.md has an example.

The trainer stays what it was: its data, reference model, accumulation, logging and checkpoints are
TRL's, and a step has TRL's loss and gradients. What changes is how they are computed. The tokens
with which the two sequences of a pair begin run through the model once and none of the padding
does; only tokens of the responses reach the LM head; and its gradient is made in the same pass.

Every option that would change the loss and is not known here is refused by name, at once. What only
a batch can show is refused with that batch: padding that is not on the right, and entries that are
not TRL's. Written for TRL 1.15 and 1.16; with a newer one a warning is logged.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from plad_fast.checks import is_whole
from plad_fast.data.row_sets import require_column_ids
from plad_fast.data.rows import TokenLimits
from plad_fast.errors import UsageError
from plad_fast.integrations.trl.head_loss import METRICS, HeadLoss, Translated
from plad_fast.integrations.trl.pair_losses import translate_weighted_dpo
from plad_fast.losses.trl_options import translate_cpo, translate_orpo
from plad_fast.models.adapters import token_limits
from plad_fast.models.encoder_decoder import is_encoder_decoder
from plad_fast.models.head import check_architecture
from plad_fast.models.lm_head import find_head
from plad_fast.models.router import check_router_loss
from plad_fast.models.sharing import prepare
from plad_fast.ops.backend import get_backend
from plad_fast.ops.validation import check_impl

try:
    import pyarrow.compute
    import trl
    from datasets import Dataset
    from transformers import ProcessorMixin, TrainingArguments
    from trl import DPOTrainer
    from trl.trainer.base_config import _BaseConfig

    from plad_fast.integrations.trl import concatenated
    from plad_fast.integrations.trl import trainers as fast
except ImportError as error:
    raise ImportError(
        f"plad_fast.integrations.trl.use needs TRL 1.15 or newer ({error}): pip install -U trl"
    ) from error

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

AnyTrainer = TypeVar("AnyTrainer", bound="Trainer")
_OLDEST, _NEWEST = (1, 15), (1, 16)


class _Kind(NamedTuple):
    """One of TRL's trainers, and what is to know of it."""

    front: type
    translate: Callable[[Mapping[str, Any]], Translated]
    loss_options: frozenset[str]
    """Options that the translation gets."""
    kept: frozenset[str]
    """Options that TRL's own code goes on to honour."""
    left_out: tuple[str, ...]
    """Metrics that are not computed with metrics="fast"."""


_DATA = {"max_length", "disable_dropout", "dataset_num_proc", "model_init_kwargs"}
_DATA |= {"trust_remote_code"}
_CONCATENATED = _DATA | {"max_completion_length", "generate_during_eval", "is_encoder_decoder"}
_REFERENCE = {"precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model"}
_REFERENCE |= {"ref_model_mixup_alpha", "ref_model_sync_steps"}
_LOGITS = ("logits/chosen", "logits/rejected")
_TOKENS = {"prompt_ids", "chosen_ids", "rejected_ids"}
_TOKENS |= {"prompt_input_ids", "chosen_input_ids", "rejected_input_ids"}
_DECODER_TOKENS = {"chosen_labels", "rejected_labels"}

_DPO = _Kind(
    fast.FastDPO,
    translate_weighted_dpo,
    frozenset(
        {"beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "use_weighting"}
        | {"f_divergence_type", "f_alpha_divergence_coef", "discopop_tau"}
    ),
    # Padding-free rows are what TRL leaves out since its refactoring, and what packed rows are.
    frozenset(
        _DATA
        | _REFERENCE
        | {"truncation_mode", "padding_free", "pad_to_multiple_of", "pad_token"}
        | {"router_aux_loss_coef"}
    ),
    ("entropy", "mean_token_accuracy"),
)
_CPO = _Kind(
    concatenated.FastCPO,
    translate_cpo,
    frozenset({"beta", "loss_type", "label_smoothing", "cpo_alpha", "simpo_gamma", "alpha"}),
    frozenset(_CONCATENATED),
    _LOGITS,
)
_ORPO = _Kind(
    concatenated.FastORPO,
    translate_orpo,
    frozenset({"beta"}),
    frozenset(_CONCATENATED | {"padding_value"}),
    _LOGITS,
)


def use_plad_fast(
    trainer: AnyTrainer,
    *,
    layout: str = "auto",
    attention: str = "auto",
    metrics: str = "fast",
    impl: str = "auto",
    scratch_mib: int | None = None,
) -> AnyTrainer:
    """Lets a TRL trainer compute its loss with this library; call it before `train`.

    Options of the loss count as they are at each step, the trainer's own before its arguments'.
    With the first batch one line is printed: the layout of the rows, and the share of the batch's
    tokens that need not run.

    Args:
        trainer: a `trl.DPOTrainer`, or a `CPOTrainer` or `ORPOTrainer` of `trl.experimental`, with
            a model of text, which for DPO has no encoder; in one process, or several under DDP.
        layout: "shared", "packed", "padded", or "auto"; see `plad_fast.models.sharing.prepare`.
        attention: see `plad_fast.models.attention.register.enable`.
        metrics: "all" has all of TRL's. "fast" leaves out what takes another pass: with DPO
            `entropy` and `mean_token_accuracy`, and `logits/*` too for models with a softcap,
            which are another product of the head; with CPO and ORPO `logits/*`, which are means
            over prompts and padding there, and another forward of the padded rows. What `predict`
            returns and `compute_metrics` gets is TRL's in any case.
        impl: backend of the op, see `plad_fast.linear_sequence_logprobs`.
        scratch_mib: bound on the op's extra memory; None leaves it to the op.

    Returns:
        The same trainer, now of a class derived from its own.

    Raises:
        UsageError: another trainer, or an option, a model or a set-up that is not known to work;
            says which.
    """
    if metrics not in METRICS:
        raise UsageError(f"unknown metrics {metrics!r}; known: {', '.join(METRICS)}")
    if scratch_mib is not None and not (is_whole(scratch_mib) and 0 < scratch_mib < 2**43):
        raise UsageError(f"scratch_mib must be a positive whole number, got {scratch_mib!r}")
    check_impl(impl)
    _check_version()
    kind = _kind_of(trainer)
    if what := next(_unsupported(trainer), None):
        raise UsageError(f"plad_fast in {type(trainer).__name__} does not support {what}")
    _check_methods(trainer, kind)
    if metrics == "fast":
        _check_best_metric(trainer, kind)
    _check_options(trainer, kind)
    model: Any = trainer.model
    limits = token_limits(model)
    head_loss = HeadLoss(
        kind.translate,
        kind.loss_options,
        metrics=metrics,
        impl=impl,
        scratch_bytes=None if scratch_mib is None else scratch_mib * 2**20,
        limits=limits,
    ).follow(trainer)
    _check_prompts(trainer)
    _check_tokens(trainer, limits)
    check_architecture(model)
    check_router_loss(model, wanted=trainer.aux_loss_enabled)
    get_backend(impl, find_head(model).weight)
    with trainer.accelerator.autocast():
        head_loss.layout = prepare(model, layout, attention=attention)
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            reference = trainer.accelerator.unwrap_model(reference)
            check_architecture(reference)
            prepare(reference, head_loss.layout, attention=attention)
    cls = type(trainer)
    trainer.__class__ = type(f"{kind.front.__name__}{cls.__name__}", (kind.front, cls), {})
    trainer._own_head_loss = head_loss
    return trainer


def _kind_of(trainer: Any) -> _Kind:
    if isinstance(trainer, fast.WithHeadLoss):
        raise UsageError("this trainer uses plad_fast already; call use_plad_fast once")
    # By name: TRL's experimental modules are not loaded for the question alone.
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(trainer).__mro__}
    if isinstance(trainer, DPOTrainer):
        return _DPO
    for module, kind in (("cpo", _CPO), ("orpo", _ORPO)):
        name = f"trl.experimental.{module}.{module}_trainer.{module.upper()}Trainer"
        if name in names:
            return kind
    raise UsageError(
        f"{type(trainer).__name__} is not known here; known are trl.DPOTrainer and the CPOTrainer "
        "and ORPOTrainer of trl.experimental; leave this one as it is"
    )


def _check_version() -> None:
    found = tuple(int(part) for part in trl.__version__.split(".")[:2])
    if found < _OLDEST:
        raise UsageError(
            f"TRL {trl.__version__} computes its loss in another way; use TRL 1.15 or newer"
        )
    if found > _NEWEST:
        logger.warning(
            "plad_fast knows TRL 1.15 and 1.16, this is %s: compare a step's loss with TRL's own",
            trl.__version__,
        )


def _check_options(trainer: Any, kind: _Kind) -> None:
    """Raises UsageError for an option that TRL's trainer has and this module does not know, unless
    it is left at its default."""
    general = {f.name for cls in (TrainingArguments, _BaseConfig) for f in dataclasses.fields(cls)}
    known = general | kind.kept | kind.loss_options
    for option in dataclasses.fields(trainer.args):
        value = getattr(trainer.args, option.name)
        if option.name not in known and value != option.default:
            raise UsageError(
                f"{option.name}={value!r} is not supported; leave it at {option.default!r}, or use "
                f"{type(trainer).__name__} without plad_fast"
            )


def _unsupported(trainer: Any) -> Iterator[str]:
    """Setups that would change the loss, or how the model is called."""
    args, model, accelerator = trainer.args, trainer.model, trainer.accelerator
    if args.use_liger_kernel:
        yield "use_liger_kernel=True: two libraries would take the place of one head"
    if args.torch_compile:
        yield "torch_compile=True"
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha: its noise depends on how rows are packed"
    if getattr(args, "activation_offloading", False):
        yield "activation_offloading=True"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        yield "a model that is split over devices (device_map)"
    if (kind := accelerator.distributed_type.value) not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        yield f"distributed training of the kind {kind}; DDP works"
    if accelerator.parallelism_config is not None:
        yield "context, sequence or tensor parallelism"
    if isinstance(trainer.processing_class, ProcessorMixin) or getattr(trainer, "_is_vlm", False):
        yield "a vision-language model or processor"
    if is_encoder_decoder(model) and isinstance(trainer, DPOTrainer):
        yield "an encoder-decoder model, which TRL's DPOTrainer does not train either"
    if getattr(args, "truncation_mode", "") == "keep_end" and (
        fast.DIVIDING_BY_LENGTH & set(args.loss_type)
    ):
        yield (
            "truncation_mode='keep_end' with loss_type 'ipo' or 'sigmoid_norm', whose length "
            "counts a token without a predecessor in TRL where the prompt is cut off as a whole"
        )
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        yield "a PEFT method that learns a prompt"


def _check_methods(trainer: Any, kind: _Kind) -> None:
    for name in kind.front.replaces:  # type: ignore[attr-defined]
        owner = next((cls for cls in type(trainer).__mro__ if name in vars(cls)), None)
        if owner is None:
            raise UsageError(
                f"{type(trainer).__name__} of TRL {trl.__version__} has no {name}: it computes its "
                "loss in another way; use TRL 1.15 or 1.16, or the trainer without plad_fast"
            )
        if not owner.__module__.startswith("trl.") or name in vars(trainer):
            raise UsageError(
                f"{type(trainer).__name__} has its own {name}, which plad_fast would put out of "
                "use; remove it, or use the trainer without plad_fast"
            )


def _check_best_metric(trainer: Any, kind: _Kind) -> None:
    wanted = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
    if wanted in kind.left_out:
        raise UsageError(
            f"metric_for_best_model is {wanted!r}, which is not computed with metrics='fast'; "
            "choose metrics='all', or another metric"
        )


def _check_prompts(trainer: Any) -> None:
    """Looks at all rows that lie ready, rather than stop the training at one of them."""
    loss_type = trainer.args.loss_type if isinstance(trainer, DPOTrainer) else ()
    by_length = sorted(fast.DIVIDING_BY_LENGTH & set(loss_type))
    # What another collator makes of the rows, only its batches show.
    if not by_length or not type(trainer.data_collator).__module__.startswith("trl."):
        return
    for data in _datasets(trainer).values():
        if "prompt_ids" not in data.column_names or data.format["type"] == "custom":
            continue
        for table in data.select_columns("prompt_ids").with_format("arrow").iter(10_000):
            shortest = pyarrow.compute.min(pyarrow.compute.list_value_length(table["prompt_ids"]))
            if shortest.as_py() == 0:
                raise UsageError(fast.NO_PROMPT.format(by_length[0]))


def _check_tokens(trainer: Any, limits: TokenLimits) -> None:
    """Raises UsageError for a row with a token that the model does not know."""
    known = _TOKENS | (_DECODER_TOKENS if is_encoder_decoder(trainer.model) else set())
    for name, data in _datasets(trainer).items():
        if data.format["type"] == "custom":
            continue
        for column in data.column_names:
            if column in known:
                require_column_ids(data, column, limits, name)


def _datasets(trainer: Any) -> dict[str, Dataset]:
    held_out = trainer.eval_dataset
    found = {"train_dataset": trainer.train_dataset}
    if isinstance(held_out, Mapping):
        found |= {f"eval_dataset[{key!r}]": data for key, data in held_out.items()}
    else:
        found["eval_dataset"] = held_out
    return {name: data for name, data in found.items() if isinstance(data, Dataset)}
