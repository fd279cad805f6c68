# `make demo` is all a newcomer needs; everything runs inside .venv, which `make venv` creates once.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
MIN := .venv-min
MIN_TESTS := tests/flow tests/text/test_sampler.py tests/text/test_value.py tests/trainer/test_vgf_config.py \
	tests/trainer/test_targets.py tests/test_cli.py tests/test_package.py tests/test_serving.py tests/evaluation/test_judge.py

.PHONY: venv demo demo-rlhf docs lint clean audit test test-properties test-faults test-fuzz test-load test-distributed test-min-deps

venv: $(STAMP)

# The stamp makes a second call instant; a changed dependency list makes it stale. The install is editable, so a
# change of the code alone never does.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "vgf_llm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another interpreter: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "'$(PYTHON)' cannot create virtual environments: install its venv module (Debian, Ubuntu: python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[dev,control]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/vgf demo

# make demo-rlhf DATA=DIR: supervised model, reward models, VGF and its page on Anthropic's HH-RLHF, whose files are in DIR.
demo-rlhf: $(STAMP)
	@test -n "$(DATA)" || { echo "Say where the .jsonl or .jsonl.gz files of HH-RLHF are: make demo-rlhf DATA=DIR" >&2; exit 2; }
	$(VENV)/bin/python -m benchmarks.rlhf_hh --data "$(DATA)"

docs: $(STAMP)
	$(VENV)/bin/python docs/config_page.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# A process per core, each with one thread: several threads on models this small spend their time waiting for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest --ignore tests/distributed --numprocesses logical --dist loadfile

# 1,000 random cases of every formula against its slow reference; `make test` tries a few of them.
test-properties: $(STAMP)
	OMP_NUM_THREADS=1 PROPERTY_CASES=1000 $(VENV)/bin/pytest tests/properties --timeout 3600 --durations 15

# A hundred kills at random moments, one and two processes; writes what it found.
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m tests.faults.kill --kills 100 --output benchmarks/results/faults.json

test-fuzz: $(STAMP)
	$(VENV)/bin/python -m tests.fuzz transcripts --executions 1000000
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m tests.fuzz config --executions 10000

# Ten minutes of 32 clients, and 100,000 prompts.
test-load: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.load --output benchmarks/results/load.json

# The lowest versions that pyproject.toml allows, in an environment of their own, and the tests that lean on them most.
test-min-deps: $(MIN)/.installed
	OMP_NUM_THREADS=1 $(MIN)/bin/pytest $(MIN_TESTS)

$(MIN)/.installed: pyproject.toml constraints.txt tests/lowest.py
	$(PYTHON) -m venv --clear $(MIN)
	$(MIN)/bin/python tests/lowest.py > $(MIN)/lowest.txt
	$(MIN)/bin/python -m pip install --constraint $(MIN)/lowest.txt --editable '.[serve,judge]' pytest pytest-timeout hypothesis httpx
	@touch $@

# Known vulnerabilities of everything installed, asked of PyPI. A package it does not answer for is a failure (`--strict`), hence the
# versions without +cpu and the like. For a person, not for .ci/run: a new finding would fail an unchanged tree. Licences need no
# network: tests/test_packaging.py.
audit: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet pip-audit
	$(VENV)/bin/python -m pip list --format freeze --exclude-editable > $(VENV)/installed.txt
	sed 's/+.*//' $(VENV)/installed.txt > $(VENV)/audited.txt
	$(VENV)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audited.txt

# Two real processes of every engine, on the CPU.
test-distributed: $(STAMP)
	$(VENV)/bin/pytest tests/distributed --durations 10

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) $(MIN) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
