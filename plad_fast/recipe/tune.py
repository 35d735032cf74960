"""Search of the settings of pairs and preference training by validation prompts: `plad-fast tune`.

A trial makes pairs and trains on them in the folder of a run, as `distill` would with its settings,
and counts by the best of its checkpoints. Held-out prompts have no part in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plad_fast.checks import require_packages
from plad_fast.data.files import write_atomically
from plad_fast.data.store import RowStore
from plad_fast.errors import NotFiniteError, UsageError
from plad_fast.models.team import size
from plad_fast.pairs.build import NoPairsError
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.recipe.data_checks import NothingToLearnError
from plad_fast.recipe.distillation import Distillation, opened_run
from plad_fast.recipe.inputs import RunPrompts
from plad_fast.recipe.run import named_run
from plad_fast.recipe.search import SearchSpace, TuneConfig
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.validation import MEASURES, measure_cell, measures
from plad_fast.training.launch import sharded_by
from plad_fast.training.validation import best_check, checks

Trial = dict[str, Any]
"""`id`, its number; `settings`; `seconds`; `score`, and with it the further `MEASURES` of the best
checkpoint, its `step`, and `start`, those of the student before; or else None and the `problem`."""


def tune(
    config: DistillConfig,
    plan: TuneConfig,
    *,
    fixed: Collection[str] = (),
    overwrite: bool = False,
) -> Path:
    """Search settings, or go on with it, and write `tune/best.yaml` for `distill`, with
    `tune/trials.jsonl` and `tune/report.md` beside it.

    Args:
        config: the settings of all trials, and of the folder, which is that of a run of `distill`.
        plan: what is searched, and for how long.
        fixed: settings that a plan without names does not search.
        overwrite: start anew in a folder of an earlier run.

    Returns:
        The file of the best settings.

    Raises:
        UsageError: as `distill`; a search that cannot be; or every trial failed.
    """
    require_packages("optuna")
    if config.rounds > 1:
        raise UsageError(f"--rounds {config.rounds}: a search is of one round")
    if sharded_by() == "DeepSpeed":
        raise UsageError(
            "a search validates with a whole model in every process, which DeepSpeed does not "
            "leave; search with DDP (torchrun) or FSDP2, and train under DeepSpeed with what it "
            "finds and --validation 0"
        )
    space = SearchSpace.of(config, plan.search, fixed)
    prompts = RunPrompts.of(config)
    if not prompts.validation:
        raise UsageError(
            f"--validation {config.validation:g} sets no prompt aside, and a search goes by "
            "validation prompts; raise it"
        )
    with opened_run(config, prompts, overwrite=overwrite) as run:
        folder = run.folder / "tune"
        trials = search(run, space, plan, folder / "trials.jsonl")
        best, table = best_trial(trials), trials_table(trials)
        told, found = verdict(best), replace(config, **best["settings"])
        write_atomically(folder / "report.md", f"# Trials\n\n{told}\n\n{table}\n")
        file = write_atomically(folder / "best.yaml", f"# {told}\n{_yaml(found)}")
    print(f"\n{table}\n\n{told}\nto go on: plad-fast distill --config {file}", flush=True)
    return file


def search(run: Distillation, space: SearchSpace, plan: TuneConfig, file: Path) -> list[Trial]:
    """Runs what is left of the trials of a plan, and returns them all, in order.

    They are stored in the file as they come; those of another search, or on other answers, are set
    aside. UsageError where all of them failed.
    """
    made_by = {"search": space.settings(), **run.prepare()}
    set_aside(file, made_by)
    with RowStore.open(file, made_by) as store:
        store.require(lambda trial: trial.keys() >= {"settings", "score", "seconds"})
        while len(trials := list(store.rows.values())) < plan.trials:
            spent = sum(trial["seconds"] for trial in trials)
            if plan.minutes is not None and spent >= 60 * plan.minutes:
                break
            settings = space.suggest(trials, run.config.seed)
            if settings is None:
                print(f"== all {len(trials)} combinations have been tried", flush=True)
                break
            shown = ", ".join(f"{name} {_cell(value)}" for name, value in settings.items())
            print(f"== trial {len(trials)}: {shown}", flush=True)
            began = time.monotonic()
            outcome = _outcome(run, settings, f"trial-{len(trials)}")
            outcome["seconds"] = time.monotonic() - began
            if (told := outcome.get("problem")) is not None:
                gc.collect()  # of a training that diverged the trainer, which refers to itself
            else:
                told = f"score {outcome['score']:.3f}, before {outcome['start']['score']:.3f}"
            print(f"   {told}", flush=True)
            store.append([{"id": str(len(trials)), "settings": settings, **outcome}])
    if all(trial["score"] is None for trial in trials[: plan.trials]):
        raise UsageError(f"all trials failed, the first: {trials[0]['problem']}")
    return trials[: plan.trials]


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The one with the largest score, the earlier one of two that are equal."""
    done = (trial for trial in trials if trial["score"] is not None)
    return max(done, key=lambda trial: trial["score"])


