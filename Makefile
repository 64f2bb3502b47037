# Everything on a fresh machine with Python 3.11+ and nothing else. torch goes in first, pinned, so that no other build is pulled in.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: the tests run in two processes, and two threads each on two cores are slower than one.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg

.PHONY: install quickstart test test-all check bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "visard needs Python 3.11 or newer; name one with make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

quickstart: install
	$(BIN)/python -m visard.quickstart

test: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

test-all: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m ''

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Those that need no data, models or other environment of yours.
bench: install
	@for script in $(filter-out benchmarks/all_pairs.py benchmarks/characters.py benchmarks/mxnet_files.py benchmarks/students.py, $(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
