# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The environment is up to date when this file is newer than pyproject.toml.
READY = $(VENV)/.installed
# One thread for each of the two test processes: more of them only get in each other's way.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=Agg
# Each process takes half of the files, so that what the tests of a file share is made once.
PYTEST = $(ONE_THREAD) $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: help install test test-project pitfalls test-all wheel release demo lint format bench docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(READY) ## make the environment in .venv

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

test: $(READY) ## run the quick tests of the package and its doctests
	$(PYTEST) --durations 5

test-project: $(READY) ## run the quick tests of pages, notebooks, the release and the requests to Pyro
	$(PYTEST) --durations 5 -m "project and not slow" tests/project

pitfalls: $(READY) ## run the known failures of other flow libraries on this package
	$(ONE_THREAD) $(BIN)/python -m pytest --numprocesses 2 benchmarks/pitfalls

test-all: $(READY) ## before a release: all tests, the slow ones too, with their coverage
	$(PYTEST) --durations 20 -m "" --cov --cov-report term

wheel: $(READY) ## build the wheel into dist/, and try it in an environment without the checkout
	rm -rf dist
	$(BIN)/python -m build --quiet --no-isolation
	$(ONE_THREAD) bash .ci/wheel $(BIN)/python

release: wheel ## what a release needs: wheel and source distribution, checked, and all tests; uploads nothing
	$(BIN)/python -m twine check --strict dist/*
	$(MAKE) test-all
	$(BIN)/python tools/missing.py

demo: $(READY) ## fit the eight schools and draw tutorials/eight_schools.png
	$(BIN)/python tutorials/eight_schools.py

lint: $(READY) ## check style, format and annotations, and the budgets of lines and words
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/budgets.py

format: $(READY) ## put every file into the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY) ## what an inverse costs, beside the peers
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/inverse.py

docs: $(READY) ## build the site into docs/_build/html, and check its links
	$(BIN)/python docs/check_table.py
	$(BIN)/python -m sphinx -W --keep-going --quiet -d docs/_build/doctrees docs docs/_build/html
	$(BIN)/python docs/check_site.py docs/_build/html

clean: ## remove the environment and everything that was built
	rm -rf .venv docs/_build docs/benchmarks docs/tutorials build dist *.egg-info .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
