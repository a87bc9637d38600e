# Every target does all the set-up it needs on a bare machine: a virtual environment in .venv, then the job itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two threads in all: one per test worker, so that workers do not fight over the cores.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format bench clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[report]'
	touch $@

$(BIN)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@ $(BIN)/.demo

setup: $(BIN)/.dev  ## a virtual environment with everything development needs

demo: $(BIN)/.demo  ## full KV against the methods, on the bundled model: a table and a figure
	$(BIN)/reasonkv demo

test: $(BIN)/.dev  ## lint, types and the tests (a pairwise cover of the exactness matrix)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m 'not full'

test-all: $(BIN)/.dev  ## the tests with the whole exactness matrix
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

lint: $(BIN)/.dev  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(BIN)/.dev  ## reformat
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: $(BIN)/.dev  ## the benchmarks whose results are committed
	$(BIN)/python benchmarks/replay_speed.py && $(BIN)/python benchmarks/decode_overhead.py && $(BIN)/python benchmarks/event_cost.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
