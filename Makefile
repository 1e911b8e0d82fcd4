# make demo   install into .venv, make a 3D asset from a prompt, say where the files are
# make test   install with test tools, run all tests that need no GPU
# make lint   style and types
#
# PYTHON=python3.12 chooses the interpreter behind .venv; PROMPT="a blue car" another demo.

PYTHON ?= python3
PROMPT ?= a red mug
DEMO_OUT ?= outputs/demo
VENV := .venv
BIN := $(VENV)/bin
VALIDATOR := .cache/gltf-validator
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	@out="$(DEMO_OUT)"; n=1; \
	while [ -e "$$out" ]; do n=$$((n + 1)); out="$(DEMO_OUT)-$$n"; done; \
	$(BIN)/sds3d generate "$(PROMPT)" --out "$$out" && \
	echo && echo "The asset, its pictures and the numbers of the run are in $$out:" && ls "$$out"

test: $(VENV)/.installed-dev validator
	$(BIN)/python -m pytest -m "not gpu" -rs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The Khronos glTF validator makes the export tests stricter; without npm they skip it and say so.
validator:
	@if [ -d $(VALIDATOR)/node_modules/gltf-validator ]; then :; \
	elif command -v npm >/dev/null 2>&1; then \
	  mkdir -p $(VALIDATOR) && \
	  npm install --no-save --silent --prefix $(VALIDATOR) gltf-validator@2.0.0-dev.3.10 \
	    || echo "gltf-validator could not be installed; its tests will be skipped"; \
	else echo "npm not found; tests with the glTF validator will be skipped"; fi
.PHONY: validator

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
