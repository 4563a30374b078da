# The targets are told by `make help`. Variables:
#
# PYTHON          the interpreter .venv is made with, 3.11 or newer
# PYTEST_ARGS     more arguments for pytest
# PACKAGE_PYTHONS the Pythons that packages are made for: Debian 12 has 3.11, Ubuntu 24.04 3.12,
#                 Debian 13 and Fedora 3.13 and newer
# DEMO_ARGS       arguments of the demo: --once plays the tour and ends
# MIC_TEST_CACHE  where packages, images and the engine's data are kept,
#                 else $XDG_CACHE_HOME/mic-supervisor-tests or ~/.cache/mic-supervisor-tests

PYTHON ?= python3
PYTEST_ARGS ?=
PACKAGE_PYTHONS ?= 3.11 3.12 3.13
DEMO_ARGS ?=

VENV := .venv/bin
PYTEST := $(VENV)/python -m pytest $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help test check bench demo deb rpm clean engine-stop venv-package venv-test venv

help:  ## this list
	@sed -n 's/^\([a-z -]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

test: venv-test  ## everything: sets this machine up (root, Debian 12), then lint, types, unit, integration
	$(VENV)/python -m tests.setup.machine
	$(PYTEST) -n 2 tests/unit
	$(PYTEST) -n 3 --dist loadscope --no-loadscope-reorder tests/integration

check: venv-test  ## lint, types and unit tests but the slow ones: under a minute, no root, no Docker
	$(PYTEST) -n 2 -m "not slow" tests/unit

bench: venv-test  ## measurements on this machine as `make test` set it up; some minutes, idle
	@missed=; for file in benchmarks/[a-z]*.py; do \
		$(VENV)/python -m benchmarks.$$(basename $$file .py) || missed="$$missed $$file"; \
	done; test -z "$$missed" || { echo "missed a target:$$missed"; exit 1; }

demo: venv  ## the supervisor on simulated GPUs; options in DEMO_ARGS
	$(VENV)/mic-supervisor demo $(DEMO_ARGS)

deb rpm: venv-package  ## a package for each Python in PACKAGE_PYTHONS, in dist/
	$(VENV)/python packaging/build.py $@ $(PACKAGE_PYTHONS)

clean:  ## removes what was made in this checkout; what is slow to make stays in the cache
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

engine-stop: venv-test  ## ends the Docker Engine that `make test` started, if it did
	$(VENV)/python -m tests.setup.machine stop

venv-package:
	@$(PYTHON) -m tests.setup.venv package

venv-test:
	@$(PYTHON) -m tests.setup.venv test

venv:
	@$(PYTHON) -m tests.setup.venv
