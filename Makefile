# Every target sets up .venv first; pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) apply.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Tests run in several processes (tests/conftest.py says how many). Their tensors are small: a second thread would only
# wait for the first. Waiting threads must sleep, because where cores are shared a thread that spins keeps the one it waits
# for from running, and everything takes ten times as long.
TEST_WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test test-fast test-slow lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## answer questions on a long document: dense, FlexPrefill, MagicPIG
	@$(BIN)/python tools/demo.py

test: $(STAMP)  ## all tests but those of test-slow
	@$(PYTEST) -m "not soak" $(ARGS)

test-fast: $(STAMP)  ## the tests that take about three minutes on two cores
	@$(PYTEST) -m "not slow and not soak" $(ARGS)

test-slow: $(STAMP)  ## what takes minutes: sanitizers, thousands of requests
	@$(PYTEST) -m soak $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove .venv and caches
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard src/keysift/ops/cpu/src/*)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "keysift needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@echo "Setting up $(VENV) (downloads PyTorch the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No venv: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,plot,eval]'
	@touch $@
