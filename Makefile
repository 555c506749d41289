# The whole workflow.  `make run` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?=
SEEDS  ?= 0 1 2

MOE_DATA ?=

.PHONY: help setup run seeds moe moe-full test test-all check families clean
help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## Create .venv from requirements.lock (once)
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vflair_flower needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

run: setup ## The main job: CONFIG="data='path' seed=1" changes settings
	@$(BIN)/python -m simulations.launch $(if $(CONFIG),--run-config "$(CONFIG)")

seeds: setup ## The main job over several seeds: SEEDS="0 1 2" CONFIG="..."
	@$(BIN)/python -m simulations.seeds --seeds "$(SEEDS)" $(if $(CONFIG),--run-config "$(CONFIG)")

moe: setup ## PC-MoE beside its baselines, in minutes: MOE_DATA=folder takes real texts
	@$(BIN)/python -m simulations.launch --run-config "job='moe' moe-data='$(MOE_DATA)'" $(if $(CONFIG),--run-config "$(CONFIG)")

moe-full: setup ## All of it, in hours on a CPU: MOE_DATA=folder with the data sets of docs/experts.md
	@$(BIN)/python -m simulations.launch --run-config simulations/moe_full.toml --run-config "moe-data='$(MOE_DATA)' moe-pretraining-texts='$(MOE_DATA)/wikitext2'" $(if $(CONFIG),--run-config "$(CONFIG)")

test: setup ## The tests that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n auto --dist loadfile

test-all: setup ## All tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: setup ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

families: setup ## Certify every model family; the matrix goes into docs/families.md
	@$(BIN)/vflair verify --all --markdown > .families
	@sed -i '/^| family |/,$$d' docs/families.md && cat .families >> docs/families.md && rm .families

clean: ## Remove the virtual environment, caches and this project's own Flower home
	rm -rf $(VENV) .flwr .mypy_cache .ruff_cache .pytest_cache build *.egg-info
