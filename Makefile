# Every command makes .venv and installs what it needs, once. With PYTHON=/path/to/python it uses that environment as it
# is and installs nothing.
SHELL := /bin/sh
CONSTRAIN := -c constraints.txt

ifdef PYTHON
installed =
else
PYTHON := .venv/bin/python
installed = .venv/.installed-$(1)
endif

.NOTPARALLEL:
.PHONY: help demo test quality format clean

help:
	@echo "make demo      train a small FlashMoE language model on this machine"
	@echo "make test      run every test"
	@echo "make quality   ruff, mypy, import-linter"
	@echo "make format    let ruff rewrite what it can"
	@echo "make clean     remove .venv and every cache"
	@echo "With PYTHON=/path/to/python nothing is installed: that environment is used as it is."

demo: $(call installed,train)
	$(PYTHON) -m flash_moe train

# A worker for each core where pytest-xdist is installed, beside which pytest-benchmark would warn.
workers = $(shell $(PYTHON) -c "import importlib.util as u; print('-n auto -p no:benchmark' if u.find_spec('xdist') else '')")

test: $(call installed,test)
	$(PYTHON) -m pytest -q $(workers)

quality: $(call installed,dev)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c "from importlinter.cli import lint_imports_command as check; check(['--no-logo'])"

format: $(call installed,dev)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools comes first and pinned, so that building the package needs no second, unpinned download of it.
.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/pip
	.venv/bin/python -m pip install $(CONSTRAIN) setuptools
	.venv/bin/python -m pip install $(CONSTRAIN) --no-build-isolation --editable '.[$*]'
	@touch $@ $(addprefix .venv/.installed-,$(also-$*))
also-test := train
also-dev := train test

# Some systems ship pip and venv without ensurepip; then the system's pip puts one into the environment.
.venv/bin/pip:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python3 is %d.%d; 3.10 or newer is needed" % sys.version_info[:2])'
	python3 -m venv .venv || { python3 -m venv --clear --without-pip .venv && \
		python3 -m pip --python .venv/bin/python install pip; }
