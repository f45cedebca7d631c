# Each target does all its own set-up in .venv; only Python 3.11+ and make are needed.
# EXTRA is what the target needs beyond the package itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench shards features lint types clean

demo: .venv/examples
	$(BIN)/python examples/train_gpt2.py --out out

test: lint types
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

shards: .venv/examples
	$(BIN)/python examples/gpt2_xl_shards.py

features: .venv/test
	$(BIN)/python -m pytest --collect-only --quiet --features=README.md

bench: .venv/examples
	$(BIN)/python benchmarks/bench_step.py
	$(BIN)/python benchmarks/bench_attention_memory.py

# a stamp file per extra, renewed when the requirements change; torch first, since the exact
# version decides which build is taken
.venv/%: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv out build *.egg-info
