# Two commands do everything on a fresh machine: `make demo` and `make test`. Set-up makes .venv and needs the network
# once; after that both run offline.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint clean

help:
	@echo "make demo    set up, then merge eight models on embedded real data (two minutes)"
	@echo "make test    set up, then run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove .venv and caches"

setup: $(STAMP)

# Everything is installed from setup.py; the stamp is newer than it exactly when that was done.
$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); set PYTHON=python3.x" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/pareto-merging demo --out runs/demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
