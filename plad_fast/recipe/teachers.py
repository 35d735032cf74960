"""The teachers of a run: each has a store of its answers, and a scorer decides between several."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.prompts import Prompt, check_tools
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.models.loading import load_tokenizer
from plad_fast.models.team import size
from plad_fast.pairs.generation.answer_rows import Answered, batch_record, collect
from plad_fast.pairs.generation.answering import AskingError, renew_answers, stored_answers
from plad_fast.pairs.generation.endpoint.batch import require_prompts
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.sources import split_spec, teacher_fingerprint
from plad_fast.pairs.generation.text_model import Answer, TextModel
from plad_fast.pairs.scoring.scorers import Scorer
from plad_fast.pairs.scoring.stored import score_answers
from plad_fast.pairs.select import is_usable
from plad_fast.recipe.inputs import answer_columns
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.sources import open_teacher, teacher_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
    from plad_fast.pairs.generation.sampling import Sampling

logger = logging.getLogger(__name__)

Answers = Mapping[str, Sequence[Answer]]


@dataclass
class _Teacher:
    spec: str
    name: str
    store: Path
    sampling: Sampling
    made_by: dict[str, Any]
    """What its answers depend on besides prompts and sampling."""
    model: TextModel | None
    """Let go of once it was asked: a local one makes room for the student."""
    endpoint: Endpoint | None

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.made_by, **self.sampling.settings()}

    def take_model(self) -> TextModel:
        """The model, which nothing else holds any more."""
        assert self.model is not None
        model, self.model = self.model, None
        return model


class Teachers:
    """Whoever answers `prompts`, in the order of the settings.

    Args:
        config: the settings.
        prompts: of the run.
        answers: folder of their stores, `teacher.jsonl`, `teacher-2.jsonl` and so on.
        scorer: decides between the answers of several.
        scores: store of what it says of them.
        endpoints: those that were opened before, by the teachers' specifications; they are asked
            again, with what is left of their budgets, and new ones are added.

    Raises:
        UsageError: a teacher cannot be what the settings say.
    """

    def __init__(
        self,
        config: DistillConfig,
        prompts: Sequence[Prompt],
        answers: Path,
        *,
        scorer: Scorer | None,
        scores: Path,
        endpoints: dict[str, Endpoint] | None = None,
    ) -> None:
        self.scores = scores
        self._prompts, self._scorer, self._reasoning = prompts, scorer, config.reasoning
        columns = answer_columns(config)

        def teacher(number: int, spec: str) -> _Teacher:
            # Made now, so that what is wrong with an endpoint's settings is found before any work.
            name = "teacher" if len(config.teachers) == 1 else f"teacher {spec}"
            store = answers / ("teacher.jsonl" if number == 1 else f"teacher-{number}.jsonl")
            batches = batch_record(store)
            if batches.exists() and not config.batch:
                raise UsageError(
                    f"a batch that was paid for is under way for {spec}: add --batch to take its "
                    f"answers, or delete {batches} to give it up"
                )
            require_prompts(batches, prompts)
            opened = open_teacher(config, columns, spec, name, batches)
            if isinstance(opened, EndpointModel) and endpoints is not None:
                opened.endpoint = endpoints.setdefault(spec, opened.endpoint)
            made_by = teacher_fingerprint(spec, base_url=config.base_url, columns=columns)
            if split_spec(spec)[0] == "local":
                made_by["precision"] = config.precision
            sampling = teacher_sampling(config, spec)
            endpoint = getattr(opened, "endpoint", None)
            return _Teacher(spec, name, store, sampling, made_by, opened, endpoint)

        self._all = [teacher(*each) for each in enumerate(config.teachers, start=1)]

    @property
    def stores(self) -> list[Path]:
        """The files of their answers."""
        return [teacher.store for teacher in self._all]

    @property
    def made_by(self) -> dict[str, Any]:
        """What their answers depend on besides prompts and sampling; of several by their names."""
        if len(self._all) == 1:
            return self._all[0].made_by
        specs = [teacher.spec for teacher in self._all]
        return {"teacher": specs, **{teacher.spec: teacher.made_by for teacher in self._all}}

    @property
    def choice(self) -> dict[str, Any]:
        """What the choice between several depends on, besides their answers."""
        return {} if len(self._all) == 1 or self._scorer is None else self._scorer.settings()

    @property
    def stopped(self) -> str:
        """Why the only teacher was asked no more, if so; several make up for one another."""
        return getattr(self._all[0].endpoint, "stopped", "") if len(self._all) == 1 else ""

    def usage(self) -> dict[str, str]:
        """What this run spent at endpoints, by teacher."""
        return {each.name: str(each.endpoint.usage) for each in self._all if each.endpoint}

    def try_out(self, *, overwrite: bool) -> None:
        """A word with each that is behind an endpoint, before long work."""
        for teacher in self._all:
            if isinstance(teacher.model, EndpointModel):
                teacher.model.try_out(teacher.sampling, teacher.store, overwrite=overwrite)

    def ask(self) -> Answered:
        """Let each answer what it has not answered yet, and let go of its model; see
        `stored_answers`. Answers to what prompts were before are put aside first; those of another
        teacher or other settings are refused, for they may have been paid for.

        Of several, one that fails on the way loses what it has not answered, with a warning;
        UsageError where all do."""
        every = Answered({}, [])
        errors: list[AskingError] = []
        for teacher in self._all:
            renew_answers(teacher.store, self._prompts, teacher.sampling, teacher.settings)
            sharded = getattr(teacher.model, "sharded", False)
            try:
                answered = stored_answers(
                    teacher.take_model,
                    self._prompts,
                    teacher.store,
                    teacher.sampling,
                    fingerprint=teacher.made_by,
                    to_the_end=True,
                    reasoning=self._reasoning,
                )
            except AskingError as error:
                # Other processes with a share of it have ended.
                if len(self._all) == 1 or (size() > 1 and sharded):
                    raise
                logger.warning("%s is asked no more, and the others are: %s", teacher.spec, error)
                errors.append(error)
                continue
            if teacher.model is not None:  # all is stored, also what a kill left in a record
                batch_record(teacher.store).unlink(missing_ok=True)
            for prompt_id, answers in answered.answers.items():
                every.answers.setdefault(prompt_id, []).extend(answers)
            every.failures.extend(answered.failures)
        if len(errors) == len(self._all):
            raise errors[0]
        return every

    def answers(self) -> Answers:
        """Prompt id -> the answers to it, in the order of the prompts; those of several teachers
        the best first, by the scorer.

        What they failed at when they were asked stays so: an answer that came later would be in
        the data of some stages only.
        """
        found: dict[str, list[Answer]] = {prompt.id: [] for prompt in self._prompts}
        for teacher in self._all:
            by = teacher.spec if len(self._all) > 1 else ""
            with RowStore.open(teacher.store, teacher.settings) as store:
                told = collect(self._prompts, store, teacher.sampling, {}, self._reasoning).answers
            for prompt_id, answers in told.items():
                found[prompt_id] += [replace(answer, by=by) for answer in answers]
        found = {prompt_id: answers for prompt_id, answers in found.items() if answers}
        return found if len(self._all) == 1 else self._best_first(found)

    def _best_first(self, found: Answers) -> Answers:
        """Those that cannot be used last, and before them those without a score."""
        assert self._scorer is not None
        for store in filter(None, (self.scores, getattr(self._scorer, "store", None))):
            set_aside(store, self._scorer.settings())
        scores = score_answers(self._scorer, self._prompts, [found], self.scores)

        def place(answer: Answer) -> tuple[bool, float]:
            score = scores.get((answer.prompt_id, answer.text), -math.inf)
            return not is_usable(answer), -score

        return {prompt_id: sorted(answers, key=place) for prompt_id, answers in found.items()}


def require_tools(
    config: DistillConfig, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises UsageError where prompts have tools, calls or results, and the student, whose
    tokenizer this is, or a teacher could not do with them."""
    if not any(prompt.has_tools for prompt in prompts):
        return
    check_tools(tokenizer, prompts)
    for spec in config.teachers:
        kind, rest = split_spec(spec)
        if kind == "python":
            raise UsageError(
                f"prompts have tools, and a function is given the prompt alone: {spec} cannot call "
                "them; name another --teacher"
            )
        runs_here = kind in ("local", "vllm")
        if runs_here and load_tokenizer(rest).chat_template != tokenizer.chat_template:
            raise UsageError(
                f"prompts have tools, and {spec} would write its calls in other marks than the "
                "student, whose chat template is another; serve the teacher with a parser of calls "
                "(vllm serve --enable-auto-tool-choice) and name it as openai:MODEL"
            )
