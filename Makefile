# Two commands to know: `make demo` and `make test`. Each makes the environment first if needed.
PYTHON ?= python3
VENV   := .venv
KEY    := $(shell sha256sum pyproject.toml | cut -c1-16)
READY  := $(VENV)/ready-$(KEY)
USED   := $(VENV)/used-$(KEY)
BIN    := $(VENV)/bin
RUN    := PATH="$(CURDIR)/$(BIN):$$PATH"
DEMO   := --runs runs/demo
SHORT  := search distill_speed stopwatch footprint serve_load serve_abuse dicom_headers folders
LONG   := line latency_prediction leakage unusual papers once_for_all quantize scorecam_speed verdict chain explanation_kd latency_peers

.PHONY: demo test test-slow check bench bench-long reference format help clean
.DEFAULT_GOAL := help

demo: $(USED)  ## the whole line on the embedded data: distil, quantise, export, bench, explain, report
	$(BIN)/edgekd distill --profile cpu --size 96 --shrink-epochs 5 --subnets 20 $(DEMO)
	$(BIN)/edgekd quantize --max-drop 5 $(DEMO)
	$(BIN)/edgekd export --format openvino $(DEMO)
	$(BIN)/edgekd bench $(DEMO) || test $$? = 6  # 6: this machine is busy, the page says so
	$(BIN)/edgekd explain $(DEMO) || case $$? in 3|6) ;; *) exit 1 ;; esac  # the page tells the verdict
	@echo; echo "open this page in a browser:"
	@$(BIN)/edgekd report $(DEMO)

# A process that crashes ends the run: xdist 3.8 may wait for ever for one that it has replaced.
PYTEST = $(RUN) $(BIN)/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile

test: $(READY)  ## the tests, but for those that take long
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(READY)  ## whole lines, every block of the README, real servers, browsers and kills
	$(PYTEST) -m slow $(TESTS)

check: $(READY)  ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## write what `check` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: $(READY)  ## docs/commands.md, from the commands
	$(BIN)/python -m edgekd.cli.reference > docs/commands.md

bench: $(READY)  ## the benchmarks that take minutes, three quarters of an hour in all; figures go to benchmarks/results
	for name in $(SHORT); do $(BIN)/python benchmarks/$$name.py || exit; done
	$(BIN)/python benchmarks/readme.py

bench-long: $(READY)  ## those that train
	for name in $(LONG); do $(BIN)/python benchmarks/$$name.py || exit; done
	$(BIN)/python benchmarks/readme.py

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs

# What users install, and what developers install beside it. The names hold the hash of
# pyproject.toml, so a change of dependencies makes a new environment.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(USED): pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -e '.[train,quantize,openvino,report]'
	touch $@

$(READY): $(USED)
	$(PIP) -e '.[dev]'
	touch $@
