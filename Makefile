# `make test` and `make demo` each set up all they need on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A file's tests share expensive fixtures (traces, started ranks), so a file stays on one worker.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: test demo setup lint types format clean

test: lint types
	$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: $(READY)
	$(BIN)/python examples/demo.py

setup: $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first, pinned by constraints.txt: resolved with the rest it may come as a build for
# GPUs, which is gigabytes. The link is how mypy finds the package (see pyproject.toml).
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "$(PYTHON) must be Python 3.11 or newer with the venv module (Debian: python3-venv); choose another with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[torch,jax,hf,dev,oracles]'
	mkdir -p $(VENV)/mypy
	ln -sfn ../.. $(VENV)/mypy/shardwright
	touch $@

# The environment stays: it takes minutes to make. Remove $(VENV) by hand to start over.
clean:
	rm -rf build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