def verdict(best: Trial) -> str:
    """What a search has found, in a line."""
    start = best["start"]["score"]
    what = "above" if best["score"] > start else "not above"
    return (
        f"trial {best['id']} is best: its score on validation prompts, {best['score']:.3f}, is "
        f"{what} that of the SFT student, {start:.3f}. The best of several trials looks better "
        "than it is; held-out prompts show what it is worth"
    )


def trials_table(trials: Sequence[Trial]) -> str:
    """In Markdown, the best one first, and above it the student before them."""
    names = list(dict.fromkeys(name for trial in trials for name in trial["settings"]))
    ranked = sorted(trials, key=lambda t: (t["score"] is None, -(t["score"] or 0.0)))
    start = {"id": "before", "settings": {}, "step": 0, **best_trial(trials)["start"]}
    lines = [["trial", *MEASURES.values(), *names, "step", "minutes"]]
    for trial in [start, *ranked]:
        measured = (measure_cell(name, trial[name]) if name in trial else "" for name in MEASURES)
        if "problem" in trial:
            measured = ("failed" if name == "score" else "" for name in MEASURES)
        settings = (_cell(trial["settings"].get(name, "")) for name in names)
        minutes = f"{trial['seconds'] / 60:.1f}" if "seconds" in trial else ""
        lines.append([trial["id"], *measured, *settings, str(trial.get("step", "")), minutes])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )


def _outcome(run: Distillation, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What came out of a trial, which fails by settings that contradict each other, leave too few
    pairs or, in one process, make the training diverge; any other error ends the search. Where it
    is logged, `name` is a part of its name."""
    try:
        training = named_run(run.config, name)
        trial = run.with_settings(replace(run.config, training=training or None, **settings))
    except UsageError as error:
        return _failure(error)
    try:
        trial.make_pairs()
        found = checks(trial.train_on_pairs())
    except (NoPairsError, NothingToLearnError) as error:
        return _failure(error)
    except NotFiniteError as error:
        if size() > 1:  # the other processes may be elsewhere
            raise
        return _failure(error)
    # The student before is kept where no checkpoint is better, which would make trials equal.
    best = best_check(found[1:])
    assert best is not None
    return {**measures(best), "step": best["step"], "start": measures(found[0])}


def _failure(error: UsageError) -> dict[str, Any]:
    return {"score": None, "problem": str(error)}


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value)


def _yaml(config: DistillConfig) -> str:
    """The settings that are not defaults, for `--config`."""
    import yaml

    defaults = DistillConfig().as_dict()
    given = {name: value for name, value in config.as_dict().items() if value != defaults[name]}
    return yaml.safe_dump({**given, "output_dir": config.output_dir}, sort_keys=False)
