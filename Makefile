# `make install` creates .venv with the `baton` command in it; every other target does that first when it must.

PYTHON ?= python3.11
# Installed first, so that no other package decides which PyTorch comes. Another build of the same version:
#   make install TORCH="torch==2.13.0 --index-url ADDRESS"
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install format check test docs bench demo clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: install
	$(BIN)/python -m pytest -q

docs: install
	$(BIN)/python -m pytest -q tests/test_docs.py

bench: install
	mkdir -p out
	$(BIN)/baton eval handoff models/en-de-handoff --json out/eval.json

demo: install
	$(BIN)/baton demo

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist out
