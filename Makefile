# Two commands on a fresh machine with Python, gcc and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo demo-cluster test lint types suite test-slow chaos clean

help:
	@echo "make demo [IMAGES=PATH]  install, then shard, pre-train, interrupt, resume and evaluate in minutes"
	@echo "make demo-cluster [IMAGES=PATH]  the same on a real two-node Slurm: preempted, hit by a lost node, watched by Prometheus"
	@echo "make test                install, then lint, types and the test suite"
	@echo "make test-slow           the longer studies"
	@echo "make chaos [DEATHS=200] [SEED=0]  kill, stop, resize and damage runs, and count what differs at their ends"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	@$(BIN)/coldpress demo $(if $(IMAGES),images="$(abspath $(IMAGES))")

demo-cluster: $(INSTALLED)
	@PYTHONPATH=.:tests $(BIN)/python -m operations.demonstration --at runs/demo-cluster $(if $(IMAGES),--images "$(abspath $(IMAGES))")

test: lint types suite

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# pytest-xdist goes on where a file cannot be imported, and would say so half an hour later. One thread for each worker:
# two that share two cores wait for each other.
suite: $(INSTALLED)
	@$(BIN)/pytest --collect-only -qq >/dev/null || $(BIN)/pytest --collect-only -qq
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal --durations=15

test-slow: $(INSTALLED)
	$(BIN)/pytest -q -m slow --durations=15

# A campaign forks: its process may have no threads. PYTHONPATH: tests/chaos is a package of its own.
chaos: DEATHS ?= 200
chaos: SEED ?= 0
chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m chaos.campaign --at "$$(mktemp -d)/campaign" --deaths $(DEATHS) --seed $(SEED)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
