# Two commands do everything on a fresh machine: `make demo` and `make test`. Set-up makes .venv and needs the network
# once; after that both run offline.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# a small second environment for the oldest Triton we support: it compiles and never runs
OLD_TRITON := 3.6.0
OLD_VENV := .venv-triton-$(OLD_TRITON)
OLD_STAMP := $(OLD_VENV)/.installed

# `make gpu PYTHON=python3` uses an environment that is there already; without it, ours
ifneq ($(filter command line environment,$(origin PYTHON)),)
GPU_PYTHON := $(PYTHON)
GPU_SETUP :=
else
GPU_PYTHON := $(BIN)/python
GPU_SETUP := $(STAMP)
endif

# what `make gpu-smoke` writes; seconds that one test may take
JUNIT ?= runs/gpu/smoke.xml
SECONDS_EACH ?= 60
# with one workspace of a fixed size, cuBLAS gives the same bits each time
GPU_PYTEST := CUBLAS_WORKSPACE_CONFIG=:4096:8 $(GPU_PYTHON) -m pytest tests/gpu

.PHONY: help setup demo test lint budget fuzz gpu gpu-smoke gpu-repeat gpu-sanitize gpu-goals gpu-kernels tune pages clean

help:
	@echo "make demo    set up, then merge eight models on embedded real data (two minutes)"
	@echo "make test    set up, then run the tests"
	@echo "make lint    ruff, mypy, and which room may import which"
	@echo "make budget  compile every kernel for sm_86 and sm_90, under two Tritons, and check what it costs (ten minutes)"
	@echo "make fuzz    read damaged checkpoints, 2,000 of each format (FUZZ_ARGS='--mutations 50000')"
	@echo "make gpu-goals MINUTES=8   on a CUDA GPU: what we aim at, in order of value, until time is up; elsewhere a rehearsal"
	@echo "make gpu     on a CUDA GPU: the GPU tests, then the benchmarks (PYTHON=python3: in that environment as it is)"
	@echo "make gpu-smoke     on a CUDA GPU: its most telling tests on all cores (two minutes), JUNIT=$(JUNIT)"
	@echo "make gpu-repeat    on a CUDA GPU: every shipped configuration 200 times, the same bits each time (two minutes)"
	@echo "make gpu-sanitize  on a CUDA GPU: compute-sanitizer over the four main kernels"
	@echo "make gpu-kernels   without a GPU: what goals and gpu-smoke launch, compiled for the machine GPU_MACHINE_PYTHON says"
	@echo "make tune    on a CUDA GPU: measure launches and strategies for it, write pmkernels/configs (ten minutes)"
	@echo "make pages   write committed results into the README, docs/ and benchmarks/limits.md"
	@echo "make clean   remove the environments and caches"

setup: $(STAMP)

# Everything is installed from setup.py; the stamp is newer than it exactly when that was done.
$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); set PYTHON=python3.x" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	@touch $@

