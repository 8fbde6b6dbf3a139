# Everything a newcomer, a developer and the build server type. Needs python3 (with venv) and make, nothing else:
# the first target that is called makes .venv and installs EdgeDAQ into it, versions pinned by constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# make demo: how long (0: until Ctrl-C), where the files land, and in which stores (all, or a list).
SECONDS ?= 20
OUT ?= out
STORES ?= csv,raw
# make bench: how often each measurement is repeated; the table shows the median.
REPEATS ?= 5
# make chaos-stores: how long everything is killed at random.
MINUTES ?= 10

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
# make bench-compare: what else a user might pick, measured in the same run.
.PHONY: help venv demo servers test check chaos-stores bench bench-compare systemd clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv and install EdgeDAQ into it, editable

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[agent,aggregator,test]'
	touch $(STAMP)

demo: $(STAMP) ## aggregator and agent on this machine, SECONDS=20 (0: until Ctrl-C), files under OUT=out, STORES=all
	$(BIN)/edgedaq-aggregator demo --seconds '$(SECONDS)' --out '$(OUT)' --stores '$(STORES)'

servers: ## install MariaDB, Redis and what boots machines with systemd, which the tests start, where they are missing
	@scripts/install_servers.sh

test: $(STAMP) servers ## everything that proves it works; the tests that kill processes run last and alone
	$(BIN)/python -m pytest -n 2 -m 'not kills'
	$(BIN)/python -m pytest -m kills

chaos-stores: $(STAMP) servers ## one job, all eight stores, MINUTES=10 of random kills, then all hold the same
	ALL_STORES_SECONDS=$$((60 * $(MINUTES))) $(BIN)/python -m pytest -s tests/system/test_all_stores.py

check: $(STAMP) ## format, lint, types, layers, dependencies, dead code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry common agent aggregator
	$(BIN)/vulture

bench: $(STAMP) ## throughput, latency, processor, memory, and how they grow; beside the bare disk in the same run
	$(BIN)/python -m benchmarks.ring_hop --repeats '$(REPEATS)'
	$(BIN)/python -m benchmarks.end_to_end --repeats '$(REPEATS)'
	$(BIN)/python -m benchmarks.footprint --repeats '$(REPEATS)'
	$(BIN)/python -m benchmarks.scaling --repeats '$(REPEATS)'
	$(BIN)/python -m benchmarks.start

bench-compare: $(STAMP) ## beside Redis streams, plain ZMQ and arroyopy (in an environment of its own)
	$(PYTHON) -m venv $(VENV)-compare
	$(VENV)-compare/bin/python -m pip install --quiet 'arroyopy[zmq]'
	$(BIN)/python -m benchmarks.compare --repeats '$(REPEATS)' --arroyo-python $(VENV)-compare/bin/python

systemd: $(STAMP) ## write systemd/ as install-service would install it
	$(BIN)/python -m tests.service.render

clean: ## remove what make and the tools made; never data
	rm -rf $(VENV) $(VENV)-compare .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
