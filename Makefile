.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Options of the run, for instance: make run ARGS="model=mobilenet_v2 alpha=5.33"
ARGS ?= model=resnet18 init=hierarchical

.PHONY: help run test test-slow tables figures docs format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), which takes a minute or two ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(VENV)/.run  ## install what is needed and compress a network (ARGS="model=... alpha=...")
	$(BIN)/python run.py $(ARGS)

test: $(VENV)/.dev  ## install what is needed, check the style and run the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --dist loadfile --durations=10

test-slow: $(VENV)/.dev  ## run the slow tests and those that need a package index too
	$(BIN)/python -m pytest -m 'not gpu'

tables: $(VENV)/.run  ## write every table that has records, and results/report.html
	$(BIN)/python scripts/make_tables.py

docs: $(VENV)/.dev  ## build the documentation into site/ (open site/index.html)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## clustering against other libraries
	$(BIN)/python -m benchmarks.clustering

figures: $(VENV)/.dev  ## draw the figures from records and published tables into results/figures
	$(BIN)/python scripts/make_figures.py

clean:  ## remove the environment and caches, not the results
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
