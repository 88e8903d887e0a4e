# make demo    trains two small models and writes runs/demo/report.html
# make test    linters, types, and every fast test         (SLOW=1: the slow tests too)
# make lint    the linters and types alone
# make docs    builds the documentation site into site/ and checks its links
# make notebooks  executes the notebooks and compares what they print   (WRITE=1: writes them anew)
# make wheel   builds the wheel and tries it in an environment of its own
# make venv    .venv with everything that work on rorqual needs; make demo installs less

PYTHON ?= python3
SLOW ?=
WRITE ?=
LINTED ?=
PY := .venv/bin/python
DEMO := .venv/demo-installed
TEST := .venv/test-installed
DOCS := .venv/docs-installed
export OMP_NUM_THREADS ?= 1
export PIP_ROOT_USER_ACTION ?= ignore
# The demo and the tests start Python some hundred times; each would compile the library again.
unexport PYTHONDONTWRITEBYTECODE

# Wheels alone: nothing is compiled or built on a user's machine. Errors alone: pip's warnings about the settings of a
# machine would fill the first screen that a user sees.
INSTALL := $(PY) -m pip --disable-pip-version-check -qq install --only-binary=:all:
PINNED := $(INSTALL) -c constraints.txt
VENV = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
    { echo "got $$($(PYTHON) --version), expected 3.11 or later: make demo PYTHON=python3.12" >&2; exit 1; }; \
    $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1 || \
    $(PYTHON) -m venv --clear .venv
CHECKSUM := { pwd; cksum pyproject.toml constraints.txt Makefile; }

.DEFAULT_GOAL := test
.PHONY: demo test lint docs notebooks wheel venv

venv: $(TEST)

# A stamp holds the checksums of what was installed and the folder it was installed for, so that a second run of the
# same files asks no index, while a changed or moved checkout installs again. Torch comes first and alone: a wheel that
# pip was given locally (a small CPU build) is taken before the index is asked for its own. rorqual itself is built by a
# backend that is already installed, since a build environment of its own would be downloaded each time.
$(DEMO): pyproject.toml constraints.txt Makefile
	@if $(CHECKSUM) | cmp -s - $@; then touch $@; exit 0; fi; \
	set -e; rm -f $@; \
	$(VENV); \
	echo "installing into .venv (once; the first time takes a few minutes)"; \
	$(INSTALL) --no-index --no-deps "torch==2.13.*" 2>/dev/null || $(PINNED) "torch==2.13.*"; \
	$(PINNED) hatchling editables; \
	$(PINNED) --no-build-isolation -e ".[train,report]"; \
	$(CHECKSUM) > $@

# The evaluation harness asks for packages that exist only as source archives, for tasks that no test runs: it is
# installed without what it asks for, and [tasks] names the wheels that a local task imports. It goes before it comes
# again, since pip would name what it misses each time. nemo-automodel, the reference of DeepSeek-V4.1, asks for a whole
# training stack; that model runs with torch and transformers alone.
$(TEST): $(DEMO)
	@if $(CHECKSUM) | cmp -s - $@; then touch $@; exit 0; fi; \
	set -e; rm -f $@; \
	echo "installing what the tests need"; \
	$(PY) -m pip -qqq uninstall --yes lm-eval nemo-automodel; \
	$(PINNED) --no-build-isolation -e ".[dev]"; \
	$(PINNED) --no-deps lm-eval; \
	$(INSTALL) --no-deps nemo-automodel==0.7.0 || \
	    echo "nemo-automodel is not reachable: the tests that compare with it will be skipped"; \
	$(CHECKSUM) > $@

# The site is built of files alone: it needs neither torch nor rorqual installed.
$(DOCS): pyproject.toml constraints.txt Makefile
	@if $(CHECKSUM) | cmp -s - $@; then touch $@; exit 0; fi; \
	set -e; rm -f $@; \
	$(VENV); \
	echo "installing what builds the site"; \
	$(PINNED) $$($(PY) -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])'); \
	$(CHECKSUM) > $@

docs: $(DOCS)
	$(PY) scripts/build_site.py

notebooks: $(TEST)
	$(PY) scripts/build_notebooks.py $(if $(WRITE),,--check)

demo: $(DEMO)
	$(PY) -m rorqual demo

lint: $(TEST)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib
	$(PY) -c "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
	$(PY) -m mypy

# LINTED: the linters have just been run.
test: $(if $(LINTED),$(TEST),lint)
	@$(PY) scripts/fetch_test_tokenizers.py
	$(PY) -m pytest -n 2 $(if $(SLOW),-m "")

wheel: $(TEST)
	$(PY) scripts/check_wheel.py
