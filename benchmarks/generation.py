"""Tokens a second of answering prompts with SmolLM2-135M-Instruct: `generate`, and ours.

    python -m benchmarks.generation                                # built-in prompts
    python -m benchmarks.generation --instructions user_oriented_instructions.jsonl
    python -m benchmarks.generation --quick                        # a tiny random model, seconds
    python -m benchmarks.generation --plot                         # the PNG from the CSV, no more

Every number comes from a fresh process. The processes of a case are interleaved in rounds, so that
a slow minute of a shared machine falls on all of them, and ratios are taken within rounds. Exit
status: 0; 1 when one of ours fails, or float32 answers are not those of `generate`; 2 for bad
arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_models
from benchmarks.common import (
    DTYPES,
    MIB,
    RESULTS,
    Record,
    environment,
    format_table,
    peak_memory,
    print_record,
    run_worker,
    write_csv,
)
from benchmarks.loss import say
from plad_fast.data.prompts import Prompt, builtin_prompts
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer

Answers = list[Answer]
BASELINE = "generate"
SAME = "generate sorted"
# Share of float32 answers that may differ from those of `SAME`: one token that rounding decides
# changes all that follow. `SAME` differs from itself in 1 of 24 when its batches are smaller.
MOST_DIFFERENT = 0.3
HEADER = (
    "implementation", "tokens/s", "x generate", "CPU s/1000", "x generate (CPU)", "tokens",
    "peak MiB", "same answers",
)  # fmt: skip


def transformers_generate(model: Any, prompts: list[Prompt], sampling: Sampling) -> Answers:
    """`generate` as people call it: batches in the order given, its own random numbers."""
    tokenizer = model.tokenizer
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        settings = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
    tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(prompts), sampling.batch_size):
        batch = prompts[start : start + sampling.batch_size]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": p.content}] for p in batch],
            add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        inputs.pop("token_type_ids", None)  # transformers 4.57 makes them, generate refuses them
        output = model.model.generate(
            **inputs, **settings, max_new_tokens=sampling.max_new_tokens, top_p=sampling.top_p,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for prompt, row in zip(batch, output[:, inputs["input_ids"].shape[1] :], strict=True):
            ends = (row == tokenizer.eos_token_id).nonzero()
            length = int(ends[0]) + 1 if len(ends) else len(row)
            answers.append(Answer(prompt.id, tokenizer.decode(row[:length]), "stop", length))
    return answers


def transformers_paged(model: Any, prompts: list[Prompt], sampling: Sampling) -> Answers:
    """transformers' continuous batching with paged attention."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    tokenizer = model.tokenizer
    chats = [[{"role": "user", "content": p.content}] for p in prompts]
    ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=bool(sampling.temperature),
        temperature=sampling.temperature or 1.0, top_k=0, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.model.generation_config = config
    paging = ContinuousBatchingConfig(max_batch_tokens=256, num_blocks=256)
    done = model.model.generate_batch(
        ids, generation_config=config, continuous_batching_config=paging, progress_bar=False
    )
    rows = [done[key].generated_tokens for key in sorted(done, key=lambda k: int(k.split("_")[-1]))]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)  # as our own texts are
    return [
        Answer(p.id, text.strip(), "stop", len(row))
        for p, text, row in zip(prompts, texts, rows, strict=True)
    ]


def ours(refill: bool) -> Callable[[Any, list[Prompt], Sampling], Answers]:
    def run(model: Any, prompts: list[Prompt], sampling: Sampling) -> Answers:
        source = LocalModel(model.model, model.tokenizer, "benchmark", refill=refill)
        return [answer for batch in source.generate(prompts, sampling) for answer in batch]

    return run


