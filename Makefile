# make demo   install into .venv, make a 3D asset from a prompt, say where the files are
# make demo-ui  install into .venv, open the browser interface on http://127.0.0.1:7860
# make test   install with test tools, run all tests that need no GPU
# make lint   style and types
# make audit  known vulnerabilities of the pinned packages
#
# PYTHON=python3.12 chooses the interpreter behind .venv; PROMPT="a blue car" another demo.

PYTHON ?= python3
PROMPT ?= a red mug
DEMO_OUT ?= outputs/demo
VENV := .venv
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
BIN := $(VENV)/bin
VALIDATOR := .cache/gltf-validator
BROWSER := .cache/browser
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	@out="$(DEMO_OUT)"; n=1; \
	while [ -e "$$out" ]; do n=$$((n + 1)); out="$(DEMO_OUT)-$$n"; done; \
	$(BIN)/sds3d generate "$(PROMPT)" --out "$$out" && \
	echo && echo "The asset, its pictures and the numbers of the run are in $$out:" && ls "$$out"

demo-ui: $(VENV)/.installed
	$(BIN)/sds3d ui
.PHONY: demo-ui

test: $(VENV)/.installed-dev validator browser
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

# three.js and a driver for an installed chromium: exported files are shown in a browser and compared with our renders.
browser:
	@if [ -d $(BROWSER)/node_modules/three ] && [ -d $(BROWSER)/node_modules/playwright-core ]; then :; \
	elif command -v npm >/dev/null 2>&1; then \
	  mkdir -p $(BROWSER) && \
	  npm install --no-save --silent --prefix $(BROWSER) three@0.184.0 playwright-core@1.61.1 \
	    || echo "three could not be installed; the browser tests will be skipped"; \
	else echo "npm not found; the browser tests will be skipped"; fi
.PHONY: browser

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed

# Known vulnerabilities in the pinned packages, as far as the package index tells; it says which it knows nothing of.
audit: $(VENV)/.installed-dev
	$(BIN)/python -m pip_audit -r constraints.txt --no-deps --disable-pip --progress-spinner off 2>&1 | sed "/WARNING:pip_audit/d"
.PHONY: audit

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
