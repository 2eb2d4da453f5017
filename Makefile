# Everything here sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint parity mutants bench bench-memory clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py --out runs/demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Long sweeps and measurements, outside CI.
parity: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "parity or not parity" tests/parallel tests/verify tests/planner
	OMP_NUM_THREADS=1 $(BIN)/python -m meshwright verify --matrix --count 180 --out runs/parity.md

mutants: $(VENV)/.ready
	cd tests/parallel && OMP_NUM_THREADS=1 PYTHONPATH=. ../../$(BIN)/python test_mutants.py

bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/context.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/expert.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/async_tp.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/async_ep.py

bench-memory: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
