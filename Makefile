# Everything runs in a virtual environment of the checkout, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PYTEST_ARGS ?=
# Most tests wait for something most of the time, so that two cores have enough to do with eight
# processes. Those that measure times run alone, at the end; the longest begin.
PARALLEL := -n 8 --dist loadgroup --no-loadscope-reorder
# Some images have Python keep no bytecode: each server that a test starts would compile the package
# anew, and each of the processes above all tests.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help test test-long test-stock test-oldest test-newest lint types bench demo soak soak-sizes soak-deliveries soak-packets format clean

help:  ## Show what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; name one with PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "Python's venv module is missing (on Debian: apt install python3-venv)"; exit 1; }

# One stamp for each set of dependencies: installed again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing the project with its '$*' dependencies into $(VENV) ..."
	@$(PIP) install --upgrade pip
	@$(PIP) install --editable '.[$*]'
	@touch $@

# What pytest makes of the tests is kept: one process makes it, before each of eight would.
$(VENV)/.compiled: $(VENV)/.installed-test
	@$(BIN)/python -m pytest --collect-only -qq >/dev/null || true
	@touch $@

test: $(VENV)/.compiled  ## Run all tests, in gevent and in threading mode
	@$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-long: $(VENV)/.compiled  ## Run what `make test` leaves out because it takes long
	@$(BIN)/python -m pytest $(PARALLEL) --long $(PYTEST_ARGS)

test-stock: $(VENV)/.compiled  ## Run the fault tests without the guard: each is expected to fail
	@$(BIN)/python -m pytest tests/faults --stock $(PARALLEL) $(PYTEST_ARGS)

test-oldest:  ## Run all tests on the oldest versions that pyproject.toml allows
	@$(MAKE) --no-print-directory VENV=.venv-oldest .venv-oldest/.oldest
	@.venv-oldest/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

.venv-oldest/.oldest: pyproject.toml tests/tools/oldest.py | $(BIN)/python
	@echo "Installing the oldest allowed dependencies into $(VENV) ..."
	@$(PIP) install --upgrade pip
	@$(PIP) install --editable '.[test]' $$($(BIN)/python tests/tools/oldest.py pyproject.toml)
	@touch $@

test-newest: $(VENV)/.installed-test  ## Run a part of the tests on the newest Python here that gevent supports
	@newest=$$($(BIN)/python tests/tools/newest.py); \
	if [ -z "$$newest" ]; then echo "No Python here is newer and has a wheel of gevent."; exit; fi; \
	echo "The newest here that gevent has a wheel for is $$($$newest --version)."; \
	$(MAKE) --no-print-directory VENV=.venv-newest PYTHON=$$newest .venv-newest/.installed-test \
	&& .venv-newest/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS) \
		tests/test_*.py tests/faults/test_same_as_stock.py

lint: $(VENV)/.installed-lint  ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-lint  ## Check types
	@$(BIN)/mypy

format: $(VENV)/.installed-lint  ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-bench  ## Measure guarded beside stock; BENCH_ARGS=--quick for a short run
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

demo: $(VENV)/.installed-demo  ## Run the example application; CHECK=1 injects every fault and reports
	@if command -v npm >/dev/null; then npm ci --prefix example_app --silent --no-audit --no-fund \
		|| echo "npm could not fetch the Socket.IO client; the page will say so"; \
	else echo "npm is not installed: the page will say that its Socket.IO client is missing"; fi
	@$(BIN)/python -m demo $(if $(CHECK),--check)

soak: soak-sizes  ## Run the tests in full size, then 500 clients in all patterns for half an hour; SOAK_ARGS="--minutes 3"
	@$(BIN)/python -m tests.soak --minutes 30 --clients 500 $(SOAK_ARGS)

soak-sizes: $(VENV)/.compiled  ## Run all tests with as many examples, clients and packets as there are
	@FULL_SIZE=1 $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

soak-deliveries: $(VENV)/.installed-test  ## Deliver 10,000 messages to 200 clients while everything fails
	@CHAOS_MESSAGES=10000 CHAOS_CLIENTS=200 $(BIN)/python -m pytest tests/faults/test_delivery_chaos.py $(PYTEST_ARGS)

soak-packets: $(VENV)/.installed-test  ## Send a million random packets
	@FUZZ_CASES=1000000 $(BIN)/python -m pytest tests/faults/test_packets.py -k fuzzed $(PYTEST_ARGS)

clean:  ## Remove environments and caches
	@rm -rf .venv .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
