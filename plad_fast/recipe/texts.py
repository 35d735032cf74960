"""The texts of a run: the teacher's answers, the student's samples round by round, their pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.prompts import Prompt
from plad_fast.data.records import model_digest
from plad_fast.data.store import RowStore, has_rows
from plad_fast.errors import UsageError
from plad_fast.pairs.build import NoPairsError, PairReport, build_answers, build_pairs
from plad_fast.pairs.generation.answer_rows import collect
from plad_fast.pairs.generation.answering import renew_answers, stored_answers
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.sources import open_local_model, teacher_fingerprint
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.judge import Judge
from plad_fast.pairs.scoring.stored import score_answers
from plad_fast.pairs.select import is_usable
from plad_fast.recipe.inputs import answer_columns, dropped_file, read_jsonl, write_pairs
from plad_fast.recipe.settings import DistillConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from plad_fast.pairs.generation.answer_rows import Answered
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
    from plad_fast.pairs.generation.text_model import TextModel

Answers = Mapping[str, Sequence[Answer]]


def sampling_for(
    config: DistillConfig, role: str, round_number: int = 1, n: int | None = None
) -> Sampling:
    """How the teacher's answers, or a student's samples, are drawn.

    Args:
        config: of the run.
        role: "teacher" or "student".
        round_number: every round of samples has seeds of its own, none of them the teacher's: the
            student may have changed little, and equal models would give equal answers.
        n: samples of a prompt in place of those of the settings.
    """
    is_teacher = role == "teacher"
    return Sampling(
        config.max_new_tokens,
        temperature=config.teacher_temperature if is_teacher else config.student_temperature,
        top_p=1.0 if is_teacher else config.top_p,
        seed=config.seed + (0 if is_teacher else round_number),
        n=n or (config.teacher_samples if is_teacher else config.student_samples),
        batch_size=config.generation_batch_size,
    )


class RecipeTexts:
    """Everything here is stored as it comes, and taken from the store the next time.

    Args:
        config: of the run.
        prompts: that the teacher answers.
        answers: folder of the answers.
        pairs: folder of pairs, scores and verdicts.
        load_teacher: makes the teacher's model, where it is a local one and the run has it already.
        judges: see `PairSettings.open_scorer`.

    Raises:
        UsageError: teacher or scorer cannot be what the settings say.
    """

    def __init__(
        self,
        config: DistillConfig,
        prompts: Sequence[Prompt],
        *,
        answers: Path,
        pairs: Path,
        load_teacher: Callable[[], TextModel] | None = None,
        judges: dict[str, Endpoint] | None = None,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.answers = answers
        self.teacher_file = answers / "teacher.jsonl"
        self.scores_file, self.verdicts_file = pairs / "scores.jsonl", pairs / "verdicts.jsonl"
        self._pairs = pairs
        self._columns = answer_columns(config)
        self._sampling = sampling_for(config, "teacher")
        self.scorer = config.open_scorer(verdicts=self.verdicts_file, judges=judges)
        if self.scorer is not None:
            self.scorer.check(prompts)
        # Made now, so that what is wrong with an endpoint's settings is found out before any work.
        self._teacher: TextModel | None = None
        if load_teacher is None or not config.has_local_teacher:
            self._teacher = config.open_teacher(precision=config.precision, columns=self._columns)
        self._load_teacher = load_teacher
        self._endpoint = getattr(self._teacher, "endpoint", None)

    def try_endpoints(self, judge: object, *, overwrite: bool) -> None:
        """A word with teacher and judge, where they are behind endpoints, before long work."""
        if isinstance(self._teacher, EndpointModel):
            self._teacher.try_out(self._sampling, self.teacher_file, overwrite=overwrite)
        if isinstance(judge, Judge):
            judge.try_out(overwrite=overwrite)

    def renew_teacher_answers(self) -> None:
        """Puts answers to what prompts were before out of the store."""
        settings = {**self.teacher_made_by(), **self._sampling.settings()}
        renew_answers(self.teacher_file, self.prompts, self._sampling, settings)

    def ask_teacher(self) -> Answered:
        """Let the teacher answer what it has not answered yet, and let go of its model.

        Raises:
            UsageError: as `stored_answers`.
        """

        def load() -> TextModel:
            # Nothing here holds a local teacher when the student is loaded.
            teacher, self._teacher = self._teacher, None
            if teacher is None:
                assert self._load_teacher is not None
                return self._load_teacher()
            return teacher

        return stored_answers(
            load,
            self.prompts,
            self.teacher_file,
            self._sampling,
            fingerprint=self.teacher_made_by(),
            to_the_end=True,
        )

    def require_all_asked(self, answered: Answered) -> None:
        """Raises UsageError where an endpoint was asked no more before the end, for a budget or an
        outage."""
        stopped = getattr(self._endpoint, "stopped", "")
        if answered.failures and stopped:
            raise UsageError(
                f"the teacher has answered {len(answered.answers)} of {len(self.prompts)} prompts "
                f"and is asked no more: {stopped}; what has come is kept: run the same command "
                "again to ask for the rest, with a larger budget if one was spent"
            )

    def teacher_answers(self) -> Answers:
        """Prompt id -> the teacher's answers, in the order of the prompts.

        What it failed at in its own stage stays so: an answer that came later would be in the data
        of some stages only.
        """
        settings = {**self.teacher_made_by(), **self._sampling.settings()}
        with RowStore.open(self.teacher_file, settings) as store:
            return collect(self.prompts, store, self._sampling, {}).answers

    def best_teacher_answers(self) -> dict[str, Answer]:
        """Prompt id -> the first answer that the teacher finished."""
        usable = ((i, next(filter(is_usable, a), None)) for i, a in self.teacher_answers().items())
        return {prompt_id: answer for prompt_id, answer in usable if answer is not None}

    def has_teacher_answers(self) -> bool:
        """Whether some are stored, whatever teacher gave them."""
        return has_rows(self.teacher_file)

    def teacher_made_by(self) -> dict[str, Any]:
        """What the teacher's answers depend on besides prompts and sampling."""
        config = self.config
        made_by = teacher_fingerprint(
            config.teacher, base_url=config.base_url, columns=self._columns
        )
        return made_by | ({"precision": config.precision} if config.has_local_teacher else {})

    def teacher_settings(self) -> dict[str, Any]:
        """What the teacher's answers depend on, by names that a user knows."""
        named = {
            name if name in ("teacher", "base_url") else f"teacher's {name}": value
            for name, value in self.teacher_made_by().items()
        }
        names = ("teacher_temperature", "max_new_tokens", "seed")
        return named | {name: getattr(self.config, name) for name in names}

    def usage(self) -> dict[str, str]:
        """What this run spent at endpoints, by "teacher" and "judge" where there are such, and
        what became of the judge's comparisons."""
        found = {} if self._endpoint is None else {"teacher": str(self._endpoint.usage)}
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
        """The samples of a student.

        Args:
            prompts: to answer.
            model: the student that the round starts from.
            name: for progress and messages.
            made_by: what the student is known by; its name if None.
            round_number, n: of `sampling_for`.
            others_aside: of `stored_answers`.
        """
        precision = self.config.precision
        suffix = "" if round_number == 1 else f"-{round_number}"
        return stored_answers(
            lambda: open_local_model(model, name, precision=precision),
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

    def make_pairs(
        self,
        prompts: Sequence[Prompt],
        samples: Answers,
        tokenizer: PreTrainedTokenizerBase,
        file: str,
    ) -> tuple[list[dict[str, Any]], PairReport]:
        """Pairs as the settings want them, by scores where they name a scorer, as a file.

        What was dropped is written beside them, also where no row is left.

        Raises:
            UsageError: from the scorer, and when no row is left.
        """
        config, scorer, path = self.config, self.scorer, self.pairs_file(file)
        teacher, scores = self.teacher_answers(), None
        if scorer is not None:
            for store in (self.scores_file, getattr(scorer, "store", None)):
                if store is not None:
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

    def make_held_out_pairs(
        self, prompts: Sequence[Prompt], samples: Answers, tokenizer: PreTrainedTokenizerBase
    ) -> PairReport:
        """The teacher's first answer > the student's first sample, whatever is trained on."""
        rows, report = build_pairs(prompts, self.teacher_answers(), samples, tokenizer=tokenizer)
        write_pairs(self.pairs_file("held-out"), rows, report)
        return report

    def pairs(self, file: str) -> list[dict[str, Any]]:
        """The rows of a file of pairs."""
        return read_jsonl(self.pairs_file(file))

    def pairs_file(self, file: str) -> Path:
        return self._pairs / f"{file}.jsonl"
