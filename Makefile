# Everything happens in .venv beside this file; nothing else on the machine is installed or started.
# Another Python: make demo PYTHON=python3.12     More arguments for pytest: make test ARGS='-k resume -x'

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/complete

export PIP_ROOT_USER_ACTION := ignore
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What the surrounding shell says about other environments is not for ours.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT PIP_REQUIRE_VIRTUALENV

.PHONY: help setup demo test test-slurm lint types drills gpu constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## the environment in .venv (the other targets do it by themselves)

demo: $(STAMP) ## train AlexNet on two ranks, stop it, resume it exactly, show its accuracy
	$(BIN)/alexnet-ddp demo

test: $(STAMP) ## all quick tests
	$(BIN)/python -m pytest $(ARGS)

# It asks for what no other target does: Debian's Slurm packages, root, and daemons while it runs.
test-slurm: $(STAMP) ## real runs on a real Slurm, which is installed and started for it (root, Debian)
	ALEXNET_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm --session-timeout=900 $(ARGS)

lint: $(STAMP) ## ruff
	$(BIN)/python -m ruff check .

types: $(STAMP) ## mypy
	$(BIN)/python -m mypy

drills: $(STAMP) ## the full matrices (long); those on Slurm only with ALEXNET_TEST_SLURM=1
	$(BIN)/python -m pytest tests/drills -m drill $(ARGS)

gpu: $(STAMP) ## tests and benchmarks that need an NVIDIA GPU
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no usable NVIDIA GPU here: nothing was run")'
	$(BIN)/python -m pytest tests/gpu $(ARGS)
	$(BIN)/python -m benchmarks.gpu_input

# With the lowest Python that we promise, because some packages' newest versions need a later one.
constraints: PYTHON = python3.11
constraints: ## newest versions of everything into constraints.txt
	$(call python_is_new_enough)
	$(PYTHON) -m venv --clear $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip install --quiet --editable '.[dev]' 'setuptools>=77'
	{ grep '^#' constraints.txt; \
	  $(VENV)-constraints/bin/python -m pip freeze --all --exclude-editable --exclude pip; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf $(VENV)-constraints

clean: ## remove the environment, caches and build outputs; runs and data stay
	rm -rf $(VENV) $(VENV)-constraints build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an environment without it was interrupted and is made from nothing.
$(STAMP): pyproject.toml constraints.txt
	$(call python_is_new_enough)
	@if [ ! -e $@ ]; then \
	    echo "setting up $(VENV): downloads 3 to 6 GB the first time, some minutes without a word"; \
	    $(PYTHON) -m venv --clear $(VENV); \
	else \
	    echo "bringing $(VENV) up to date"; \
	fi
	@rm -f $@
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	    $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

define python_is_new_enough
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
    echo "Python 3.11 or newer is needed; '$(PYTHON)' is missing or older ($$($(PYTHON) --version 2>&1))."; \
    echo "Install one and name it:  make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12"; \
    exit 1; }
endef
