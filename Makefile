# The commands anyone must know. `make run` and `make test` set up everything they need on a fresh machine.
.PHONY: run test test-fast fuzz lint format clean

PYTHON ?= python3
TORCH ?= 2.13.0
# e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU build of torch
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

run: .venv/run
	$(BIN)/omniconv compare -o report.html --force

# one process a core, one thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto

test: .venv/test
	$(PYTEST)

test-fast: .venv/test
	$(PYTEST) -m "not slow" -x

fuzz: .venv/test
	OMNICONV_FUZZ=2000 $(BIN)/python -m pytest tests/test_fuzz.py

lint: .venv/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/lint
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv build dist report.html

.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

.venv/run: .venv/torch pyproject.toml
	$(PIP) --editable ".[plot]"
	touch $@

.venv/test: .venv/torch pyproject.toml
	$(PIP) --editable ".[plot,test]"
	touch $@

.venv/lint: .venv/torch pyproject.toml
	$(PIP) --editable ".[plot,lint]"
	touch $@
