# `make` prints what there is. Everything happens in .venv; nothing else is installed or changed.
PYTHON ?= python3
BIN = .venv/bin

help:  ## print this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed  ## make .venv with terdit and all it needs

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## train, pack, sample and score a small ternary DiT (minutes on a CPU)
	$(BIN)/python -m terdit_cli.commands.demo

test: install lint  ## lint, types and all tests
	$(BIN)/pytest -q --cov=terdit_cli --cov-report=term:skip-covered

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: install  ## build dist/terdit-*.whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove everything that the other targets made
	rm -rf .venv build dist demo runs *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo test lint wheel clean
