# dpipe. `make help` lists the targets; `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
DEMO ?= demo
TESTS ?= tests

# Where bytecode may not be written, every process of every test compiles torch anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint types test test-fast demo bench table soak fuzz docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with everything dpipe, its tests and benchmarks need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "dpipe needs Python 3.12; found $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt -e '.[train,lerobot,dev]'
	touch $(STAMP)

fmt: setup  ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup  ## formatting and lint rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup  ## type-check with basedpyright
	$(BIN)/basedpyright

test: setup  ## every test, in parallel
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(TESTS)

test-fast: setup  ## the tests that take seconds
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow" $(TESTS)

demo: setup  ## raw recordings to a trained policy, in ./demo (DEMO=folder for another)
	DPIPE=$(abspath $(BIN))/dpipe bash bench/demo.sh $(DEMO)

bench: setup  ## every benchmark against its peers; rewrites bench/RESULTS.md
	$(BIN)/python bench/all.py

table: setup  ## train and judge the tabletop's table of policies; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python bench/train_table.py
	$(BIN)/python bench/all.py --table

soak: setup  ## long counted runs: kills and corruptions, seeded and resumable
	$(BIN)/python bench/soak.py
	$(BIN)/python bench/soak_bytes.py

fuzz: setup  ## bounded fuzzing of every reader
	$(BIN)/python bench/fuzz.py

docs: setup  ## write the pages below docs/ that are made from the code
	$(BIN)/python docs/generate.py

clean:  ## remove what demo and tests left (not .venv)
	rm -rf $(DEMO) .pytest_cache .ruff_cache .hypothesis bench/out
