"""Teacher, sampling, scorers and judge, as the settings have them; none is loaded or asked yet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.errors import UsageError
from plad_fast.evaluation.run_students import scorer_file
from plad_fast.pairs.generation import sources
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.given import ColumnModel
from plad_fast.pairs.generation.ray_model import RayModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.scoring import scorers as scoring
from plad_fast.pairs.scoring.judge import Judge
from plad_fast.recipe.settings import DistillConfig

if TYPE_CHECKING:
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
    from plad_fast.pairs.generation.text_model import TextModel

_FURTHER = 2**32  # from seed to seed of turns: no seed of a round comes so far
JUDGE_STORE = "judge.jsonl"
"""In the folder of an evaluation: what the judge said."""


def open_teacher(
    config: DistillConfig,
    columns: Callable[[str], Mapping[str, str | None]] | None,
    teacher: str,
    name: str,
    batches: Path | None = None,
) -> TextModel:
    """One of the teachers; see `plad_fast.pairs.generation.sources.open_teacher`."""
    is_endpoint = _is_endpoint(teacher)
    # Where this teacher is none, the endpoint may be the judge's, or another teacher's.
    is_others = any(map(_is_judge, (config.scorer, config.eval_scorer))) or any(
        map(_is_endpoint, config.teachers)
    )
    open_it = functools.partial(
        sources.open_teacher,
        teacher,
        name=name,
        columns=columns if teacher.startswith("column:") else None,
        precision=config.precision,
        base_url=None if is_others and not is_endpoint else config.base_url,
        batches=batches if config.batch else None,
        **(_endpoint_options(config) if is_endpoint else {}),
    )
    opened = open_it()
    if isinstance(opened, (EndpointModel, ColumnModel)):
        return opened  # there is no work in it that actors could share
    return on_engine(config, open_it, name)


def on_engine(config: DistillConfig, open_it: Callable[[], TextModel], name: str) -> TextModel:
    """A model in this process, or in the actors that the settings ask for."""
    if config.engine == "local":
        return open_it()
    return RayModel(open_it, name, actors=config.actors, gpus=config.gpus_per_actor)


def open_scorer(
    config: DistillConfig, spec: str, verdicts: Path, judges: dict[str, Endpoint] | None = None
) -> scoring.Scorer:
    """A scorer by its name.

    Args:
        config: has the endpoint's options.
        spec: see `plad_fast.pairs.scoring.scorers.open_scorer`.
        verdicts: file in which a judge keeps what it was told.
        judges: endpoints of the run's judges by their specifications, to which a new one is added:
            one that is opened twice has one budget.
    """
    if not _is_judge(spec):
        return scoring.open_scorer(spec)
    known = (judges or {}).get(spec)
    endpoint = known or {"base_url": config.base_url, **_endpoint_options(config)}
    judge = scoring.open_scorer(spec, endpoint=endpoint, store=verdicts)
    if judges is not None and isinstance(judge, Judge):
        judges[spec] = judge.endpoint
    return judge


def teacher_sampling(config: DistillConfig, teacher: str) -> Sampling:
    """Drawing of the answers of the teacher of this specification."""
    # An endpoint adds these tokens itself.
    more = 0 if _is_endpoint(teacher) else config.reasoning_tokens
    return Sampling(
        config.max_new_tokens + more,
        temperature=config.teacher_temperature,
        seed=config.seed,
        n=config.teacher_samples,
        batch_size=config.generation_batch_size,
    )


def student_sampling(config: DistillConfig, turn: int = 0, round_number: int = 1) -> Sampling:
    """Drawing of a student's samples, one of a prompt, at the temperature of this turn.

    Turns go through the temperatures, from the highest down. Every round and every turn has a seed
    of its own, none of them the teacher's: the student may have changed little, and equal models
    would give equal answers.
    """
    temperatures = sorted(config.temperatures, reverse=True)
    return Sampling(
        config.student_tokens,
        temperature=temperatures[turn % len(temperatures)],
        top_p=config.top_p,
        seed=config.seed + round_number + _FURTHER * turn,
        batch_size=config.generation_batch_size,
    )


def held_out_options(
    config: DistillConfig, folder: Path, judges: dict[str, Endpoint] | None = None
) -> dict[str, Any]:
    """The options of `evaluate_models` that the settings ask for; `folder` is the evaluation's, for
    the verdicts of a judge, and `judges` as in `open_scorer`.

    The scorer that pairs were chosen by stands beside the one that they were not. A judge compares
    students' answers with each other; any other scorer rates every answer by itself. Two judges, or
    two scorers of one name, are refused (UsageError).
    """
    specs = dict.fromkeys(spec for spec in (config.scorer, config.eval_scorer) if spec)
    if len(specs) > 1 and all(map(_is_judge, specs)):
        raise UsageError(
            f"--scorer and --eval-scorer are two judges, {' and '.join(specs)}, and only one can "
            "say who wins; name another kind of scorer as one of them"
        )
    opened = {spec: open_scorer(config, spec, folder / JUDGE_STORE, judges) for spec in specs}
    judge = next((scorer for spec, scorer in opened.items() if _is_judge(spec)), None)
    scorers = {spec: scorer for spec, scorer in opened.items() if not _is_judge(spec)}
    if len({scorer_file(scorer.name, folder) for scorer in scorers.values()}) < len(scorers):
        raise UsageError(
            f"--scorer and --eval-scorer are models of one name, {' and '.join(scorers)}, after "
            "which their files are named; rename a folder"
        )
    return {
        "sampling": student_sampling(config),
        "length_normalization": config.alpha,
        "max_length": config.max_length,
        "precision": config.precision,
        "reasoning": config.reasoning,
        "scorers": scorers,
        "judge": judge,
        "calibration_samples": config.calibration_samples,
        "calibration_scorer": scorers.get(config.eval_scorer or config.scorer or ""),
    }


def _endpoint_options(config: DistillConfig) -> dict[str, Any]:
    """Of an `Endpoint`, but for its address."""
    names = ("api_key_env", "concurrency", "reasoning_tokens", "token_budget", "cost_budget")
    prices = None if config.price_in is None else (config.price_in, config.price_out)
    options = {name: getattr(config, name) for name in names}
    return {**options, "timeout": config.request_timeout, "prices": prices}


def _is_endpoint(teacher: str) -> bool:
    return teacher.startswith("openai:")


def _is_judge(spec: str | None) -> bool:
    return spec is not None and spec.startswith("judge:")
