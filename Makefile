# From a machine with Python 3.11 or newer and make: `make demo`, `make test`.
PYTHON ?= python3
ARGS   ?=

BIN     := .venv/bin
PIP     := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# A local CPU build ("2.13.0+cpu") that is on offer satisfies ==, and is wanted unless there is a GPU;
# === takes only the build without a local label, which is the one for GPUs.
TORCH   := $(shell sed -n 's/^torch==//p' constraints.txt)
GPU     := $(shell nvidia-smi -L 2>/dev/null | head -n 1)

.PHONY: demo test lint clean

demo: .venv/.core
	$(BIN)/pantarhei run rbqe --scale quick || test $$? -eq 1  # 1: a claim does not hold, a finding
	@echo "Read on: $(BIN)/pantarhei serve shows every paper and what was measured, in the browser."

test: .venv/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.core: .venv/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[feed]'
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/.core

.venv/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pantarhei needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in make PYTHON=python3.12 $(MAKECMDGOALS)." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "'$(PYTHON)' cannot make a virtual environment: install its venv package (python3-venv on Debian)." >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade pip || echo "pip stays as it is." >&2
ifneq ($(GPU),)
	$(PIP) 'torch===$(TORCH)' || $(PIP) 'torch==$(TORCH)'
else
	$(PIP) 'torch==$(TORCH)'
endif
	@touch $@
