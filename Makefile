# make demo    trains two small models and writes runs/demo/report.html
# make test    linters, types, and every fast test         (SLOW=1: the slow tests too)
# make lint    the linters and types alone
# make venv    .venv with everything in it; the others call it

PYTHON ?= python3
SLOW ?=
PY := .venv/bin/python
STAMP := .venv/installed
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := test
.PHONY: demo test lint venv

venv: $(STAMP)

# The stamp holds the checksums of what was installed and the folder it was installed for, so that a fresh checkout of
# the same files asks nobody, while a changed or moved one installs again. Torch comes first and alone: a wheel that pip
# was told of locally (a small CPU build) is taken before the index is asked for its own.
$(STAMP): pyproject.toml constraints.txt
	@if { pwd; cksum pyproject.toml constraints.txt; } | cmp -s - $@; then touch $@; exit 0; fi; \
	set -e; rm -f $@; \
	test -x $(PY) || $(PYTHON) -m venv .venv; \
	echo "installing into .venv (once; the first time takes a few minutes)"; \
	pip="$(PY) -m pip --disable-pip-version-check --quiet"; \
	$$pip install --no-index --no-deps "torch==2.13.*" 2>/dev/null || $$pip install -c constraints.txt "torch==2.13.*"; \
	$$pip install -c constraints.txt hatchling editables; \
	$$pip install -c constraints.txt --no-build-isolation -e ".[dev]"; \
	{ pwd; cksum pyproject.toml constraints.txt; } > $@

demo: $(STAMP)
	$(PY) -m rorqual demo

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib
	$(PY) -c "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
	$(PY) -m mypy

test: lint
	@$(PY) scripts/fetch_test_tokenizers.py
	$(PY) -m pytest -n 2 $(if $(SLOW),-m "")
