# Two commands on a fresh machine with Python 3.11 and nothing installed: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test fast lint bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	@touch $@

run: $(VENV)/.done ## set up, then train digits with 2 shards and 2 workers
	$(BIN)/downpour run -w 2 -s 2 examples/digits_mlp.py

test: $(VENV)/.done lint ## set up, then lint, types and all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

fast: $(VENV)/.done ## only the tests without processes
	$(BIN)/python -m pytest -m 'not process'

lint: $(VENV)/.done ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.done ## push and pull of 100 MB beside limits and peers; the control plane
	$(BIN)/python benchmarks/pushpull.py
	$(BIN)/python benchmarks/control_plane.py

clean: ## remove what set-up and runs made
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
