# The commands anyone must know. `make run` and `make test` set up everything they need on a fresh machine.
.PHONY: run test test-fast fuzz bench lint format clean

PYTHON ?= python3
TORCH ?= 2.13.0
PEERS_TORCH ?= torch==2.14.1 torchvision==0.29.1
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

# one pinned thread is the figure that counts; the result and the README's table are committed
BENCH := OMP_NUM_THREADS=1 $(shell command -v taskset >/dev/null && echo taskset -c $$(($$(nproc) - 1))) .venv-peers/bin/omniconv bench depthwise

bench: .venv-peers/run
	mkdir -p benchmarks/results
	$(BENCH) --cold --compile --force \
	  -o benchmarks/results/depthwise-$$(.venv-peers/bin/python -c "from omniconv.bench.runner import slug; print(slug())").json
	$(BENCH) --readme README.md

lint: .venv/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/lint
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv .venv-peers build dist report.html

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

# what is compared with: current torch, and the runtimes; from PyPI torch comes with CUDA, which the CPU never touches
.venv-peers/peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS_TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime openvino onnx
	touch $@

# built anew whenever a source of the native library is newer
.venv-peers/run: .venv-peers/peers pyproject.toml $(wildcard CMakeLists.txt csrc/* csrc/*/*)
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@
