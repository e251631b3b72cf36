# Everything runs in a virtual environment, which is created on first use: VENV=path puts it elsewhere.
# `make train` installs only what training needs; the other targets add the tools that they need.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
BASE := $(VENV)/.installed
TOOLS := $(VENV)/.tools-installed
PYTEST_ARGS ?=
WORKERS ?= 2

.PHONY: train test slow check format docs links benchmark clean

train: $(BASE)  ## train on real handwritten digits, and test
	@echo "Training a small network on scikit-learn's handwritten digits: about 20 seconds on two CPU cores."
	$(BIN)/lit-lipschitz fit --config digits.yaml

test: $(TOOLS)  ## the test suite, without what takes minutes or real data
	@echo "Running the tests in $(WORKERS) processes: 5 to 10 minutes on two cores; with more, pass WORKERS=8."
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not real_data" --timeout 300 $(PYTEST_ARGS)

slow: $(TOOLS)  ## the rest of it; real data are looked for in $LIT_LIPSCHITZ_DATA
	$(BIN)/python -m pytest -m "slow or real_data" $(PYTEST_ARGS)

check: $(TOOLS)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --config-file pyproject.toml

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(TOOLS)  ## the pages and the API reference, in build/docs; warnings and broken links between pages are errors
	rm -rf build/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html -d build/doctrees docs build/docs

links: $(TOOLS)  ## opens every link of README and docs to another site; needs the network
	$(BIN)/python -m sphinx --quiet --keep-going -b linkcheck -d build/doctrees docs build/links

benchmark: $(TOOLS)  ## the cost of the callback
	$(BIN)/python benchmarks/overhead.py

$(BASE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Creating a virtual environment in $(VENV)."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing lit-lipschitz with PyTorch and Lightning in $(VENV), once: 6 GB with CUDA, or 1.3 GB with PyTorch's CPU"
	@echo "wheels (see README.md). This takes 1 to 4 minutes plus the download of PyTorch."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[digits]"
	@touch $@

$(TOOLS): $(BASE)
	@echo "Installing the tools for tests, checks and documentation in $(VENV), once: 0.5 GB, about a minute."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
