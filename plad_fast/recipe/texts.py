"""The texts of a run: the teacher's answers, the student's samples round by round, their pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.prompts import Prompt
from plad_fast.data.records import model_digest
from plad_fast.data.store import RowStore, has_rows
from plad_fast.errors import UsageError
from plad_fast.models.loading import load_tokenizer
from plad_fast.pairs.build import NoPairsError, PairReport, build_answers, build_pairs
from plad_fast.pairs.filters import is_usable
from plad_fast.pairs.generation.answer_rows import collect
from plad_fast.pairs.generation.answering import renew_answers, stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.sources import open_local_model, teacher_fingerprint
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.judge import Judge
from plad_fast.pairs.scoring.scorers import score_answers
from plad_fast.pairs.scoring.trials import try_endpoints
from plad_fast.recipe.inputs import (
    answer_columns,
    dropped_file,
    read_jsonl,
    show_pairs,
    write_pairs,
)
from plad_fast.recipe.settings import DistillConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from plad_fast.pairs.generation.text_model import TextModel
    from plad_fast.pairs.scoring.judge import ChatEndpoint
    from plad_fast.pairs.scoring.scorers import Scorer

Answers = Mapping[str, Sequence[Answer]]

TEACHER_FILE = "teacher.jsonl"
"""In the folder of the answers."""


class RecipeTexts:
    """Everything here is stored as it comes, and taken from the store the next time.

    Args:
        config: of the run.
        folder: of the run.
        load_teacher: makes the teacher's model, where it is a local one.
        judges: see `PairSettings.open_scorer`.

    Raises:
        UsageError: teacher or scorer cannot be what the settings say.
    """

    def __init__(
        self,
        config: DistillConfig,
        folder: Path,
        prompts: Sequence[Prompt],
        load_teacher: Callable[[], LocalModel],
        judges: dict[str, ChatEndpoint],
    ) -> None:
        self.config = config
        self.folder = folder
        self.prompts = prompts
        self._load_teacher = load_teacher
        self._columns = answer_columns(config)
        verdicts = folder / "pairs" / "verdicts.jsonl"
        self._scorer = config.open_scorer(verdicts=verdicts, judges=judges)
        if self._scorer is not None:
            self._scorer.check(prompts)
        # Made now, so that what is wrong with an endpoint's settings is found out before any work.
        self._teacher: TextModel | None = None
        if not config.has_local_teacher:
            self._teacher = config.open_teacher(precision=config.precision, columns=self._columns)

    def try_teacher(self, *, overwrite: bool) -> None:
        """A word with the teacher, as `try_endpoints`."""
        try_endpoints(
            teacher=self._teacher,
            sampling=self._teacher_sampling,
            answers=self._teacher_file,
            overwrite=overwrite,
        )

    def ask_teacher(self) -> int:
        """Let the teacher answer what it has not answered yet; how many answers it failed at.

        Raises:
            UsageError: as `stored_answers`, or its endpoint was asked no more before the end, for a
                budget or an outage.
        """
        teacher = self._teacher

        def load() -> TextModel:
            return self._load_teacher() if teacher is None else teacher

        renew_answers(
            self._teacher_file,
            self.prompts,
            self._teacher_sampling,
            {**self._teacher_fingerprint(), **self._teacher_sampling.settings()},
        )
        answered = stored_answers(
            load,
            self.prompts,
            self._teacher_file,
            self._teacher_sampling,
            fingerprint=self._teacher_fingerprint(),
            to_the_end=True,
        )
        stopped = getattr(getattr(teacher, "endpoint", None), "stopped", "")
        if answered.failures and stopped:
            raise UsageError(
                f"the teacher has answered {len(answered.answers)} of {len(self.prompts)} prompts "
                f"and is asked no more: {stopped}; what has come is kept: run the same command "
                "again to ask for the rest, with a larger budget if one was spent"
            )
        return len(answered.failures)

    def teacher_answers(self) -> dict[str, list[Answer]]:
        """Prompt id -> the teacher's answers, in the order of the prompts.

        What it failed at in its own stage stays so: an answer that came later would be in the data
        of some stages only.
        """
        settings = {**self._teacher_fingerprint(), **self._teacher_sampling.settings()}
        with RowStore.open(self._teacher_file, settings) as store:
            return collect(self.prompts, store, self._teacher_sampling, {}).answers

    def teacher_usage(self) -> str:
        """What this run spent at the teacher's endpoint, if it has one."""
        endpoint = getattr(self._teacher, "endpoint", None)
        return "" if endpoint is None else f"; {endpoint.usage}"

    def judge_usage(self) -> str:
        """What became of a judge's comparisons in this run, and what it spent, if there is one."""
        return f"judge: {self._scorer.spent()}" if isinstance(self._scorer, Judge) else ""

    def best_teacher_answers(self) -> dict[str, Answer]:
        """Prompt id -> the first answer that the teacher finished."""
        usable = ((i, next(filter(is_usable, a), None)) for i, a in self.teacher_answers().items())
        return {prompt_id: answer for prompt_id, answer in usable if answer is not None}

    def fine_tuning_rows(
        self, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, Any]]:
        """Prompt and the teacher's answer, without a rejected one.

        Raises:
            UsageError: the teacher finished no answer to these prompts.
        """
        rows = build_answers(prompts, self.best_teacher_answers(), tokenizer=tokenizer)
        if not rows:
            raise UsageError(
                "the teacher finished no answer to a fine-tuning prompt; raise --max-new-tokens or "
                "--sft-share"
            )
        return rows

    def samples(
        self, prompts: Sequence[Prompt], model: Path, name: str, *, round_number: int, n: int
    ) -> dict[str, list[Answer]]:
        """The samples of a student, which is the one that the round starts from.

        Every round has seeds of its own, for the student may have changed little.
        """
        suffix = "" if round_number == 1 else f"-{round_number}"
        made_by = {"student": name, "weights": model_digest(model)}
        return stored_answers(
            lambda: open_local_model(model, name, precision=self.config.precision),
            prompts,
            self.folder / "answers" / f"student{suffix}.jsonl",
            self.student_sampling(round_number, n),
            fingerprint={**made_by, "precision": self.config.precision},
            others_aside=True,
        ).answers

    def student_sampling(self, round_number: int = 1, n: int = 1) -> Sampling:
        config = self.config
        return Sampling(
            config.max_new_tokens,
            temperature=config.student_temperature,
            top_p=config.top_p,
            seed=config.seed + round_number,  # another stream than the teacher's
            n=n,
            batch_size=config.generation_batch_size,
        )

    def has_teacher_answers(self) -> bool:
        """Whether some are stored, whatever teacher gave them."""
        return has_rows(self._teacher_file)

    def teacher_settings(self) -> dict[str, Any]:
        """What the teacher's answers depend on beside the prompts and their number."""
        config = self.config
        return {
            **{
                name if name in ("teacher", "base_url") else f"teacher's {name}": value
                for name, value in self._teacher_fingerprint().items()
            },
            "teacher_temperature": config.teacher_temperature,
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
            **({"precision": config.precision} if config.has_local_teacher else {}),
        }

    def scorer_settings(self) -> dict[str, Any]:
        """What the scores of the pairs depend on; empty without a scorer."""
        return {} if self._scorer is None else self._scorer.settings()

    @property
    def _teacher_file(self) -> Path:
        return self.folder / "answers" / TEACHER_FILE

    @property
    def _teacher_sampling(self) -> Sampling:
        config = self.config
        return Sampling(
            config.max_new_tokens,
            temperature=config.teacher_temperature,
            seed=config.seed,
            n=config.teacher_samples,
            batch_size=config.generation_batch_size,
        )

    def _teacher_fingerprint(self) -> dict[str, Any]:
        config = self.config
        return teacher_fingerprint(config.teacher, base_url=config.base_url, columns=self._columns)

    def make_pairs(
        self, prompts: Sequence[Prompt], samples: Answers, tokenizer: Path, file: str
    ) -> PairReport:
        """Training pairs as the settings want them, in `pairs/<file>.jsonl`.

        Raises:
            UsageError: none is left, or nothing can be learned from them.
        """
        scores = self.folder / "pairs" / "scores.jsonl"
        if self._scorer is not None:
            for store in (scores, getattr(self._scorer, "store", None)):
                if store is not None:
                    set_aside(store, self._scorer.settings())
        rows, report = select_pairs(
            self.config,
            self._scorer,
            prompts,
            self.teacher_answers(),
            samples,
            tokenizer=load_tokenizer(tokenizer),
            scores_path=scores,
            path=self.pairs_file(file),
        )
        show_pairs(rows, report, self.pairs_file(file), "training pairs")
        return report

    def make_held_out_pairs(
        self, prompts: Sequence[Prompt], samples: Answers, tokenizer: Path
    ) -> PairReport:
        """The teacher's first answer > the student's first sample, whatever is trained on."""
        rows, report = build_pairs(
            prompts, self.teacher_answers(), samples, tokenizer=load_tokenizer(tokenizer)
        )
        write_pairs(self.pairs_file("held-out"), rows, report)
        return report

    def pairs(self, file: str) -> list[dict[str, Any]]:
        """The rows of `pairs/<file>.jsonl`."""
        return read_jsonl(self.pairs_file(file))

    def pairs_file(self, file: str) -> Path:
        return self.folder / "pairs" / f"{file}.jsonl"


def select_pairs(
    config: DistillConfig,
    scorer: Scorer | None,
    prompts: Sequence[Prompt],
    teacher: Answers,
    student: Answers,
    *,
    tokenizer: PreTrainedTokenizerBase,
    scores_path: Path,
    path: Path,
) -> tuple[list[dict[str, Any]], PairReport]:
    """Rows of the preference format, by scores where the settings name a scorer, as a file.

    What was dropped is written beside them, also where no row is left.

    Raises:
        UsageError: from the scorer, and when no row is left.
    """
    scores = None
    if scorer is not None:
        scores = score_answers(scorer, prompts, [teacher, student], scores_path)
    try:
        rows, report = build_pairs(
            prompts,
            teacher,
            student,
            select=config.select,
            scores=scores,
            filters=config.pair_filters(),
            list_size=config.list_size,
            tokenizer=tokenizer,
        )
    except NoPairsError as error:
        write_pairs(path, [], error.report)
        raise UsageError(f"{error}; {dropped_file(path)} has every one with its reason") from None
    write_pairs(path, rows, report)
    return rows, report
