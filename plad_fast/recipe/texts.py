"""The texts of a run: the teacher's answers, the student's samples round by round, their pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.prompts import Prompt
from plad_fast.data.records import model_digest
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.pairs.build import NoPairsError, PairReport, build_pairs
from plad_fast.pairs.generation.answer_rows import collect
from plad_fast.pairs.generation.answering import renew_answers, stored_answers
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.sources import (
    LazyLocalModel,
    open_local_model,
    teacher_fingerprint,
)
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.judge import Judge
from plad_fast.pairs.scoring.stored import score_answers
from plad_fast.pairs.select import is_usable
from plad_fast.recipe.inputs import answer_columns, dropped_file, read_jsonl, write_pairs
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.sources import open_scorer, open_teacher, sampling_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from plad_fast.pairs.generation.answer_rows import Answered
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
    from plad_fast.pairs.generation.text_model import TextModel

Answers = Mapping[str, Sequence[Answer]]


class RecipeTexts:
    """Answers, scores and pairs in two folders, stored as they come, and taken from the store the
    next time.

    The teacher, the settings' own if it is None, answers `prompts`; `judges` as in `open_scorer`.
    UsageError where teacher or scorer cannot be what the settings say.
    """

    def __init__(
        self,
        config: DistillConfig,
        prompts: Sequence[Prompt],
        *,
        answers: Path,
        pairs: Path,
        teacher: TextModel | None = None,
        judges: dict[str, Endpoint] | None = None,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.answers = answers
        self.teacher_file = answers / "teacher.jsonl"
        self.scores_file, self.verdicts_file = pairs / "scores.jsonl", pairs / "verdicts.jsonl"
        self._pairs = pairs
        self._sampling = sampling_for(config, "teacher")
        self.scorer = None
        if config.scorer is not None:
            self.scorer = open_scorer(config, config.scorer, self.verdicts_file, judges)
            self.scorer.check(prompts)
        # Made now, so that what is wrong with an endpoint's settings is found out before any work.
        columns = answer_columns(config)
        self._teacher: TextModel | None = teacher or open_teacher(config, columns)
        self.endpoint = getattr(self._teacher, "endpoint", None)
        self.teacher_made_by = teacher_fingerprint(
            config.teacher, base_url=config.base_url, columns=columns
        )
        """What the teacher's answers depend on besides prompts and sampling."""
        if config.has_local_teacher:
            self.teacher_made_by["precision"] = config.precision

    def try_endpoints(self, judge: object, *, overwrite: bool) -> None:
        """A word with teacher and judge, where they are behind endpoints, before long work."""
        if isinstance(self._teacher, EndpointModel):
            self._teacher.try_out(self._sampling, self.teacher_file, overwrite=overwrite)
        if isinstance(judge, Judge):
            judge.try_out(overwrite=overwrite)

    def ask_teacher(self, *, renew: bool = False) -> Answered:
        """Let the teacher answer what it has not answered yet, and let go of its model; see
        `stored_answers`. With `renew`, answers to what prompts were before are put aside first;
        those of another teacher or other settings are refused, for they may have been paid for."""
        if renew:
            settings = {**self.teacher_made_by, **self._sampling.settings()}
            renew_answers(self.teacher_file, self.prompts, self._sampling, settings)

        def load() -> TextModel:
            # Nothing here holds a local teacher when the student is loaded.
            teacher, self._teacher = self._teacher, None
            assert teacher is not None
            return teacher

        return stored_answers(
            load,
            self.prompts,
            self.teacher_file,
            self._sampling,
            fingerprint=self.teacher_made_by,
            to_the_end=True,
        )

    def teacher_answers(self) -> Answers:
        """Prompt id -> the teacher's answers, in the order of the prompts.

        What it failed at in its own stage stays so: an answer that came later would be in the data
        of some stages only.
        """
        settings = {**self.teacher_made_by, **self._sampling.settings()}
        with RowStore.open(self.teacher_file, settings) as store:
            return collect(self.prompts, store, self._sampling, {}).answers

    def best_teacher_answers(self) -> dict[str, Answer]:
        """Prompt id -> the first answer that the teacher finished."""
        usable = ((i, next(filter(is_usable, a), None)) for i, a in self.teacher_answers().items())
        return {prompt_id: answer for prompt_id, answer in usable if answer is not None}

    def usage(self) -> dict[str, str]:
        """What this run spent at endpoints, by "teacher" and "judge" where there are such, and
        what became of the judge's comparisons."""
        found = {} if self.endpoint is None else {"teacher": str(self.endpoint.usage)}
        return found | ({"judge": self.scorer.spent()} if isinstance(self.scorer, Judge) else {})

    def samples(
        self,
        prompts: Sequence[Prompt],
        model: str | Path,
        name: str,
        *,
        made_by: str | None = None,
        round_number: int = 1,
        n: int | None = None,
        others_aside: bool = False,
    ) -> Answers:
        """The samples of a student to some prompts.

        `name` is for progress and messages, and what the student is known by unless that is
        `made_by`; `round_number` and `n` are those of `sampling_for`, `others_aside` of
        `stored_answers`.
        """
        precision = self.config.precision
        suffix = "" if round_number == 1 else f"-{round_number}"
        return stored_answers(
            lambda: LazyLocalModel(
                partial(open_local_model, model, name, precision=precision), name
            ),
            prompts,
            self.answers / f"student{suffix}.jsonl",
            sampling_for(self.config, "student", round_number, n),
            fingerprint=self.student_made_by(made_by or name, model),
            others_aside=others_aside,
        ).answers

    def student_made_by(self, name: str, model: str | Path) -> dict[str, Any]:
        """What a student's samples depend on besides prompts and sampling."""
        precision = self.config.precision
        return {"student": name, "weights": model_digest(model), "precision": precision}

    def make_pairs(
        self,
        prompts: Sequence[Prompt],
        samples: Answers,
        tokenizer: PreTrainedTokenizerBase,
        file: str,
    ) -> tuple[list[dict[str, Any]], PairReport]:
        """Pairs as the settings want them, by scores where they name a scorer, as a file.

        What was dropped is written beside them, also where no row is left, which is refused
        (UsageError).
        """
        config, scorer, path = self.config, self.scorer, self.pairs_file(file)
        teacher, scores = self.teacher_answers(), None
        if scorer is not None:
            for store in filter(None, (self.scores_file, getattr(scorer, "store", None))):
                set_aside(store, scorer.settings())
            scores = score_answers(scorer, prompts, [teacher, samples], self.scores_file)
        try:
            rows, report = build_pairs(
                prompts,
                teacher,
                samples,
                select=config.select,
                scores=scores,
                filters=config.pair_filters(),
                list_size=config.list_size,
                tokenizer=tokenizer,
            )
        except NoPairsError as error:
            write_pairs(path, [], error.report)
            advice = f"{dropped_file(path)} has every one with its reason"
            raise UsageError(f"{error}; {advice}") from None
        write_pairs(path, rows, report)
        return rows, report

    def pairs(self, file: str) -> list[dict[str, Any]]:
        """The rows of a file of pairs."""
        return read_jsonl(self.pairs_file(file))

    def pairs_file(self, file: str) -> Path:
        return self._pairs / f"{file}.jsonl"
