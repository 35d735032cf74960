"""Students that come from elsewhere, compared on pairs of a file: `plad-fast evaluate`."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from plad_fast.checks import require_packages
from plad_fast.data.records import digest, model_digest
from plad_fast.errors import UsageError
from plad_fast.evaluation.held_out import read_held_out
from plad_fast.evaluation.report.terminal import comparison_table
from plad_fast.evaluation.report.write import write_results
from plad_fast.evaluation.run_students import evaluate_models, file_stem
from plad_fast.models.loading import find_model, is_encoder_decoder, load_tokenizer
from plad_fast.models.response_scores import check_pairs
from plad_fast.pairs.scoring.judge import Judge
from plad_fast.recipe.data_checks import check_rows, show_findings
from plad_fast.recipe.dependencies import stage_settings
from plad_fast.recipe.doctor import versions
from plad_fast.recipe.inputs import check_students, read_pairs
from plad_fast.recipe.run_folder import RunFolder
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.sources import held_out_options

# In the folder of an evaluation; what else lies there is the user's.
_MADE = (
    r"(metrics|.+-logps|.+-calibration)\.json|(judge|scores-|.+-greedy|.+-sampled).*\.jsonl"
    r"|report\.html|plots|plad-fast-error\.log|\..+\.tmp"
)
_LONGEST_NAME = 100  # bytes; names of files have at most 255, and an end is added


def evaluate_on_pairs(
    students: Mapping[str, str | Path],
    pairs: str,
    config: DistillConfig,
    *,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Compare students on held-out pairs whose chosen answers are the teacher's. Resumable.

    Writes `metrics.json`, plots and `report.html` into the output folder.

    Args:
        students: name -> hub id, folder, .gguf file or `offline`, the baseline first.
        pairs: file in the standard preference format.
        config: sampling, length normalisation and output folder.
        overwrite: start anew in a folder of an earlier evaluation.
        command: what the report says to run again.

    Raises:
        UsageError: from reading the pairs, loading, or generation; names that cannot be told apart
            as files; a folder that other models, pairs or settings, or another command, have made;
            and while another process is at work in it.
    """
    require_packages("rouge_score", "matplotlib")
    _check_names(list(students))
    if len(config.temperatures) > 1:
        raise UsageError(
            f"--student-temperature {', '.join(map(str, config.temperatures))}: all students are "
            "sampled at one temperature here; give one"
        )
    models = {
        name: Path(find_model(os.fspath(path), f"--student {name}={path}"))
        for name, path in students.items()
    }
    config.require_room()
    path = Path(config.output_dir)
    rows = read_pairs(pairs)
    held_out = read_held_out(rows, pairs, reasoning=config.reasoning)
    findings = check_rows(rows, "held-out pairs")
    show_findings(findings)
    for model in models.values():  # what cannot be scored is found before any student is run
        check_pairs(
            load_tokenizer(model),
            held_out.pairs,
            max_length=config.max_length,
            encoder_decoder=is_encoder_decoder(model),
        )
    options = held_out_options(config, path)
    judge = options["judge"]
    folder = RunFolder(
        path,
        {
            **stage_settings(config, "evaluation"),
            "students": list(models),
            **{f"{name}'s weights": model_digest(model) for name, model in models.items()},
            "pairs": f"{len(held_out.pairs)} pairs, {digest(list(held_out.pairs))}",
        },
        command="evaluate",
        overwrite=overwrite,
        is_bound=(path / "metrics.json").exists,
        made=_MADE,
        check=lambda: None if judge is None else judge.try_out(overwrite=overwrite),
    )
    with closing(folder):
        results, outputs = evaluate_models(models, held_out, path, **options)
        of_students = check_students(outputs)
        show_findings(of_students)
        report = write_results(
            path,
            results,
            outputs,
            held_out,
            title=f"Evaluation of {', '.join(models)}",
            config={"students": {k: str(v) for k, v in models.items()}, "pairs": pairs},
            length_normalization=config.alpha,
            trainings=models,
            data={"findings": [*map(str, findings), *map(str, of_students)]},
            command=command,
            versions=versions(),
        )
    if isinstance(judge, Judge):
        print(f"judge, in this run: {judge.spent()}")
    print(f"{comparison_table(results)}\n\nreport: {report}", flush=True)
    return results


def _check_names(names: Sequence[str]) -> None:
    """Names become names of files, on some systems without regard to case or to how an accent is
    written."""
    seen: dict[str, str] = {}
    for name in names:
        odd = any(c in "/\\:" or unicodedata.category(c)[0] == "C" for c in name)
        if odd or name.startswith(".") or len(name.encode()) > _LONGEST_NAME:
            readable = "".join(c if c.isprintable() else "?" for c in name[:_LONGEST_NAME])
            raise UsageError(
                f"--student {readable}=...: files are named after it: choose a name without / \\ : "
                f"and control characters, of at most {_LONGEST_NAME} bytes, that begins with no dot"
            )
        plain = file_stem(name)
        if plain in seen:
            raise UsageError(
                f"--student {seen[plain]} and --student {name} would share their files; give them "
                'names that differ in more than case, spaces and ? * < > | "'
            )
        seen[plain] = name
        if plain == "teacher" or plain.partition("-")[0] == "scores":
            raise UsageError(
                f"--student {name}: the answers in the pairs are those of the teacher in tables, "
                "and scores begin the names of scorers' files; choose another name"
            )
