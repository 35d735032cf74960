"""The texts of a run: the teacher's answers, the student's samples round by round, their pairs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.checks import require_packages
from plad_fast.data.prompts import Prompt
from plad_fast.data.records import digest
from plad_fast.pairs.build import NoPairsError, PairReport, build_pairs
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.sources import (
    LazyLocalModel,
    open_local_model,
    student_fingerprint,
)
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.judge import Judge
from plad_fast.pairs.scoring.stored import score_answers
from plad_fast.pairs.select import is_usable
from plad_fast.recipe.inputs import dropped_file, read_jsonl, write_pairs
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.sources import on_engine, open_scorer, student_sampling
from plad_fast.recipe.teachers import Answers, Teachers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint


class RecipeTexts:
    """Answers, scores and pairs in two folders, stored as they come, and taken from the store the
    next time.

    `endpoints` are those of teachers and judges, as in `Teachers` and `open_scorer`. UsageError
    where teacher or scorer cannot be what the settings say.
    """

    def __init__(
        self,
        config: DistillConfig,
        prompts: Sequence[Prompt],
        *,
        answers: Path,
        pairs: Path,
        endpoints: dict[str, Endpoint] | None = None,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.answers = answers
        self.scores_file, self.verdicts_file = pairs / "scores.jsonl", pairs / "verdicts.jsonl"
        self._pairs = pairs
        if config.engine == "ray":
            require_packages("ray")
        self.scorer = None
        if config.scorer is not None:
            self.scorer = open_scorer(config, config.scorer, self.verdicts_file, endpoints)
            self.scorer.check(prompts)
        self.teachers = Teachers(
            config,
            prompts,
            answers,
            scorer=self.scorer,
            scores=pairs / "scores-teachers.jsonl",
            endpoints=endpoints,
        )

    def with_settings(self, config: DistillConfig) -> RecipeTexts:
        """The same texts, with other settings of the pairs, but for the scorer."""
        other = copy(self)
        other.config = config
        return other

    def try_endpoints(self, judge: object, *, overwrite: bool) -> None:
        """A word with teachers and judge, where they are behind endpoints, before long work."""
        self.teachers.try_out(overwrite=overwrite)
        if isinstance(judge, Judge):
            judge.try_out(overwrite=overwrite)

    def best_teacher_answers(self) -> dict[str, Answer]:
        """Prompt id -> the first answer that the teacher finished, or the best of several's."""
        told = self.teachers.answers()
        usable = ((i, next(filter(is_usable, a), None)) for i, a in told.items())
        return {prompt_id: answer for prompt_id, answer in usable if answer is not None}

    def usage(self) -> dict[str, str]:
        """What this run spent at endpoints, by teacher and "judge" where there are such, and what
        became of the judge's comparisons."""
        found = self.teachers.usage()
        return found | ({"judge": self.scorer.spent()} if isinstance(self.scorer, Judge) else {})

    def samples(
        self,
        prompts: Sequence[Prompt],
        model: str | Path,
        name: str,
        *,
        made_by: str | None = None,
        round_number: int = 1,
        turn: int = 0,
        n: int = 1,
    ) -> Answers:
        """The samples of a student to some prompts, `n` of each.

        `name` is for progress and messages, and what the student is known by unless that is
        `made_by`; `round_number` and `turn` are those of `student_sampling`.
        """
        precision, reasoning = self.config.precision, self.config.reasoning
        thinks = reasoning == "keep"
        load = partial(open_local_model, model, name, precision=precision, thinks=thinks)
        drawn = stored_answers(
            lambda: on_engine(self.config, partial(LazyLocalModel, load, name), name),
            prompts,
            self.samples_file(round_number, turn),
            replace(student_sampling(self.config, turn, round_number), n=n),
            fingerprint=student_fingerprint(
                made_by or name, model, precision=precision, reasoning=reasoning
            ),
            others_aside=True,
            reasoning=reasoning,
        ).answers
        by = "student" if len(self.config.teachers) > 1 else ""
        return {key: [replace(answer, by=by) for answer in own] for key, own in drawn.items()}

    def samples_file(self, round_number: int = 1, turn: int = 0) -> Path:
        """Where samples are stored: student.jsonl, student-2.jsonl of the second round, and
        student.turn1.jsonl and so on of further turns."""
        number = "" if round_number == 1 else f"-{round_number}"
        return self.answers / f"student{number}{f'.turn{turn}' if turn else ''}.jsonl"

    def samples_in_turn(
        self,
        prompts: Sequence[Prompt],
        students: Sequence[tuple[str | Path, str]],
        **options: Any,
    ) -> Answers:
        """The samples of which pairs are made, `student_samples` of each prompt, in the turns of
        the settings.

        Which turn has the first sample of a prompt depends on its id, so that a prompt that is
        added changes no other's. `students` has models and names: of the one that is trained and,
        where `rejected_from` wants it, of the one before fine-tuning. `options` are those of
        `samples`.
        """
        config, turns = self.config, self.config.sample_turns
        first = {p.id: int(digest(p.id), 16) % len(turns) for p in prompts}
        drawn: list[dict[str, Sequence[Answer]]] = []
        for place, turn in enumerate(turns):
            wanted: dict[int, list[Prompt]] = {}  # by the number of samples of this turn
            for p in prompts:
                mine = range((place - first[p.id]) % len(turns), config.student_samples, len(turns))
                wanted.setdefault(len(mine), []).append(p)
            model, name = students[turn // len(config.temperatures)]
            drawn.append({})
            for n in wanted.keys() - {0}:
                drawn[-1] |= self.samples(wanted[n], model, name, turn=turn, n=n, **options)

        def sample(prompt: Prompt, number: int) -> Answer:
            again, place = divmod(number, len(turns))
            own = drawn[(first[prompt.id] + place) % len(turns)]
            return replace(own[prompt.id][again], sample=number)

        return {p.id: [sample(p, k) for k in range(config.student_samples)] for p in prompts}

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
        teacher, scores = self.teachers.answers(), None
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
            error.args = (f"{error}; {dropped_file(path)} has every one with its reason",)
            raise
        write_pairs(path, rows, report)
        return rows, report

    def pairs(self, file: str) -> list[dict[str, Any]]:
        """The rows of a file of pairs."""
        return read_jsonl(self.pairs_file(file))

    def pairs_file(self, file: str) -> Path:
        return self._pairs / f"{file}.jsonl"
