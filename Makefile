# Everything that a contributor runs. `make` alone lists it.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
# Progress bars for people, silence for logs.
INSTALL := $(UV) pip install --python $(BIN)/python $(shell [ -t 2 ] || echo --quiet)

.DEFAULT_GOAL := help
.PHONY: help setup setup-demo demo browser test notebooks lint docs format clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  make test ARGS="tests/test_conventions.py -k torch"   runs some tests'
	@echo '  make setup PYTHON=python3.13                          uses another Python'

setup: $(VENV)/.setup ## Create .venv with all that tests and linters need (several GB, as it holds PyTorch)

setup-demo: $(VENV)/.setup-demo ## Create .venv with what the demo needs (no PyTorch)

demo: setup-demo ## Run the demo on the CPU or on the GPU, whichever JAX finds
	@$(BIN)/moelora demo $(ARGS)

browser: ## Install Chromium on Debian, as root: without it the test of the status page is skipped
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	    { apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium chromium-driver; } >/dev/null

test: setup ## Run the tests; those marked gpu are skipped where there is none
	@# Else files of few tests come last, and the slowest ones are such.
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

notebooks: setup ## Run the notebooks and write their outputs anew; ARGS names some of them
	@$(BIN)/python -m tests.notebooks $(ARGS)

lint: setup ## Check style, format and types, as CI does
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: setup ## Build the site into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup ## Format the code and repair what can be repaired
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove .venv, caches and builds
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.setup: pyproject.toml | $(UV)
	@echo 'Installing moelora-jax, its tests and its linters into $(VENV); the first time this takes minutes.'
	@$(INSTALL) --editable '.[test,lint,docs]'
	@$(INSTALL) --no-deps --target $(VENV)/h200 $$($(BIN)/python -c \
	    'import jax; print(*(f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt")))')
	@touch $@ $(VENV)/.setup-demo

$(VENV)/.setup-demo: pyproject.toml | $(UV)
	@echo 'Installing moelora-jax into $(VENV).'
	@$(INSTALL) --editable .
	@touch $@

$(UV):
	@command -v '$(PYTHON)' >/dev/null || { \
	    echo "There is no '$(PYTHON)' here: install Python 3.12, 3.13 or 3.14, or name one with 'make PYTHON=/path/to/python3.12 ...'."; \
	    exit 1; } >&2
	@'$(PYTHON)' -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 15))' 2>/dev/null || { \
	    echo "moelora-jax needs Python 3.12, 3.13 or 3.14, but '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1 | head -n 1): name another with 'make PYTHON=/path/to/python3.12 ...'."; \
	    exit 1; } >&2
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot create virtual environments with pip: install its venv module (on Debian and Ubuntu the package python3-venv)."; \
	    exit 1; } >&2
	@echo 'Creating $(VENV) with '"$$('$(PYTHON)' --version)"'.'
	@'$(PYTHON)' -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8'
