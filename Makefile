# Every target sets itself up; all are safe to repeat.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint bench constraints clean

demo: $(VENV)/.user
	$(BIN)/clipindex demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	for each in read decode search vocabulary probe precision bench scaling hostile chaos feed duplicates against_naive; do $(BIN)/python benchmarks/$$each.py || exit 1; done

$(VENV)/.user: pyproject.toml constraints.txt
	@echo "setting up $(VENV): about two minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@echo "setting up $(VENV) with the development tools: about three minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.user

# Pins what a fresh environment resolves to today.
constraints:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --editable '.[dev]'
	$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable \
	  | sed 's/$$/; python_version >= "3.11"/' > constraints.txt

clean:
	rm -rf $(VENV) clipindex-demo
