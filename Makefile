# make quickstart   installs into .venv, then generates a population and runs all stages on it (2 cores, 4 to 8 minutes)
# make test         installs into .venv, then lint, types and tests
# make test-hosts   hosts out of network namespaces: killed, cut off, ranks and drivers killed (root, 10 minutes)

PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := cluster/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

# The quickstart's size; `make quickstart USERS=60 SET="base.create.max_steps=60"` is a small one.
USERS ?= 300
NUM_GROUPS ?= 4
OUT ?= runs/quickstart
SET ?=
RAY_TESTS := tests/end_to_end tests/fleet
HOST_TESTS := tests/fleet/test_hosts.py tests/fleet/test_rank_hosts.py

.PHONY: quickstart test test-hosts install install-dev lint types

install: .venv/installed
install-dev: .venv/installed-dev

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("proper_ds needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

# torch goes first, alone: whatever asks for it later finds it there. DeepSpeed needs it to build, without its ops.
.venv/installed: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(PIP) setuptools wheel
	$(PIP) torch
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation -e '.[floors]'
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/proper-ds data generate --users $(USERS) --groups $(NUM_GROUPS) --seed 1 --out $(OUT)/data
	$(BIN)/proper-ds run cluster/runs/quickstart_cpu.yaml output_dir=$(OUT) \
	  'data.path=[$(OUT)/data/generated_tags, $(OUT)/data/generated_ratings]' $(SET)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

# Tests that start Ray run alone: a second cluster on a machine disturbs the first one's ranks.
test: lint types
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(addprefix --ignore=,$(RAY_TESTS))
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(RAY_TESTS) $(addprefix --ignore=,$(HOST_TESTS))

test-hosts: install-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(HOST_TESTS)