# torch's CUDA builds ask for a Triton of their own, hence --no-deps
$(OLD_STAMP): Makefile
	test -x $(OLD_VENV)/bin/python || $(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install --quiet 'torch==2.13.0' numpy rich
	$(OLD_VENV)/bin/python -m pip install --quiet --no-deps 'triton==$(OLD_TRITON)'
	@touch $@

demo: $(STAMP)
	$(BIN)/pareto-merging demo --out runs/demo --overwrite

# two processes of one thread each; a test fails the same way in one (PYTEST_ARGS="-n 0")
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

budget: $(STAMP) $(OLD_STAMP)
	$(BIN)/python -m benchmarks.budget
	$(OLD_VENV)/bin/python -m benchmarks.budget

fuzz: $(STAMP)
	PYTHONPATH=.:tests $(BIN)/python -m fuzz $(FUZZ_ARGS)

gpu: $(GPU_SETUP)
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "expected a CUDA GPU that torch sees, got none" >&2; exit 2; }
	parallel=$$($(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo "-n 6"); \
		$(GPU_PYTEST) -m "gpu and not repeat and not sanitize" $$parallel $(PYTEST_ARGS); status=$$?; \
		$(GPU_PYTHON) -m benchmarks.run --suite all $(BENCHMARK_ARGS) || status=$$?; exit $$status

# kernels that `make gpu-kernels` compiled go into Triton's cache, if they are here and of this Triton
KERNELS ?= runs/gpu/kernels.tar.xz
UNPACK = $(if $(REHEARSE),,$(if $(wildcard $(KERNELS)),-$(GPU_PYTHON) -m benchmarks.gpu_kernels --unpack $(KERNELS)))

# MINUTES in all; GOALS_FILE=file, RESUME=file, GOALS_ARGS="--only reductions". Where there is no CUDA GPU it is a rehearsal.
MINUTES ?= 8
REHEARSE := $(if $(wildcard /dev/nvidia[0-9]* /dev/dxg),,--quick)
gpu-goals: $(GPU_SETUP)
	$(UNPACK)
	@$(if $(REHEARSE),echo "no CUDA GPU here: a rehearsal with tiny shapes that measures nothing",:)
	$(GPU_PYTHON) -m benchmarks.goals --minutes $(MINUTES) $(REHEARSE) $(if $(RESUME),--resume $(RESUME)) \
		$(if $(GOALS_FILE),--out $(GOALS_FILE)) $(GOALS_ARGS)

gpu-smoke: $(GPU_SETUP)
	$(UNPACK)
	options=$$($(GPU_PYTHON) tests/gpu/options.py $(SECONDS_EACH)) || exit 2; \
		$(GPU_PYTEST) -m "gpu and smoke" $$options --junit-xml=$(JUNIT) $(PYTEST_ARGS)

gpu-repeat: $(GPU_SETUP)
	options=$$($(GPU_PYTHON) tests/gpu/options.py $(SECONDS_EACH)) || exit 2; \
		$(GPU_PYTEST) -m "gpu and repeat" $$options $(PYTEST_ARGS)

# one process: a second one would only share the GPU that the sanitizer slows down
gpu-sanitize: $(GPU_SETUP)
	$(GPU_PYTHON) tests/gpu/options.py > /dev/null || exit 2
	$(GPU_PYTEST) -m "gpu and sanitize" $(PYTEST_ARGS)

# The Python and torch of the GPU machine (`make gpu-kernels GPU_MACHINE_PYTHON=/path/to/python3.12`): torch brings its
# Triton, 3.6.0; the newest Triton is put beside it.
GPU_MACHINE_PYTHON ?= python3.12
GPU_MACHINE_TORCH ?= 2.11.0
KERNELS_VENV := .venv-gpu-kernels
KERNELS_STAMP := $(KERNELS_VENV)/.installed-$(GPU_MACHINE_TORCH)
KERNELS_WORK := runs/gpu-kernels
NEWEST := $(CURDIR)/$(KERNELS_VENV)/newest-triton
KERNELS_COMPILE := $(KERNELS_VENV)/bin/python -m benchmarks.gpu_kernels_compile

$(KERNELS_STAMP):
	@command -v "$(GPU_MACHINE_PYTHON)" > /dev/null || { echo "GPU_MACHINE_PYTHON: expected the Python of the GPU" \
		"machine's version, got $(GPU_MACHINE_PYTHON), which is not found" >&2; exit 2; }
	test -x $(KERNELS_VENV)/bin/python || $(GPU_MACHINE_PYTHON) -m venv $(KERNELS_VENV)
	$(KERNELS_VENV)/bin/python -m pip install --quiet 'torch==$(GPU_MACHINE_TORCH)' numpy
	$(KERNELS_VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(NEWEST) triton
	@touch $@

# recorded in our environment, compiled and looked up in the GPU machine's, by its own Triton and by the newest
gpu-kernels: $(STAMP) $(KERNELS_STAMP)
	$(BIN)/python -m benchmarks.gpu_kernels_record --folder $(KERNELS_WORK)
	$(KERNELS_COMPILE) --launches $(KERNELS_WORK)/launches-*.json --folder $(KERNELS_WORK)/own
	PYTHONPATH=$(NEWEST) $(KERNELS_COMPILE) --launches $(KERNELS_WORK)/launches-*.json --folder $(KERNELS_WORK)/newest
	$(BIN)/python -m benchmarks.gpu_kernels --out $(KERNELS) \
		--pack $(KERNELS_WORK)/own/index.json $(KERNELS_WORK)/newest/index.json
	$(KERNELS_COMPILE) --launches $(KERNELS_WORK)/launches-*.json --verify $(KERNELS)
	PYTHONPATH=$(NEWEST) $(KERNELS_COMPILE) --launches $(KERNELS_WORK)/launches-*.json --verify $(KERNELS)

tune: $(GPU_SETUP)
	$(GPU_PYTHON) -m benchmarks.tune $(TUNE_ARGS)

pages: $(STAMP)
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.limits

clean:
	rm -rf $(VENV) $(OLD_VENV) $(KERNELS_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
