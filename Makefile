# Three commands: `make demo`, `make test`, `make check`. All work in .venv, which the first of them makes.
#
#   make demo KEEP=1                  goes on serving afterwards
#   make test PYTEST_ARGS="-k handoff"
#   make install TORCH=torch TORCH_INDEX=…
#
# On a machine without an NVIDIA GPU torch must be its CPU build. Where pip does not find one by itself, give the index of CPU builds in
# TORCH_INDEX (see PyTorch's installation page); rather than download gigabytes of CUDA packages for nothing, `make` stops and says so.

PYTHON      ?= python3
VENV        ?= .venv
TORCH_INDEX ?=
KEEP        ?=
PYTEST_ARGS ?=
# The tests of Ray are one process's, all others the other's: while one waits the other computes. 0: one process for all.
TEST_PROCESSES ?= 2

HAS_GPU     := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
ifeq ($(HAS_GPU),1)
TORCH       ?= torch>=2.11
TRITON      ?= triton
else
TORCH       ?= torch==2.13.0
TRITON      ?= triton==3.7.1
endif

BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check
INDEX       := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo install test check clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/diptych demo $(if $(KEEP),--keep)

install: $(VENV)/.installed

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --no-loadscope-reorder $(PYTEST_ARGS)

check: $(VENV)/.installed-check
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=typings $(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Give another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@$(if $(HAS_GPU),true,$(BIN)/python deploy/no_cuda.py $(INDEX) '$(TORCH)' '$(TRITON)')
	$(PIP) install --quiet $(INDEX) '$(TORCH)' '$(TRITON)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet $(INDEX) -e . '$(TORCH)' '$(TRITON)'
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) install --quiet $(INDEX) -e '.[$*]' '$(TORCH)' '$(TRITON)'
	@touch $@
