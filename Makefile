# `make demo` and `make test` work on a fresh Debian 12 or Ubuntu machine: each sets up first what is missing.
#
#   make test K=block            only tests whose names contain "block"
#   make test ARGS="-x -v"       more arguments for pytest
#   make test JOBS=0             one test after the other (two at a time is what the bounds on times are made for)

PYTHON := .venv/bin/python
JOBS := 2
PYTEST := $(PYTHON) -m pytest -n $(JOBS) --dist worksteal $(if $(K),-k "$(K)") $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check lint types imports format bench cluster docs constraints clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing: Debian packages, .venv, Python packages.
	@scripts/setup

demo: setup ## Show it: an S3 server, a mount, two epochs of training, a worker killed. Under a minute.
	@$(PYTHON) -m bench.demo

test: setup ## All tests but the slow ones, real mounts included.
	$(PYTEST) -m "not slow"

test-all: setup ## All tests.
	$(PYTEST)

check: lint types imports test ## What has to pass before a change is proposed.

lint: setup ## Style and formatting.
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: setup ## mypy --strict.
	$(PYTHON) -m mypy

imports: setup ## The layers of docs/ARCHITECTURE.md.
	.venv/bin/lint-imports --no-logo

format: setup ## Format the code and sort imports.
	$(PYTHON) -m ruff check --fix-only .
	$(PYTHON) -m ruff format .

bench: ## Compare with other file systems on this machine (25 minutes).
	@scripts/setup --bench
	$(PYTHON) -m bench $(ARGS)

cluster: setup ## A cluster of three nodes on this machine, to play with (root; ARGS="down" takes it away).
	$(PYTHON) -m tests.cluster $(if $(ARGS),$(ARGS),up)

docs: setup ## Write the generated documents and manifests anew.
	$(PYTHON) -m cachefs.cli.reference docs
	$(PYTHON) scripts/render-manifests

constraints: setup ## Renew constraints.txt with the newest versions that pyproject.toml allows.
	scripts/constraints

clean: ## Remove everything that can be made again.
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
