# SPDX-License-Identifier: Apache-2.0
# Every target works on a fresh machine with Python 3.11+, git, make and g++: it first brings .venv up to date.

# Settings: make demo PYTHON=python3.12 DEVICE=cpu
PYTHON ?= python3
DEVICE ?= auto
ARGS ?=
JOBS ?= 2
NEXT ?=

VENV_PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help bootstrap demo test test-slow test-explore bench lint next-vllm clean

help: ## this list
	@echo 'make TARGET [PYTHON=python3.11] [DEVICE=auto|cpu|nvidia] [JOBS=2] [ARGS="..." for pytest]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  %-10s %s\n' $$name "$$text"; done

bootstrap: ## build .venv: vLLM for this machine, the pack (editable), the tools; redo only what changed
	@$(PYTHON) .ci/bootstrap.py --device $(DEVICE)

demo: bootstrap ## serve the shipped MoE in bf16 and with --quantization mxmoe, and compare the two
	$(VENV_PYTHON) -m bench.demo

test: bootstrap ## every test that needs no GPU and no minutes
	$(VENV_PYTHON) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: bootstrap ## the tests that take minutes
	$(VENV_PYTHON) -m pytest -q -m 'slow and not gpu' --timeout=3600 $(ARGS)

test-explore: bootstrap ## the property tests with new random examples, not the same ones every time
	VLLM_EXT_EXAMPLES=explore $(VENV_PYTHON) -m pytest -q -n $(JOBS) -m 'not engine and not slow and not gpu' $(ARGS)

bench: bootstrap ## stock against the pack: engines, operators, the page of results (about 15 minutes)
	$(VENV_PYTHON) -m bench.sweep $(ARGS)

lint: bootstrap ## ruff and mypy
	@$(VENV_PYTHON) .ci/lint.py

next-vllm: bootstrap ## check the patch records against the newest vLLM, in .venv-next (NEXT='vllm==X.Y.Z' to choose)
	@$(VENV_PYTHON) .ci/next_vllm.py --device $(DEVICE) $(if $(NEXT),--requirement '$(NEXT)')

clean: ## remove the environments and everything built
	rm -rf .venv .venv-next build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
