# The targets are told by `make help`. Variables:
#
# PYTHON          the interpreter .venv is made with, 3.11 or newer
# PYTEST_ARGS     more arguments for pytest
# PACKAGE_PYTHONS the Pythons that packages are made for: Debian 12 has 3.11, Ubuntu 24.04 3.12,
#                 Debian 13 and Fedora 3.13 and newer
# DEMO_ARGS       arguments of the demo: --once plays the tour and ends
# CHAOS_SECONDS, SOAK_SECONDS, FUZZ_SECONDS   how long these take
# CHAOS_ARGS      --seed N repeats a run of `make chaos`; --write writes its figures down
# BENCH_ARGS      --write writes the figures to docs/benchmarks.md; --help tells the others
# SOAK_ARGS       --write writes the figures and the plot to docs/reliability.md
# MIC_TEST_CACHE  where packages, images and the engine's data are kept,
#                 else $XDG_CACHE_HOME/mic-supervisor-tests or ~/.cache/mic-supervisor-tests

PYTHON ?= python3
PYTEST_ARGS ?=
PACKAGE_PYTHONS ?= 3.11 3.12 3.13
DEMO_ARGS ?=
CHAOS_SECONDS ?= 1800
BENCH_ARGS ?=
CHAOS_ARGS ?=
SOAK_SECONDS ?= 3600
SOAK_ARGS ?=
FUZZ_SECONDS ?= 600

VENV := .venv/bin
PYTEST := $(VENV)/python -m pytest $(PYTEST_ARGS)
# A third worker runs while another waits. Schemathesis, a second to import, has no test there.
UNIT := $(PYTEST) -n 3 -p no:schemathesis tests/unit

.DEFAULT_GOAL := help
.PHONY: help test check test-fleet bench chaos soak fuzz audit demo deb rpm clean engine-stop \
	venv-package venv-proof venv-test venv

help:  ## this list
	@sed -n 's/^\([a-z -]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

test: venv-test  ## everything: sets this machine up (root, Debian 12), then lint, types, unit, integration
	$(VENV)/python -m tests.setup.machine
	$(UNIT)
	$(PYTEST) -n 3 --dist loadscope --no-loadscope-reorder tests/integration

check: venv-test  ## lint, types and unit tests but the slow ones: under a minute, no root, no Docker
	$(UNIT) -m "not slow" --hypothesis-profile quick

test-fleet: venv-test  ## Ansible, Swarm and Slurm on hosts made of namespaces: root, half an hour
	$(VENV)/python -m tests.setup.fleet
	$(PYTEST) tests/fleet

bench: venv-test  ## measurements, ours and peers', on this machine as `make test` set it up: 15 minutes, idle
	$(VENV)/python -m tests.setup.peers
	$(VENV)/python -m benchmarks $(BENCH_ARGS)

chaos: venv-test  ## everything that goes wrong, mixed by a seed: half an hour, as root, after `make test`
	$(VENV)/python -m tests.chaos --seconds $(CHAOS_SECONDS) $(CHAOS_ARGS)

soak: venv-proof  ## a crash every few seconds for an hour: nothing grows; after `make test`
	$(VENV)/python -m tests.soak --seconds $(SOAK_SECONDS) $(SOAK_ARGS)

fuzz: venv-proof  ## bytes of any kind for all that is read, guided by what is reached: ten minutes
	$(VENV)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

audit: venv-proof  ## known vulnerabilities of what is installed in .venv (asks PyPI)
	$(VENV)/pip-audit --strict --local --skip-editable --progress-spinner off

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

venv-proof:
	@$(PYTHON) -m tests.setup.venv proof

venv-test:
	@$(PYTHON) -m tests.setup.venv test

venv:
	@$(PYTHON) -m tests.setup.venv
