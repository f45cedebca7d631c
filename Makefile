# Each target does all its own set-up in .venv, and for the oldest versions in .venv-oldest; only
# Python 3.11+ and make are needed.
PYTHON ?= python3
BIN := .venv/bin
# while one file's ranks meet, another's reference is computed; in the order of the folders, which
# ends with the shortest: xdist's own order ends with the files of one long test
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile --no-loadscope-reorder
# what meets Transformers; the rest does not depend on its version
OLDEST_TESTS := $(addprefix tests/, unit/test_registry.py $(addprefix conformance/test_, \
	families.py versions.py from_pretrained.py gpt2_init.py initial_values.py))

.PHONY: demo test test-newest test-oldest bench shards features lint types clean

demo: .venv/examples
	$(BIN)/python examples/compare_gpt2.py --out out

test: lint types test-newest test-oldest

test-newest: .venv/test
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)

# the lower ends of setup.cfg's ranges
test-oldest: .venv-oldest/test
	.venv-oldest/bin/python -m pytest $(TWO_AT_A_TIME) $(OLDEST_TESTS)

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/lint
	$(BIN)/mypy

shards: .venv/examples
	$(BIN)/python examples/gpt2_xl_shards.py

features: .venv/test
	$(BIN)/python -m pytest --collect-only --quiet --features=README.md

bench: .venv/benchmarks
	$(BIN)/python benchmarks/bench_step.py --batch 1
	$(BIN)/python benchmarks/bench_step.py --batch 1 --what forward
	$(BIN)/python benchmarks/bench_decode.py --batches 1
	$(BIN)/python benchmarks/bench_overhead.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_attention_memory.py
	$(BIN)/python benchmarks/bench_sequence_memory.py
	$(BIN)/python benchmarks/bench_plan.py
	$(BIN)/python benchmarks/bench_scale.py
	$(BIN)/python benchmarks/bench_gpu.py

# a virtual environment, its constraints: installs the extra that the target is named after; torch
# first, since the exact version decides which build is taken
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet $$(grep '^torch==' $(2))
	$(1)/bin/pip install --quiet --constraint $(2) --editable '.[$*]'
	touch $@
endef

# a stamp file per extra, renewed when the requirements change
.venv/%: setup.cfg pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt)

.venv-oldest/%: setup.cfg pyproject.toml constraints-oldest.txt
	$(call install,.venv-oldest,constraints-oldest.txt)

clean:
	rm -rf .venv .venv-oldest out build *.egg-info
