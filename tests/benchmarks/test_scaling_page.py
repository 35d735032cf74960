"""The page of the scale plan says what the plan says, and its script and lines are taken."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import HfArgumentParser

from benchmarks import scaling, scaling_table
from benchmarks.common import ROOT
from benchmarks.scaling_rates import GPUS
from plad_fast.training.config import PLaDConfig

PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    records = [scaling.record(plan) for plan in scaling.plans()]
    return [{key: str(value) for key, value in row.items()} for row in records]


def test_the_csv_is_a_fresh_run(rows: list[dict[str, str]]) -> None:
    with scaling.CSV.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows, "run `python -m benchmarks.scaling`"
    assert scaling.CSV.with_suffix(".png").stat().st_size < 200_000


def test_the_page_has_the_tables_of_the_run(rows: list[dict[str, str]]) -> None:
    page = PAGE.read_text()
    for table in scaling_table.all_tables(rows, scaling.WORK):
        assert table in page, "run `python -m benchmarks.scaling --markdown`\n" + table


def test_numbers_in_the_page_are_those_of_the_csv(rows: list[dict[str, str]]) -> None:
    """Sentences say `138 GiB (Llama-3.1-8B, 1, DDP, float32)`; what is named is looked up."""
    found = re.findall(
        r"(\d+)\s+GiB\s+\((Llama-[^,]+),\s+(\d+),\s+([^)]+)\)", PAGE.read_text(), re.DOTALL
    )
    assert len(found) >= 5
    totals = {(r["model"], r["gpus"], r["strategy"]): r for r in reversed(rows)
              if r["gpu"] == GPUS[0].name and r["checkpointing"] == "1"}  # fmt: skip
    for number, model, gpus, strategy in found:
        row = totals[model, gpus, " ".join(strategy.split())]
        assert number == f"{float(row['total_gib']):.0f}", row


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture
def workplace(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Works in a folder with the page's files and some pairs; the arguments of every run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    Path("train.py").write_text(blocks("python")[0])
    Path("fsdp.json").write_text(blocks("json")[0])
    Path("fsdp.yaml").write_text(blocks("yaml")[0])
    pairs = [{"prompt": f"Say {i}.", "chosen": f" {i}", "rejected": " No."} for i in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shared = blocks("text")[0].replace("runs/plad", "run").split()
    return [*shared, "--model", str(tiny_teacher), "--max_steps", "1", "--use_cpu"]


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16", "--bf16", "--lora_rank", "2"]])
def test_the_script_of_the_page(
    options: list[str], workplace: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if options:
        pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", ["train.py", *workplace, *options])
    runpy.run_path("train.py")
    assert list(Path("run").glob("*model.safetensors"))


def test_the_settings_and_lines_of_the_page(workplace: list[str]) -> None:
    """Every flag is one of the script's or the launcher's, every setting one that is read."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    settings = load_config_from_file("fsdp.yaml")
    assert settings.fsdp_config["fsdp_version"] == 2
    if not transformers.__version__.startswith("4."):  # where --fsdp wants a value
        config = PLaDConfig("run", fsdp=True, fsdp_config="fsdp.json", use_cpu=True)
        assert config.fsdp_plugin_args["fsdp_version"] == 2
        assert config.fsdp_plugin_args["state_dict_type"] == "SHARDED_STATE_DICT"
    script = HfArgumentParser(PLaDConfig)
    for name in re.findall(r'add_argument\("(--\w+)"', blocks("python")[0]):
        script.add_argument(name)
    lines = re.findall(r"\| `(.+ train\.py .+)` \|", PAGE.read_text())
    assert len(lines) == 9
    for line in lines:
        launcher, _, arguments = line.replace(" N ", " 0 ").partition(" train.py ")
        if "--fsdp " not in arguments or not transformers.__version__.startswith("4."):
            script.parse_args([*arguments.split(), *workplace])
        program, *flags = launcher.split()
        if program == "torchrun":
            get_args_parser().parse_args([*flags, "train.py"])
        elif program == "accelerate":
            launch_command_parser().parse_args([*flags[1:], "train.py"])
        else:
            assert launcher == "python"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--bf16", "--fsdp", "--fsdp_config", "fsdp.json"]])
def test_the_script_of_the_page_on_two_processes(options: list[str], workplace: list[str]) -> None:
    """On CPUs accelerate takes DDP whatever it is asked for: this shows that the line is taken."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "train.py", *workplace, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(Path("run").glob("*model.safetensors"))


def test_the_picture_is_drawn_from_the_csv(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.scaling_plot import draw

    draw(scaling.CSV, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.csv").write_text("gpu\n")
    with pytest.raises(ValueError, match="no rows"):
        draw(tmp_path / "empty.csv", tmp_path / "empty.png")
