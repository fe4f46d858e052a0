# make demo | test | test-slow | test-slurm | test-newest | check | clean. Each target prepares .venv by itself; nothing but Python 3.11+ and make is needed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-slurm test-newest check resolve clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the test files; with 0 they run one after another.
WORKERS ?= 2

# Ranks are processes: one thread each, or they fight for the cores.
export OMP_NUM_THREADS ?= 1
# The type checker comes with its wheel; never let it look for a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export TOKENIZERS_PARALLELISM ?= false

help:
	@echo "make demo   train a tiny Llama 3 with PPO on this machine, then open runs/demo/report.html"
	@echo "make test   run the tests (CPU)"
	@echo "make test-slow  run the long tests: kills, fuzzing, the example chain"
	@echo "make test-slurm  run the launch scripts on a Slurm that this starts, and installs where it may"
	@echo "make test-newest  run the tests with the newest Megatron-Core that setup.py allows"
	@echo "make check  format, lint, types, import layers, spelling"
	@echo "make resolve  ask PyPI whether every set of packages still resolves; installs nothing"
	@echo "make clean  remove .venv, caches and runs/"

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python $$($(PYTHON) -V 2>&1) is too old: 3.11 or later is needed; run make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/megarlhf demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# Debian's packages, where this machine lets us install them; without them the tests are skipped, and say so.
test-slurm: $(STAMP)
	@PATH="$$PATH:/usr/sbin" command -v slurmctld slurmd munged > /dev/null || { apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends slurm-wlm munge; } > /dev/null 2>&1 || true
	$(BIN)/python -m pytest -q -rs -m slurm

# Megatron-Core from 0.17 on declares Python 3.12, and runs on 3.11. In front of the one in .venv, which stays.
NEWEST := 0.19.2
IN_FRONT := $(CURDIR)/$(VENV)/megatron-core-$(NEWEST)
$(IN_FRONT): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
	  --target $@ megatron-core==$(NEWEST)

test-newest: $(IN_FRONT)
	PYTHONPATH=$(IN_FRONT) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/typos
	$(BIN)/pyright

# Everything that setup.py offers, together, on the Pythons it supports. --no-config and the unset variables: no index and
# no wheel of this machine counts.
SETS := dev,gpu,maths,tasks,wandb,bench

resolve: $(STAMP)
	@for python in 3.11 3.12; do \
	  env -u UV_INDEX -u UV_INDEX_URL -u UV_DEFAULT_INDEX -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS \
	    $(BIN)/uv pip install --dry-run --quiet --no-config --python-version $$python \
	    --python-platform x86_64-manylinux_2_28 --target build/resolved -c constraints.txt ".[$(SETS)]" \
	  && echo "resolves from PyPI alone: .[$(SETS)] on Python $$python" || exit 1; \
	done

clean:
	rm -rf $(VENV) runs build .pytest_cache .ruff_cache .import_linter_cache ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
