# From a fresh clone, with only python3 (3.11 or newer), git and make:
#   make demo    install, run the whole pipeline small, write runs/demo/report.html
#   make test    install, run the tests
#   make gpu     install, then measure a CUDA GPU against the targets, in at most 8 minutes
#
# TORCH names the torch to install first, with any pip options that select a build (a CPU build is enough);
# nothing installed later may replace it.
# To keep a torch that python3 already has (say, one built for your GPU), pass an empty one: make demo TORCH=
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= dev,docs,track
TESTS ?= tests
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test test-all gpu docs lint format clean

demo: .venv/installed
	$(BIN)/minwm pipeline demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(TESTS)

test-all: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

gpu: .venv/installed  # what a CUDA GPU does, against the targets: runs/gpu/page.md
	$(BIN)/minwm selftest --gpu --out runs/gpu

docs: .venv/installed  # into runs/site; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/installed
	$(BIN)/ruff check minwm tests benchmarks docs
	$(BIN)/ruff format --check minwm tests benchmarks docs
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff check --fix minwm tests benchmarks docs
	$(BIN)/ruff format minwm tests benchmarks docs

# The stamp is older than its sources exactly when something has to be installed again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minwm needs python 3.11 or newer; choose one with: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) .venv
	$(if $(TORCH),$(BIN)/python -m pip install -q $(TORCH))
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > .venv/torch.txt
	$(BIN)/python -m pip install -q -c constraints.txt -c .venv/torch.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv runs/demo