IMPLS: dict[str, Callable[[Any, list[Prompt], Sampling], Answers]] = {
    BASELINE: transformers_generate,
    SAME: ours(refill=False),
    "plad_fast": ours(refill=True),
    "transformers paged": transformers_paged,
}
DEFAULT = (BASELINE, SAME, "plad_fast")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--instructions", type=Path, metavar="JSONL", help="self-instruct's format")
    parser.add_argument("--limit", type=int, metavar="N", help="N prompts, evenly spaced")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--temperature", nargs="+", type=float, default=[1.0])
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/generation_cpu.csv")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--plot", action="store_true", help="draw the CSV beside itself")
    args = parser.parse_args(argv)
    for name in ("limit", "max_new_tokens", "batch_size", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.instructions is not None and not args.instructions.is_file():
        parser.error(f"--instructions: there is no file {str(args.instructions)!r}")
    if args.plot and args.quick and args.csv is None:
        parser.error("--plot draws a CSV, and --quick writes none unless --csv names it")
    if args.csv is None and not args.quick:
        args.csv = RESULTS / "generation_cpu.csv"
    if args.quick:
        args.limit, args.rounds, args.dtype = args.limit or 24, 1, ["float32"]
    return args


def read_prompts(instructions: str | None, limit: int | None) -> list[Prompt]:
    if instructions is None:
        prompts = builtin_prompts()
    else:
        rows = map(json.loads, Path(instructions).read_text(encoding="utf-8").splitlines())
        prompts = [Prompt(row["id"], _instruction(row)) for row in rows]
    limit = min(limit or len(prompts), len(prompts))
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def _instruction(row: dict[str, Any]) -> str:
    given = row["instances"][0]["input"]
    return f"{row['instruction']}\n\n{given}" if given else row["instruction"]


def load(quick: bool, dtype: torch.dtype) -> Any:
    model, tokenizer = step_models.load(quick, "cpu")
    if quick:  # it would hardly ever end an answer by itself
        with torch.no_grad():
            model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 3
    return LocalModel(model.to(dtype).eval(), tokenizer, "benchmark")


def measure(spec: dict[str, Any]) -> Record:
    """One implementation, once over the prompts, after a few tokens to warm up."""
    prompts = read_prompts(spec["instructions"], spec["limit"])
    model = load(spec["quick"], DTYPES[spec["dtype"]])
    run = IMPLS[spec["impl"]]
    sampling = Sampling(
        spec["max_new_tokens"], temperature=spec["temperature"], batch_size=spec["batch_size"]
    )
    warm_up = Sampling(4, temperature=spec["temperature"], batch_size=spec["batch_size"])
    run(model, prompts[: 2 * spec["batch_size"]], warm_up)
    with peak_memory(torch.device("cpu")) as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        answers = run(model, prompts, sampling)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert {answer.prompt_id for answer in answers} == {prompt.id for prompt in prompts}
    texts = {a.prompt_id: hashlib.sha256(a.text.encode()).hexdigest()[:12] for a in answers}
    lengths = [answer.n_tokens for answer in answers]
    return {
        "status": "ok",
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "median_length": statistics.median(lengths),
        "longest": max(lengths),
        "peak_bytes": peak.extra_bytes,
        "texts": texts,
    }


def summarise(case: Record, tallies: dict[str, list[Record]]) -> list[Record]:
    rows = []
    for name, records in tallies.items():
        same = [
            statistics.fmean(record["texts"][i] == text for i, text in other["texts"].items())
            for record, other in zip(records, tallies.get(SAME, []), strict=False)
        ]
        rows.append(
            case
            | {
                "impl": name,
                "rounds": len(records),
                "tokens_per_s": statistics.median(r["tokens"] / r["seconds"] for r in records),
                "ratio": _ratio(records, tallies.get(BASELINE, []), "seconds"),
                "cpu_s_per_1000": statistics.median(
                    1000 * r["cpu_seconds"] / r["tokens"] for r in records
                ),
                "cpu_ratio": _ratio(records, tallies.get(BASELINE, []), "cpu_seconds"),
                "same_answers": statistics.median(same) if same and name != BASELINE else "",
                "peak_mib": statistics.median(r["peak_bytes"] for r in records) / MIB,
                **{k: records[0][k] for k in ("tokens", "shortest", "median_length", "longest")},
            }
        )
    return rows


def _ratio(records: Sequence[Record], baseline: Sequence[Record], seconds: str) -> float | str:
    """Median over rounds of how many times the baseline's tokens a second."""
    ratios = [
        (mine["tokens"] / mine[seconds]) / (other["tokens"] / other[seconds])
        for mine, other in zip(records, baseline, strict=False)
    ]
    return statistics.median(ratios) if ratios else ""


def table(rows: Sequence[Record]) -> str:
    def cell(value: Any, form: str) -> str:
        return "" if value == "" else format(value, form)

    return format_table(
        HEADER,
        [
            (
                row["impl"], cell(row["tokens_per_s"], ".1f"), cell(row["ratio"], ".2f"),
                cell(row["cpu_s_per_1000"], ".2f"), cell(row["cpu_ratio"], ".2f"),
                str(row["tokens"]), cell(row["peak_mib"], ".0f"), cell(row["same_answers"], ".0%"),
            )
            for row in rows
        ],
    )  # fmt: skip


def run_case(case: Record, args: argparse.Namespace) -> tuple[dict[str, list[Record]], int]:
    tallies: dict[str, list[Record]] = {name: [] for name in args.impl}
    status = 0
    for turn in range(args.rounds):
        # Every round starts with another one: the first after a pause may meet a cooler processor.
        start = turn % len(args.impl)
        for name in [*args.impl[start:], *args.impl[:start]]:
            if name not in tallies:
                continue
            record = run_worker(
                "benchmarks.generation", case | {"impl": name}, threads=args.threads
            )
            if record["status"] == "ok":
                tallies[name].append(record)
                rate = record["tokens"] / record["seconds"]
                say(f"  round {turn + 1}/{args.rounds}  {name:18}  {rate:.1f} tokens/s")
            else:
                say(f"  {name} failed: {record['reason']}")
                del tallies[name]
                status = 1
    return tallies, status


def draw(source: Path) -> Path:
    """Bars of tokens a second, one panel a case, beside the CSV."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    panels: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        panels.setdefault((row["dtype"], row["temperature"]), []).append(row)
    colours = {BASELINE: "#000000", SAME: "#0072B2", "plad_fast": "#D55E00"}
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.2), squeeze=False)
    for axis, ((dtype, temperature), shown) in zip(axes[0], panels.items(), strict=True):
        rates = [float(row["tokens_per_s"]) for row in shown]
        names = [row["impl"] for row in shown]
        bars = axis.bar(names, rates, color=[colours.get(name, "#999999") for name in names])
        axis.bar_label(bars, [f"{float(r['ratio']):.2f}x" if r["ratio"] else "" for r in shown])
        axis.set_title(f"{dtype}, temperature {temperature}", fontsize=9)
        axis.set_ylabel("answer tokens/s", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(y=0.12)
    facts = rows[0]
    figure.supxlabel(
        f"SmolLM2-135M-Instruct, {facts['prompts']} prompts, {facts['batch_size']} rows, answers "
        f"of {facts['shortest']} to {facts['longest']} tokens;\n{facts['device_model']}, "
        f"threads: {facts['threads']}",
        fontsize=7,
    )
    figure.tight_layout()
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=150)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.plot:
        print(f"wrote {draw(args.csv)}")
        return 0
    facts = environment(torch.device("cpu"), threads=args.threads)
    prompts = read_prompts(args.instructions and str(args.instructions), args.limit)
    rows: list[Record] = []
    status = 0
    for dtype in args.dtype:
        for temperature in args.temperature:
            case = {
                "dtype": dtype, "temperature": temperature, "quick": args.quick,
                "instructions": args.instructions and str(args.instructions), "limit": args.limit,
                "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size,
            }  # fmt: skip
            tallies, failed = run_case(case, args)
            status = max(status, failed)
            shown = case | {"prompts": len(prompts), "instructions": bool(args.instructions)}
            new = summarise(shown, {name: t for name, t in tallies.items() if t})
            rows += [row | facts for row in new]
            print(f"\n{dtype}, temperature {temperature}, {len(prompts)} prompts")
            print(table(new), flush=True)
            for row in new:
                same = row["same_answers"]
                if row["impl"] == "plad_fast" and dtype == "float32" and same != "":
                    status = max(status, int(same < 1 - MOST_DIFFERENT))
            if args.csv and rows:
                write_csv(args.csv, rows)
    if args.csv and rows:
        print(f"\nwrote {args.csv}")
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print_record(measure(json.loads(sys.argv[2])))
        sys.exit(0)
    sys.exit(main())
