# `make` lists the targets. Everything happens in .venv; nothing else is installed or changed.
PYTHON ?= python3
BIN = .venv/bin
NATIVE = terdit_cli/runtime/native

help:  ## print this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: .venv/installed $(NATIVE)/libterdit.so  ## make .venv with terdit and everything it needs

# pip leaves the native library to the next rule, which builds only what has changed.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "terdit needs Python 3.11-3.13, this is $$($(PYTHON) -V): make test PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt \
		--config-settings wheel.cmake=false --editable '.[dev]'
	touch $@

# Without a compiler everything else works, so make continues.
$(NATIVE)/libterdit.so: .venv/installed terdit_cli/__init__.py \
		$(wildcard $(addprefix $(NATIVE)/, *.cpp *.h *.inc CMakeLists.txt))
	rm -f $@
	$(BIN)/cmake --log-level=WARNING -G 'Unix Makefiles' -S $(NATIVE) -B build/native \
		&& $(BIN)/cmake --build build/native --parallel 4 -- --no-print-directory \
		&& $(BIN)/cmake --install build/native --prefix . && touch $@ \
		|| { rm -rf build/native; echo "No native library: terdit runs on the reference backend."; }

demo: install  ## train, pack, sample and score a small ternary DiT (minutes on a CPU)
	$(BIN)/python -m terdit_cli.lab.demo

PYTEST = $(BIN)/pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

test: install lint  ## lint, types and the fast tests (minutes)
	$(PYTEST) -m 'not slow and not sanitizer'

test-slow: install  ## the other tests
	$(PYTEST) -m 'slow and not sanitizer'

test-all: install lint  ## lint, types and all tests
	$(PYTEST)

coverage: install  ## all tests, with line coverage per file
	$(PYTEST) --cov=terdit_cli --cov-report=term:skip-covered

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## docs/bench.md: terdit and its rivals on this CPU (minutes; GGML=libggml-cpu.so)
	$(BIN)/terdit bench 600m --what all --full --size 256,512 --threads 1,$$(getconf _NPROCESSORS_ONLN) $(GGML:%=--rivals all,%) --out docs/bench.md

bench-gpu: install  ## docs/gpu.md: terdit and its rivals on this GPU (under ten minutes), or what can be counted without
	$(BIN)/terdit bench 600m,4.2b --device cuda --full --out docs/gpu.md \
		|| { test $$? = 4 && $(BIN)/terdit bench 600m,4.2b --what limits --full --out docs/gpu.md; }

bench-metrics: install  ## docs/metrics.md: eval-fid's scores and times beside recorded values and other libraries
	$(BIN)/terdit bench tests/golden/metrics.json --full --threads $$(getconf _NPROCESSORS_ONLN) --out docs/metrics.md

add-model: install  ## package a run: make add-model RUN=runs/x NAME=x EVAL=result.json WORDS='--data ...'
	$(BIN)/python -m terdit_cli.lab.add_model $(RUN) $(NAME) --eval $(EVAL) $(WORDS)

docs: install  ## docs/recipes.md and recipes/recipe.schema.json from the models in recipe.py
	$(BIN)/python -m terdit_cli.lab.recipe_docs docs/recipes.md
	$(BIN)/terdit recipes --schema > recipes/recipe.schema.json

results: install  ## docs/results.md, -tables.md and .html from the results of the studies in docs/studies
	$(BIN)/terdit study recipes/studies/fashion-mnist.yaml recipes/studies/cifar10.yaml \
		recipes/studies/ablations.yaml --render --runs docs/studies --out docs/results.md

results-quick: install  ## a small version of the same comparisons, on the packaged images (minutes)
	$(BIN)/terdit study recipes/studies/quick.yaml --out runs/results-quick.md

native-sanitize: install  ## the native code under the address, undefined-behaviour and thread sanitizers
	$(BIN)/pytest -q -m sanitizer

wheel: install  ## build dist/terdit-*.whl for any Linux with glibc 2.28, checked by auditwheel
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel \
		--config-settings cmake.define.TERDIT_OLD_GLIBC=ON .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist --only-plat \
		--plat "manylinux_2_28_$$(uname -m)" build/wheel/terdit-*.whl

clean:  ## remove what the other targets made; your own runs stay
	rm -rf .venv build dist demo runs/results-quick* runs/studies/quick $(NATIVE)/*.so .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo test test-slow test-all coverage lint bench bench-gpu bench-metrics add-model docs results results-quick native-sanitize wheel clean
