# Everything runs in a virtual environment of its own, made on first use: VENV=path puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: train test slow check format docs links benchmark clean

train: $(STAMP)  ## train on real handwritten digits, and test
	$(BIN)/lit-lipschitz fit --config digits.yaml

test: $(STAMP)  ## the test suite, without what takes minutes or real data
	$(BIN)/python -m pytest -m "not slow and not real_data" --timeout 300 $(PYTEST_ARGS)

slow: $(STAMP)  ## the rest of it; real data are looked for in $LIT_LIPSCHITZ_DATA
	$(BIN)/python -m pytest -m "slow or real_data" $(PYTEST_ARGS)

check: $(STAMP)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --config-file pyproject.toml

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## these pages and the reference, in build/docs; a warning is an error, a link that leads nowhere one too
	rm -rf build/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html -d build/doctrees docs build/docs

links: $(STAMP)  ## opens every link of README and docs to another site; needs the network
	$(BIN)/python -m sphinx --quiet --keep-going -b linkcheck -d build/doctrees docs build/links

benchmark: $(STAMP)  ## the cost of the callback
	$(BIN)/python benchmarks/overhead.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[digits,dev,docs]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
