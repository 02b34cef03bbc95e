# Everything runs from .venv, which the first target that needs it builds.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

VENV := .venv
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip --disable-pip-version-check --no-input -qq install
# One file per set of inputs. By content rather than by date: a fresh checkout of the same pyproject.toml keeps its
# environment. CURDIR, because a copied environment would import the package of the checkout it was made in.
KEY := $(shell { cat pyproject.toml; echo '$(PYTHON) $(TORCH) $(TRITON) $(CURDIR)'; } | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.ready-$(KEY)

# The oldest supported triton, by itself: compiling ahead of time works with it beside any torch.
TRITON_36 := .cache/triton-3.6.0
ABI := $(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
TRITON_36_STAMP := $(TRITON_36)/.ready-$(ABI)

# Older megatron-cores, a folder each; the dev extra brings the newest.
MEGATRON := .cache/megatron-core
MEGATRON_VERSIONS := 0.12.3 0.13.1 0.14.0 0.15.3
MEGATRON_STAMP := $(MEGATRON)/.ready-$(ABI)

.PHONY: help test nightly mutants bench analysis lint gpu
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "variables: PYTHON=$(PYTHON) TORCH=$(TORCH) TRITON=$(TRITON) JOBS=$(JOBS)"
	@echo "           PYTEST_FLAGS, MUTANTS_FLAGS, BENCH_FLAGS, GPU_FLAGS, RESULTS"

test: lint $(STAMP) $(TRITON_36_STAMP) $(MEGATRON_STAMP) ## lint, then run every test that needs no GPU (PYTEST_FLAGS="tests/test_plan.py -x")
	@# worksteal: neighbours stay on one worker and share its fixtures until a worker runs dry
	TPFFN_TRITON_36=$(CURDIR)/$(TRITON_36) TPFFN_MEGATRON=$(CURDIR)/$(MEGATRON) $(RUN) pytest -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

nightly: $(STAMP) $(TRITON_36_STAMP) ## compile every configuration row in every form, for two versions of triton
	TPFFN_TRITON_36=$(CURDIR)/$(TRITON_36) $(RUN) pytest -n $(JOBS) -m nightly $(PYTEST_FLAGS)

mutants: $(STAMP) ## make mistakes in a copy of the sources: the tests must notice each (MUTANTS_FLAGS="--only gate")
	$(VENV)/bin/python tests/mutants.py --jobs $(JOBS) $(MUTANTS_FLAGS)

bench: $(STAMP) ## compare with eager PyTorch on this machine (BENCH_FLAGS="--tp 4 --quick")
	$(VENV)/bin/python bench/ffn_bench.py $(BENCH_FLAGS)

analysis: $(STAMP) ## measure what docs/analysis.md shows, write its tables and plots again (RESULTS=bench/results/folder)
	$(VENV)/bin/python bench/write_analysis.py --measure --results $(or $(RESULTS),bench/results/$(shell date -u +%F)_cpu)

lint: $(STAMP) ## ruff check, ruff format --check, mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

gpu: ## kernel tests, memory checker and benchmark on a CUDA machine with its own packages (RESULTS=folder)
	$(PYTHON) scripts/gpu_checks.py $(if $(RESULTS),--results '$(RESULTS)') $(GPU_FLAGS)

# torch first and alone: it decides which build every later step sees, and the constraints keep that build.
$(STAMP):
	@echo "setting up $(VENV) (once): $(TORCH), $(TRITON), then the dev extra" >&2
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) $(TRITON)
	@$(RUN) pip list --format=freeze | grep -E '^(torch|triton)==' > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

$(TRITON_36_STAMP): | $(STAMP)
	@echo "setting up $(TRITON_36) (once)" >&2
	@rm -rf $(TRITON_36)
	@$(PIP) --no-deps --target $(TRITON_36) triton==3.6.0
	@touch $@

$(MEGATRON_STAMP): | $(STAMP)
	@echo "setting up $(MEGATRON) (once): $(MEGATRON_VERSIONS)" >&2
	@rm -rf $(MEGATRON)
	@mkdir -p $(MEGATRON)
	@for version in $(MEGATRON_VERSIONS); do \
	  $(PIP) --no-deps --only-binary :all: --target $(MEGATRON)/$$version megatron-core==$$version \
	  || echo "megatron-core $$version has no wheel for this Python: its tests skip" >&2; \
	done
	@touch $@
