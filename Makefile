# Two commands: `make run` sets up and runs the notebooks, `make test` sets up and tests.
# Both share one environment in .venv, made once from the exact versions in requirements.lock.
# Choose another interpreter with: make PYTHON=python3.12 run

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.labkit-installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
# The kernel of this environment is meant, whatever else is installed for the user.
export JUPYTER_PREFER_ENV_PATH := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export JUPYTERLAB_WORKSPACES_DIR := $(CURDIR)/$(VENV)/lab-workspaces

.PHONY: run test test-modules test-notebooks lab notebooks lint format lock setup clean

run: setup
	HF_HUB_OFFLINE=1 $(BIN)/labkit run --all --keep-going
	$(BIN)/labkit report

test: test-modules test-notebooks

test-modules: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

# The committed notebooks are executed again, two at a time with a core each, which is faster than
# one with two; cells marked NBVAL_CHECK_OUTPUT are compared.
test-notebooks: setup
	HF_HUB_OFFLINE=1 LABKIT_RUNS=$(CURDIR)/build/nbval OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=900 \
		--nbval-sanitize-with tests/nbval.cfg notebooks/

# On copies in mine/, which git ignores; what is there is never replaced. Opens notebook 00 beside
# the table of contents, which marks the section that runs or has failed.
lab: setup
	@mkdir -p mine $(VENV)/share/jupyter/lab/settings
	@cd notebooks && for f in *.ipynb images; do test -e ../mine/$$f || cp -R $$f ../mine/; done
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
		> $(VENV)/share/jupyter/lab/settings/overrides.json
	@test -d $(JUPYTERLAB_WORKSPACES_DIR) || \
		$(BIN)/jupyter lab workspaces import scripts/lab_workspace.json
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/workspaces/labkit \
		--KernelManager.transport_encryption=auto

notebooks: setup
	HF_HUB_OFFLINE=1 LABKIT_RUNS=$(CURDIR)/build/refresh $(BIN)/labkit refresh --all
	$(BIN)/python -m pytest -q tests/test_committed_notebooks.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# After changing a version in pyproject.toml and installing it: write down what is installed.
lock:
	{ echo "# Exact tested versions of everything that is installed. Written by: make lock"; \
	  $(BIN)/python -m pip list --format=freeze --exclude pip --exclude labkit \
	  | sed 's/^torch==\([^+]*\).*/torch==\1/' | grep -vE '^(nvidia-|cuda-|triton==)'; } > requirements.lock

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "labkit needs Python 3.11, 3.12 or 3.13, and found none as \
	python3. Install one, or name it: make PYTHON=/path/to/python3.12 run" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "labkit needs Python 3.11, 3.12 or 3.13, and \
	$(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual \
	environments. On Debian or Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
