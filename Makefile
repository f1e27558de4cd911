# make demo    ReLUfy a tiny model end to end: 2 to 3 minutes on 2 cores, and 2 to install
# make test    the whole test suite
# make lint    ruff
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
RUN = .venv/bin/python

.PHONY: demo test lint

demo: .venv/requirements
	$(RUN) experiments/run.py --config=configs/tiny_relufy.py

test: .venv/requirements-dev
	$(RUN) -m pytest -n 2 --dist loadfile

lint: .venv/requirements-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 or 3.12; name one by make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv

# An empty file of the same name as a requirements file says that it is installed.
.venv/requirements-dev: requirements-dev.txt requirements-eval.txt
.venv/requirements .venv/requirements-dev: .venv/%: .venv/bin/python requirements.txt constraints.txt
	$(RUN) -m pip install --disable-pip-version-check --quiet --requirement $*.txt
	@touch $@
