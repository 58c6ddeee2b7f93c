# make quickstart   the whole loop on this machine, from nothing: report.html at the end
# make test         every test
# make deb          the Debian packages of the device's side, in dist
# Everything below sets itself up (virtual environment in .venv, system packages where they can be installed).
#
# PYTHON=python3.12                                     another interpreter (3.11 or newer)
# TORCH_INDEX=https://download.pytorch.org/whl/cpu      the index torch comes from: CPU wheels (small), or …/cu126 for CUDA.
#                                                       Empty: whatever pip is configured to use.
# OUT=quickstart-out                                    where quickstart writes
# ARCH=arm64                                            for which processors deb builds (default: amd64 arm64)

PYTHON ?= python3
TORCH_INDEX ?=
OUT ?= quickstart-out
ARCH ?= amd64 arm64
VENV := .venv
BIN := $(VENV)/bin
export PYTHON TORCH_INDEX VENV

.PHONY: setup setup-dev quickstart check test soak bench docs deb clean

setup: $(VENV)/.ready-all
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready-%: pyproject.toml scripts/setup.sh
	scripts/setup.sh $*
	@touch $@

quickstart: setup
	$(BIN)/kiridashi quickstart --out $(OUT)

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

test: setup-dev
	$(BIN)/python -m pytest -m "not slow"

soak: setup-dev
	$(BIN)/python -m pytest

bench: setup-dev
	$(BIN)/python -m benchmarks

docs: setup-dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

deb: setup-dev
	$(BIN)/python scripts/build_deb.py --arch $(ARCH) --out dist

clean:
	rm -rf $(VENV) docs/_build build dist quickstart-out
