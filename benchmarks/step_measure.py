"""One piece of the step benchmark in a process of its own (`python -m benchmarks.step_measure
--worker ...`): the pairs and the naive first step, or a training run of one implementation."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_models
from benchmarks.common import Record, print_record
from benchmarks.step_data import (
    LEAST_GAP,
    PAIRS_PER_STEP,
    QUICK_LEAST_GAP,
    Pair,
    StepCase,
    batches,
    dialogsum_pairs,
    load,
    made_pairs,
    save,
    with_active_share,
)
from benchmarks.step_impls import IMPLS, Impl, Job, hinge, naive_sums
from benchmarks.step_record import Recorder, Truth


def prepare(case: StepCase, pairs_path: Path, dialogsum: Path | None) -> None:
    """Writes the pairs of a kind and their margins under the model before training."""
    model, tokenizer = step_models.load(case.quick, case.device)
    if case.kind == "dialogsum":
        if dialogsum is None:
            raise ValueError("the dialogsum case needs the path of a DialogSum JSONL")
        pairs = dialogsum_pairs(dialogsum, tokenizer)
    else:
        pairs = made_pairs(case.kind, len(tokenizer), quick=case.quick)
    margins: list[float] = []
    with torch.no_grad():
        for batch in batches(pairs, len(pairs) // PAIRS_PER_STEP):
            sums = naive_sums(model, batch, tokenizer.pad_token_id, case.device)
            margins += (sums[0::2] - sums[1::2]).tolist()
    save(pairs_path, pairs, margins)


def save_truth(case: StepCase, pairs_path: Path, path: Path) -> Record:
    """Writes loss and gradients of the naive first step in float32."""
    pairs, beta = _pairs_and_beta(case, pairs_path)
    model, tokenizer = step_models.load(case.quick, case.device)
    sums = naive_sums(model, pairs[:PAIRS_PER_STEP], tokenizer.pad_token_id, case.device)
    loss = hinge(sums, beta)
    loss.backward()
    Truth.save(path, loss.item(), model)
    return {"status": "ok", "beta": beta}


def measure(
    impl: Impl,
    case: StepCase,
    pairs_path: Path,
    truth_path: Path,
    *,
    steps: int,
    progress: Path | None = None,
    max_tokens: int | None = None,
) -> Record:
    """Trains; the record has times of the timed steps, memory, and errors of the first step."""
    pairs, beta = _pairs_and_beta(case, pairs_path)
    model, tokenizer = step_models.load(case.quick, case.device)
    with tempfile.TemporaryDirectory() as folder:
        options = {} if max_tokens is None else {"max_tokens": max_tokens}
        whole = impl.remembers and case.active < 1
        job = Job(case, pairs, beta, steps, Path(folder), whole_warm_up=whole, **options)
        device = torch.device(case.device)
        recorder = Recorder(device, Truth(truth_path), warm_up=job.warm_up, progress=progress)
        logs = impl.run(model, tokenizer, job, recorder)
        recorder.finish()
    errors = recorder.gradient_errors
    assert errors is not None
    assert len(recorder.seconds) == steps
    problem = recorder.mismatch(case.dtype)
    return {
        "status": "ok" if problem is None else "mismatch",
        "reason": problem or "",
        "seconds": recorder.seconds,
        "pairs": steps * PAIRS_PER_STEP,
        "distinct_tokens": job.distinct_tokens,
        "process_bytes": recorder.process_bytes,
        "growth_bytes": recorder.growth_bytes,
        "loss": recorder.first_loss,
        "loss_error": recorder.loss_error,
        "gradient_error": errors.together,
        "worst_error": errors.worst,
        "worst_parameter": errors.worst_parameter,
        "active_pairs": logs.get("active_pairs"),
        "skipped_backwards": logs.get("skipped_backwards"),
        "saved_tokens": logs.get("saved_tokens"),
    }


def _pairs_and_beta(case: StepCase, path: Path) -> tuple[list[Pair], float]:
    pairs, margins = load(path)
    least_gap = QUICK_LEAST_GAP if case.quick else LEAST_GAP
    return with_active_share(pairs, margins, case.active, least_gap=least_gap)


def truth_spec(case: StepCase, pairs: Path, truth: Path, dialogsum: Path | None) -> Record:
    return {
        "do": "truth",
        "case": asdict(case),
        "pairs": str(pairs),
        "truth": str(truth),
        "dialogsum": None if dialogsum is None else str(dialogsum.resolve()),
    }


def run_spec(
    case: StepCase,
    impl: str,
    pairs: Path,
    truth: Path,
    *,
    steps: int,
    progress: Path,
    max_tokens: int | None,
) -> Record:
    return {
        "do": "run",
        "case": asdict(case),
        "pairs": str(pairs),
        "truth": str(truth),
        "impl": impl,
        "steps": steps,
        "progress": str(progress),
        "max_tokens": max_tokens,
    }


def work(spec: Mapping[str, Any]) -> Record:
    """Does what a spec says."""
    case, pairs = StepCase(**spec["case"]), Path(spec["pairs"])
    try:
        if spec["do"] == "truth":
            if not pairs.exists():  # the pairs of a kind serve all its cases
                source = spec["dialogsum"]
                prepare(case, pairs, None if source is None else Path(source))
            return save_truth(case, pairs, Path(spec["truth"]))
        return measure(
            IMPLS[spec["impl"]],
            case,
            pairs,
            Path(spec["truth"]),
            steps=spec["steps"],
            progress=Path(spec["progress"]),
            max_tokens=spec["max_tokens"],
        )
    except ImportError as error:
        return {"status": "missing", "reason": str(error)}
    except ValueError as error:  # plad_fast.errors.UsageError is one
        return {"status": "failed", "reason": str(error)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", required=True, type=json.loads)
    print_record(work(parser.parse_args().worker))
