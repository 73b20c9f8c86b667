# `make` alone lists the targets. The environment they run in is made by scripts/setup.sh, in .venv.
# Written for GNU make 3.81, which is what macOS ships.

# Options, given as `make demo PYTHON=python3.12` or exported beforehand; scripts/setup.sh says what each does.
export PYTHON TORCH_INDEX TORCH_VERSION

PY := .venv/bin/python
# One process of tests a core; a process that runs out of tests takes some of another's.
PARALLEL := -n logical --dist worksteal
BENCHMARKS ?= ops train posttrain decode convert
FUZZ_SECONDS ?= 3600
LINT_SOURCES := fathom tests $(wildcard benchmarks examples)

.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo posttrain test check nightly lint long fuzz clients bench clean

help: ## List the targets and options
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo "Options (most of them for the set-up, which the other targets run first):"
	@echo "  BENCHMARKS=convert    which of benchmarks/ 'make bench' runs; all of them: $(BENCHMARKS)"
	@echo "  FUZZ_SECONDS=600      how long 'make fuzz' takes: an hour by default"
	@echo "  PYTHON=python3.12     the Python, 3.11 or newer, that .venv is made with"
	@echo "  TORCH_VERSION=2.11.0  another torch than the one pinned in constraints.txt"
	@echo "  TORCH_INDEX=URL       where torch's wheels are offered. On Linux plain PyPI gives the CUDA build, several"
	@echo "                        GB; TORCH_INDEX=https://download.pytorch.org/whl/cpu gives the small CPU build."

setup: ## Make .venv: Fathom, and what serving, evaluation and GGUF need
	@sh scripts/setup.sh

setup-test:
	@sh scripts/setup.sh test

demo: setup ## Train a small model here in six minutes and report what it learned
	@.venv/bin/fathom demo

posttrain: setup ## Fine-tune and reinforce the demo's model, which is trained first, and report what changed
	@test -e runs/demo/model || .venv/bin/fathom demo
	@.venv/bin/fathom posttrain-demo

test: setup-test lint ## Run every check: format, lint, types, layers, all tests but those of make long
	@$(PY) -m pytest $(PARALLEL) -m "not nightly"

check: setup-test lint ## Run the fast checks: a contributor's loop
	@$(PY) -m pytest -x $(PARALLEL) -m "not slow and not oracle and not distributed and not nightly"

nightly: test long fuzz clients demo ## make test, long, fuzz, clients and demo: two hours

long: setup-test ## The tests that make test leaves out: killed runs, rewards that rise, all of reasoning-gym
	@$(PY) -m pytest $(PARALLEL) -m nightly --ignore tests/clients

clients: setup-test ## Run other people's clients against the server (installs them into build/clients)
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade --target build/clients -r tests/clients/clients.txt
	@PYTHONPATH=build/clients $(PY) -m pytest tests/clients/test_clients.py

fuzz: setup-test ## An hour of kills, damage, mutated files and hostile requests
	@FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -s tests/fuzz

bench: setup-test ## Measure against other programs (28 GB of disk for the conversions)
	@set -e; for name in $(BENCHMARKS); do echo "benchmarks/$$name.py"; $(PY) benchmarks/$$name.py; done

lint: setup-test
	@$(PY) -m ruff format --check $(LINT_SOURCES)
	@$(PY) -m ruff check $(LINT_SOURCES)
	@$(PY) -m mypy
	@.venv/bin/lint-imports

clean: ## Remove .venv, caches and build output; runs/ is kept
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find fathom tests -name __pycache__ -type d -prune -exec rm -rf {} +
