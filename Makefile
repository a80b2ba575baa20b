# `make demo` asks the demo model the example question about the example image. `make test` runs the
# tests. Both first create a virtual environment in .venv if there is none; VENV=DIR changes where.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
RUN = $(VENV)/bin/python -m

.PHONY: demo test

demo: $(VENV)/.installed
	@$(RUN) minillava.generate

test: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(RUN) pytest -q -n auto

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	@$(RUN) pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/pip
	@$(RUN) pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/bin/pip:
	@test -n '$(PYTHON)' || { echo 'error: found no Python 3.10 or newer with venv; name one with PYTHON=' >&2; exit 2; }
	@$(PYTHON) -m venv '$(VENV)'
