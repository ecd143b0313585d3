# make demo and make test need Python 3.10 or newer and a package registry, and make .venv by themselves.
# Another Python: make test PYTHON=python3.12. Some tests only: make test ARGS="tests/algorithm -k round_trip".
PYTHON ?= python3
SOURCE ?= a striped blue cat standing on sand
TARGETS ?= --target "a striped blue cat running on sand" --target "a striped blue cat sitting on sand"
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# a line for each test, so that one sees where they are
PYTEST := $(RUN) -m pytest -v -n 2 --dist worksteal
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The environment is complete with what the package needs; with the tools of a developer, too. Each of the two
# files is written last, so that an environment that was left half made is made anew, from nothing; and so is
# one of another Python or from another place.
MADE := $(VENV)/.made
TOOLS := $(VENV)/.tools
FOR := -c 'import os, sys; print(*sys.version_info[:2], os.getcwd())'
ifneq ($(shell cat $(MADE) 2>/dev/null),$(shell $(PYTHON) $(FOR)))
.PHONY: $(MADE)
endif

.NOTPARALLEL:
.PHONY: help demo bench docs test test-all lint clean

help: ## Say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile

demo: $(MADE) ## Edit the action of a drawn animal and say where the pictures are
	$(VENV)/bin/kvinv run --image examples/animal.png --source "$(SOURCE)" $(TARGETS) --out demo

bench: $(MADE) ## Make the README's table in bench/; ARGS="--also direct+prompt_to_prompt" for another row
	$(VENV)/bin/kvinv bench --out bench --workers 2 $(ARGS)

docs: $(TOOLS) ## Make a site of the pages, with the docstrings of the public names; a broken link fails
	$(RUN) -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/docs
	@cp build/docs/README.html build/docs/index.html
	@echo build/docs/index.html

test: $(TOOLS) ## Run the tests, on two cores, but for whole benches
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(TOOLS) ## Run the tests, whole benches too
	$(PYTEST) $(ARGS)

lint: $(TOOLS) ## Check style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

clean: ## Remove what make, the demo and the tools have left, .venv too
	rm -rf $(VENV) demo bench build dist *.egg-info .pytest_cache .ruff_cache
	find kvinv_pl plugins tests tools -name __pycache__ -prune -exec rm -rf {} +

$(MADE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; old = sys.version_info < (3, 10); \
	sys.exit("expected Python 3.10 or newer, got " + sys.version.split()[0] + ": make PYTHON=..." if old else 0)'
	@echo "Making $(VENV), once; this takes some minutes"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@$(RUN) $(FOR) > $@

$(TOOLS): $(MADE)
	@rm -f $(MADE)
	$(PIP) -e '.[dev]'
	@$(RUN) $(FOR) > $(MADE)
	@touch $@
