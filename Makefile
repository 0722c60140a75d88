# Needs Python >= 3.10 with venv and pip, and a C++ compiler. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench wheel clean

demo: .venv/installed
	$(BIN)/sdattn-fast demo

test: .venv/installed
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/pytest --benchmark

wheel: .venv/installed
	$(BIN)/pip wheel --no-deps -w dist .

.venv/installed: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info sdattn_fast/*.so
