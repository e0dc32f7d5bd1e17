# make train       install into .venv, then cold start, RL, evaluation and report of CONFIG
# make test        install, then lint, format check, types and all tests
# make bench       measure everything on this machine; tables and plots in bench/RESULTS.md
# make resources   compile every kernel, without a GPU, and write what it takes to bench/RESOURCES.md
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS ?=

BIN := $(CURDIR)/.venv/bin
# DeepSpeed looks for ninja on PATH. Recipes name their programs by path all the same.
export PATH := $(BIN):$(PATH)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt
SOURCES = atpo_fast kernels/atpo_kernels tests bench .ci/venv.py setup.py

.PHONY: train test lint format bench resources clean

train: .venv/installed
	$(BIN)/atpo-fast train --config $(CONFIG) $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: .venv/installed-dev
	mkdir -p .benchmarks
	$(BIN)/python -m pytest bench --benchmark-json=.benchmarks/latest.json $(ARGS)
	$(BIN)/python bench/run.py
	$(BIN)/python bench/report_results.py

resources: .venv/installed-dev
	$(BIN)/python bench/resources.py

clean:
	rm -rf build dist *.egg-info kernels/build kernels/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find atpo_fast kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: installed again when what is to be installed changes.
.venv/installed: pyproject.toml setup.py constraints.txt .ci/venv.py
	$(PYTHON) .ci/venv.py
	@echo "installing into .venv (minutes; some GB)"
	$(INSTALL) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the development tools"
	$(INSTALL) --editable '.[dev]'
	@touch $@
