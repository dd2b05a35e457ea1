# The commands of this project. `make demo` and `make test` need only Python 3.11+, pip, make and a C compiler.
#
#   make demo    install, fetch the model, serve it, replay real traffic for a minute, print the report
#   make serve   install and serve on port 8000
#   make test    install and run every test
#   make check   lint and types
#   make compile the compiled forms of edited decision code (src/penstock/compiled.py)
#   make bench   the engine beside transformers, on this machine (benchmarks/RESULTS.md)
#
# Torch is the one large package. TORCH_INDEX=<an index that has CPU builds> saves gigabytes on Linux.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Test processes at once. Most tests wait for servers more than they compute.
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py src/penstock/engine/kernels.c src/penstock/__init__.py
# Those that patch decision code, and those that hold its Python form to its promises.
PURE_TESTS := tests/property tests/engine/test_swapping.py tests/sim/test_twin.py tests/sim/test_vopr.py \
	tests/sim/test_vopr_lanes.py tests/sim/test_vopr_mutants.py

.PHONY: demo serve test check compile format bench docs clean

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) (the large one)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "installing penstock"
	$(PIP) --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools for tests"
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

serve: $(VENV)/.installed
	$(BIN)/penstock serve

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
	PENSTOCK_PURE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PURE_TESTS)

compile: $(VENV)/.installed-dev
	$(BIN)/python setup.py build_ext --inplace

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.engine

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/reference.py

clean:
	rm -rf $(VENV) build reports .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
