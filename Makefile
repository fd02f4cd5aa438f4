# Everything from a bare machine with Python 3.11 or newer and make: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-browser bench-speed bench-network lint clean help
help:
	@echo "make demo       six federated runs and their report, about five minutes on two cores"
	@echo "make test       style, types and tests"
	@echo "make test-slow  the long tests"
	@echo "make test-browser  only the pages in Chromium (make test tries them too, where it is there)"
	@echo "make bench-speed  what is faster than what (docs/performance.md); wants a quiet machine"
	@echo "make bench-network  what several machines cost (docs/deployment.md); half an hour"
	@echo "make clean      remove the virtual environment and the runs"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; give another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# What tests and benchmarks need besides; a demo does without it, and starts sooner.
$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fedmllm demo

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow

test-browser: $(DEV)
	$(BIN)/python -m pytest -m browser

# Flower pins its dependencies tightly: an environment of its own, which sees ours as well.
FLOWER := runs/flower
$(FLOWER)/.installed: $(DEV)
	$(BIN)/python -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check 'flwr[simulation]==1.41.0'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(FLOWER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
	@touch $@

bench-speed: $(DEV) $(FLOWER)/.installed
	FLOWER_PYTHON=$(CURDIR)/$(FLOWER)/bin/python $(BIN)/python benchmarks/speed $(ROWS)
	$(BIN)/python scripts/update_docs.py

bench-network: $(DEV)
	$(BIN)/python benchmarks/network.py $(CASES)
	$(BIN)/python scripts/update_docs.py

clean:
	rm -rf $(VENV) runs
