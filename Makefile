# `make help` lists the targets. Everything runs inside .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
FLOOR  := .venv-floor

.PHONY: help setup demo test test-all test-floor test-gpu bench check format wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cnnlab needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Type: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## create .venv and install cnnlab into it

demo: $(STAMP) ## train a small ResNet on the embedded digits
	$(BIN)/cnnlab train experiment=digits

test: $(STAMP) ## the tests, without those marked slow or gpu
	$(BIN)/python -m pytest -n 2

test-all: $(STAMP) ## all tests that this machine can run, the slow ones too
	$(BIN)/python -m pytest -n 2 -m "not gpu"

$(FLOOR)/.installed: pyproject.toml scripts/floors.py
	$(PYTHON) -m venv --clear $(FLOOR)
	$(PYTHON) scripts/floors.py > $(FLOOR)/floors.txt
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(FLOOR)/floors.txt --editable '.[dev]'
	@touch $@

test-floor: $(FLOOR)/.installed ## the tests with the lowest versions that pyproject.toml allows, in .venv-floor
	$(FLOOR)/bin/python -m pytest -n 2

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(STAMP) ## how fast the default experiment trains, and where its time goes
	$(BIN)/cnnlab bench experiment=digits

check: $(STAMP) ## ruff and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP) ## build the wheel, configs included
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove the environments and build products; runs in outputs/ stay
	rm -rf $(VENV) $(FLOOR) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
