# Two commands on a fresh machine with Python 3.11 and nothing installed: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 30
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test test-long fast lint chaos bench bench-full clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	@touch $@

run: $(VENV)/.done ## set up, then train digits with 2 shards and 2 workers
	$(BIN)/downpour run -w 2 -s 2 examples/digits_mlp.py

test: $(VENV)/.done lint ## set up, then lint, types and all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-long: $(VENV)/.done ## the tests that CI has no time for: some ten minutes
	$(BIN)/python -m pytest -m long -n auto --maxprocesses 2 --dist loadfile

fast: $(VENV)/.done ## only the tests without processes
	$(BIN)/python -m pytest -m 'not process and not long'

lint: $(VENV)/.done ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(VENV)/.done ## the long part of the proof: simulator, mutations, kill loop; MINUTES=30
	$(BIN)/python tests/chaos/long_part.py --minutes $(MINUTES)

$(VENV)/.bench: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

bench: $(VENV)/.bench ## all benchmarks, quick: about 6 minutes
	$(BIN)/python benchmarks/suite.py --quick

bench-full: $(VENV)/.bench ## all benchmarks, into benchmarks/results/; then the README's tables and the plots
	$(BIN)/python benchmarks/suite.py

clean: ## remove what set-up and runs made
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
