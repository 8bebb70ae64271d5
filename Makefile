# Set-up and every rung of tests. Paths are relative, so a checkout path with spaces works.

# Importing SGLang without bytecode takes three times as long, in each process of each server.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Where the environment was built, if it still runs: a moved checkout or a removed Python rebuilds it.
BUILT_AT := $(shell "$(PY)" -c pass 2>/dev/null && cat $(STAMP) 2>/dev/null)
ifneq ($(BUILT_AT),$(CURDIR))
.PHONY: $(STAMP)
endif

# Tests that keep a core busy for minutes and start no server.
KERNELS := $(addprefix tests/test_,decode_simt.py mining.py jit.py store_simt.py dequantize_simt.py rotate.py)
OTHERS := $(addprefix --ignore=,$(KERNELS))
PYTEST = $(PY) -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-gpu bench-kernels bench-serving lint types format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F '|' '{ printf "  make %-13s %s\n", $$1, $$2 }'

setup: $(STAMP) ## build .venv with the pinned dependencies

demo: $(STAMP) ## best-of-8 on the demo model, bf16 against 4-bit and 2-bit KV, on the CPU
	@echo "==> demo: best-of-8 with the shipped model, bf16 cache against patternkv (a few minutes)"
	@HF_HUB_OFFLINE=1 $(PY) -m recipes.best_of_n --config recipes/demo/best_of_n.yaml

test: lint types ## lint, types and every test that needs no GPU
	@echo "==> tests (all but gpu): those with a server; beside them kernels on the CPU, then all others"
	@$(PYTEST) -m "not gpu and slow" $(OTHERS) & servers=$$!; \
	$(PYTEST) -m "not gpu" $(KERNELS) && $(PYTEST) -m "not gpu and not slow" $(OTHERS); others=$$?; \
	wait $$servers && exit $$others

test-fast: $(STAMP) ## the tests that start no server
	@echo "==> tests (no gpu, no server)"
	@$(PY) -m pytest -m "not gpu and not slow"

test-gpu: $(STAMP) ## the tests that need a CUDA device
	@echo "==> tests (gpu)"
	@$(PY) -m pytest -m gpu

bench-kernels: $(STAMP) ## time tree decode on a CUDA device against FlashInfer and the targets
	@$(PY) -m benchmarks.bench_kernels
	@$(PY) -m benchmarks.bench_kernels --check

bench-serving: $(STAMP) ## tokens per second on a CUDA device, ours against stock SGLang
	@$(PY) -m benchmarks.bench_serving
	@$(PY) -m benchmarks.bench_serving --plot benchmarks/results/serving.png
	@$(PY) -m benchmarks.bench_serving --check

lint: $(STAMP) ## ruff: rules and formatting
	@echo "==> ruff"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(STAMP) ## mypy, strict
	@echo "==> mypy"
	@$(PY) -m mypy

format: $(STAMP) ## rewrite the sources as ruff wants them
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove the environment, caches and build output
	rm -rf $(VENV) build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PYTHON=… names the interpreter; otherwise the first one that can install SGLang's wheels.
# PIP=uv or PIP=pip names the installer; otherwise uv if it is on PATH, else pip.
$(STAMP): pyproject.toml
	@VENV="$(VENV)" PYTHON="$(PYTHON)" PIP="$(PIP)" sh .ci/setup
	@printf '%s\n' "$(CURDIR)" > $(STAMP)
